// Packing of linear weights into panels; the layouts are described where they are used, in
// kernels: linear.cpp, pair_linear.cpp, byte_linear.cpp and quantized_linear.cpp.
//
// Compiled for the oldest supported processor; packing happens once.
#include <cstring>
#include <limits>

#include "context.h"

namespace midspan {

namespace {

constexpr int64_t kDensePanel = 32;
constexpr int64_t kQuantizedPanel = 16;
constexpr int64_t kBlock = 32;

/// How a quantized block lies in the file and in a panel.
struct QuantizedFormat {
  int64_t file_bytes;   // of one block of one row
  int64_t scales;       // 16-bit numbers before the quants
  int64_t quant_bytes;  // of one block of one row
  bool nibbles;

  int64_t panel_bytes() const { return kQuantizedPanel * (2 * scales + quant_bytes); }
};

bool quantized_format(int32_t format, QuantizedFormat& result) {
  switch (format) {
    case MIDSPAN_CPU_GGUF_Q4_0:
      result = {18, 1, 16, true};
      return true;
    case MIDSPAN_CPU_GGUF_Q4_1:
      result = {20, 2, 16, true};
      return true;
    case MIDSPAN_CPU_GGUF_Q8_0:
      result = {34, 1, 32, false};
      return true;
    default:
      return false;
  }
}

/// k filled up as the kernels want it.
int64_t filled(int32_t format, int64_t k) {
  const int64_t step = format == MIDSPAN_CPU_DENSE_PAIRS ? 32 : format == MIDSPAN_CPU_INT8_DYNAMIC ? 64 : 1;
  return (k + step - 1) / step * step;
}

bool is_scaled(int32_t format) { return format >= MIDSPAN_CPU_INT8_CHANNEL && format <= MIDSPAN_CPU_INT8_DYNAMIC; }

/// Bytes of the small numbers of 32 outputs, a scale for each, and for dynamic inputs the sums of the numbers.
int64_t scaled_panel_bytes(int32_t format, int64_t k) {
  return (filled(format, k) + (format == MIDSPAN_CPU_INT8_DYNAMIC ? 8 : 4)) * kDensePanel;
}

int64_t element_bytes(int32_t format) { return format == MIDSPAN_CPU_DENSE_FLOAT32 ? 4 : 2; }

struct Job {
  midspan_cpu_weight weight;
  QuantizedFormat quantized;
  uint8_t* packed;

  const uint8_t* row(int64_t output) const {
    return static_cast<const uint8_t*>(weight.rows) + output * weight.row_bytes;
  }
};

template <class T>
void pack_dense_panel(const Job& job, int64_t panel) {
  const int64_t k = job.weight.k;
  T* to = reinterpret_cast<T*>(job.packed) + panel * k * kDensePanel;
  for (int64_t column = 0; column < kDensePanel; ++column) {
    const int64_t place = job.weight.format != MIDSPAN_CPU_DENSE_BFLOAT16 ? column
                          : column < 16                                   ? 2 * column
                                                                          : 2 * (column - 16) + 1;
    const int64_t output = panel * kDensePanel + column;
    if (output >= job.weight.n) {
      for (int64_t index = 0; index < k; ++index) to[index * kDensePanel + place] = 0;
      continue;
    }
    const uint8_t* from = job.row(output);
    for (int64_t index = 0; index < k; ++index) {
      std::memcpy(&to[index * kDensePanel + place], from + index * int64_t{sizeof(T)}, sizeof(T));
    }
  }
}

/// Panels [filled k / group][32][group] of elements.
template <class T, int64_t group>
void pack_grouped(const Job& job, int64_t panel, T* to) {
  std::memset(to, 0, static_cast<size_t>(filled(job.weight.format, job.weight.k) * kDensePanel * int64_t{sizeof(T)}));
  for (int64_t column = 0; column < kDensePanel; ++column) {
    const int64_t output = panel * kDensePanel + column;
    if (output >= job.weight.n) return;
    const uint8_t* from = job.row(output);
    for (int64_t index = 0; index < job.weight.k; ++index) {
      std::memcpy(&to[(index / group * kDensePanel + column) * group + index % group],
                  from + index * int64_t{sizeof(T)}, sizeof(T));
    }
  }
}

void pack_pairs_panel(const Job& job, int64_t panel) {
  const int64_t elements = filled(job.weight.format, job.weight.k) * kDensePanel;
  pack_grouped<uint16_t, 2>(job, panel, reinterpret_cast<uint16_t*>(job.packed) + panel * elements);
}

/// Bytes with scales: [k][32] as linear.cpp, or runs of four as byte_linear.cpp takes them, and the numbers behind.
void pack_scaled_panel(const Job& job, int64_t panel) {
  const midspan_cpu_weight& weight = job.weight;
  const bool in_runs = weight.format == MIDSPAN_CPU_INT8_DYNAMIC;
  uint8_t* to = job.packed + panel * scaled_panel_bytes(weight.format, weight.k);
  if (in_runs) {
    pack_grouped<uint8_t, 4>(job, panel, to);
  } else {
    pack_grouped<uint8_t, 1>(job, panel, to);
  }
  uint8_t* numbers = to + filled(weight.format, weight.k) * kDensePanel;
  for (int64_t column = 0; column < kDensePanel; ++column) {
    const int64_t output = panel * kDensePanel + column;
    float scale = output < weight.n ? weight.scales[output] : 0.0f;
    int32_t excess = 0;
    for (int64_t index = 0; output < weight.n && index < weight.k; ++index) {
      const uint8_t bits = job.row(output)[index];
      excess += 128 * static_cast<int8_t>(bits);
      if (weight.format != MIDSPAN_CPU_FP8_CHANNEL || (bits & 127) != 127) continue;
      scale = std::numeric_limits<float>::quiet_NaN();  // one weight that is not a number spoils its output
      break;
    }
    std::memcpy(numbers + column * 4, &scale, 4);
    if (in_runs) std::memcpy(numbers + (kDensePanel + column) * 4, &excess, 4);
  }
}

/// The quant of column `index` of a block, nibble or byte.
uint32_t quant_at(const QuantizedFormat& format, const uint8_t* quants, int64_t index) {
  if (!format.nibbles) return quants[index];
  return index < 16 ? quants[index] & 15u : quants[index - 16] >> 4;
}

void pack_quantized_block(const QuantizedFormat& format, const uint8_t* block, int64_t column, uint8_t* to) {
  for (int64_t scale = 0; scale < format.scales; ++scale) {
    std::memcpy(to + (scale * kQuantizedPanel + column) * 2, block + scale * 2, 2);
  }
  uint8_t* words = to + format.scales * kQuantizedPanel * 2;
  const uint8_t* quants = block + format.scales * 2;
  const int64_t bits = format.nibbles ? 4 : 8;
  const int64_t columns_of_word = 16 / bits;
  const int64_t columns_of_tile = 2 * columns_of_word;
  for (int64_t tile = 0; tile < kBlock / columns_of_tile; ++tile) {
    for (int64_t half = 0; half < 2; ++half) {
      uint32_t word = 0;
      for (int64_t part = 0; part < columns_of_word; ++part) {
        word |= quant_at(format, quants, tile * columns_of_tile + 2 * part + half) << (part * bits);
      }
      uint8_t* at = words + tile * 64 + (2 * column + half) * 2;
      at[0] = static_cast<uint8_t>(word & 255);
      at[1] = static_cast<uint8_t>(word >> 8);
    }
  }
}

void pack_quantized_panel(const Job& job, int64_t panel) {
  const int64_t blocks = job.weight.k / kBlock, block_bytes = job.quantized.panel_bytes();
  uint8_t* to = job.packed + panel * blocks * block_bytes;
  std::memset(to, 0, static_cast<size_t>(blocks * block_bytes));
  for (int64_t column = 0; column < kQuantizedPanel; ++column) {
    const int64_t output = panel * kQuantizedPanel + column;
    if (output >= job.weight.n) break;
    const uint8_t* from = job.row(output);
    for (int64_t block = 0; block < blocks; ++block) {
      pack_quantized_block(job.quantized, from + block * job.quantized.file_bytes, column, to + block * block_bytes);
    }
  }
}

void pack_panel(int64_t panel, int32_t, void* argument) {
  const Job& job = *static_cast<const Job*>(argument);
  switch (job.weight.format) {
    case MIDSPAN_CPU_DENSE_FLOAT32:
      return pack_dense_panel<uint32_t>(job, panel);
    case MIDSPAN_CPU_DENSE_BFLOAT16:
    case MIDSPAN_CPU_DENSE_FLOAT16:
      return pack_dense_panel<uint16_t>(job, panel);
    case MIDSPAN_CPU_DENSE_PAIRS:
      return pack_pairs_panel(job, panel);
    case MIDSPAN_CPU_INT8_CHANNEL:
    case MIDSPAN_CPU_FP8_CHANNEL:
    case MIDSPAN_CPU_INT8_DYNAMIC:
      return pack_scaled_panel(job, panel);
    default:
      return pack_quantized_panel(job, panel);
  }
}

}  // namespace

int64_t packed_linear_bytes(const midspan_cpu_weight& weight) {
  if (weight.n <= 0 || weight.k <= 0) return 0;
  QuantizedFormat quantized;
  if (quantized_format(weight.format, quantized)) {
    if (weight.k % kBlock != 0) return 0;
    return (weight.n + kQuantizedPanel - 1) / kQuantizedPanel * (weight.k / kBlock) * quantized.panel_bytes();
  }
  const int64_t panels = (weight.n + kDensePanel - 1) / kDensePanel;
  if (is_scaled(weight.format)) return panels * scaled_panel_bytes(weight.format, weight.k);
  if (weight.format < MIDSPAN_CPU_DENSE_FLOAT32 || weight.format > MIDSPAN_CPU_DENSE_PAIRS) return 0;
  return panels * kDensePanel * filled(weight.format, weight.k) * element_bytes(weight.format);
}

int32_t pack_linear(Context& context, const midspan_cpu_weight& weight, void* packed) {
  if (packed_linear_bytes(weight) == 0) return MIDSPAN_CPU_UNSUPPORTED;
  Job job{weight, {}, static_cast<uint8_t*>(packed)};
  const int64_t width = quantized_format(weight.format, job.quantized) ? kQuantizedPanel : kDensePanel;
  run_tasks(context, (weight.n + width - 1) / width, 0, pack_panel, &job);
  return MIDSPAN_CPU_OK;
}

}  // namespace midspan
