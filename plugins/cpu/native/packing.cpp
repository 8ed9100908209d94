// Packing of linear weights into panels; the layouts are described where they are used, in
// kernels: linear.cpp, pair_linear.cpp, byte_linear.cpp and quantized_linear.cpp.
//
// Compiled for the oldest supported processor; packing happens once.
#include <cstring>
#include <limits>

#include "context.h"
#include "gguf_blocks.h"

namespace midspan {

namespace {

constexpr int64_t kDensePanel = 32;
constexpr int64_t kQuantizedPanel = 16;
constexpr int64_t kBlock = 32;

/// How quants and their numbers lie in a panel, see kernels/quantized_formats.h.
struct QuantizedFormat {
  bool nibbles;
  int64_t group_columns;
  int64_t group_bytes;  // of the numbers of a group
  int64_t block_bytes;  // of the numbers of a block

  int64_t tile_bytes() const { return nibbles ? 256 : 512; }
  int64_t group_size() const { return group_bytes + group_columns / kBlock * (block_bytes + tile_bytes()); }
};

/// False when the format has no quants, or k does not fit.
bool quantized_format(const midspan_cpu_weight& weight, QuantizedFormat& result) {
  switch (weight.format) {
    case MIDSPAN_CPU_GGUF_Q4_0:
      result = {true, 32, 0, 32};
      break;
    case MIDSPAN_CPU_GGUF_Q4_1:
      result = {true, 32, 0, 64};
      break;
    case MIDSPAN_CPU_GGUF_Q5_0:
    case MIDSPAN_CPU_GGUF_Q8_0:
      result = {false, 32, 0, 32};
      break;
    case MIDSPAN_CPU_GGUF_Q5_1:
      result = {false, 32, 0, 64};
      break;
    case MIDSPAN_CPU_GGUF_Q4_K:
      result = {true, 256, 64, 32};
      break;
    case MIDSPAN_CPU_GGUF_Q5_K:
      result = {false, 256, 64, 32};
      break;
    case MIDSPAN_CPU_GGUF_Q6_K:
      result = {false, 256, 32, 32};
      break;
    case MIDSPAN_CPU_INT4_GROUP:
      if (weight.group <= 0 || weight.group % kBlock != 0) return false;
      result = {true, weight.group, 80, 0};
      break;
    default:
      return false;
  }
  return weight.k % result.group_columns == 0;
}

bool has_quants(int32_t format) { return format == MIDSPAN_CPU_INT4_GROUP || gguf_layout(format).columns > 0; }

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

/// The quants of 32 columns of one output, to its words in the tiles of a block.
void pack_quants(const QuantizedFormat& format, const int8_t* quants, int64_t column, uint8_t* tiles) {
  const int64_t bits = format.nibbles ? 4 : 8;
  const int64_t columns_of_word = 16 / bits;
  const int64_t columns_of_tile = 2 * columns_of_word;
  for (int64_t tile = 0; tile < kBlock / columns_of_tile; ++tile) {
    for (int64_t half = 0; half < 2; ++half) {
      uint32_t word = 0;
      for (int64_t part = 0; part < columns_of_word; ++part) {
        const int8_t quant = quants[tile * columns_of_tile + 2 * part + half];
        word |= static_cast<uint32_t>(quant & (format.nibbles ? 15 : 255)) << (part * bits);
      }
      uint8_t* at = tiles + tile * 64 + (2 * column + half) * 2;
      at[0] = static_cast<uint8_t>(word & 255);
      at[1] = static_cast<uint8_t>(word >> 8);
    }
  }
}

/// The numbers of a run of a GGUF row, to one output's places in the group and the block.
void pack_numbers(int32_t format, const GgufRun& run, int64_t column, uint8_t* group, uint8_t* block) {
  const bool in_groups = gguf_layout(format).columns > kBlock;
  std::memcpy((in_groups ? group : block) + column * 2, &run.d, 2);
  if (format == MIDSPAN_CPU_GGUF_Q6_K) {
    block[column] = run.scales[0];
    block[kQuantizedPanel + column] = run.scales[1];
  } else if (in_groups) {
    std::memcpy(group + 32 + column * 2, &run.m, 2);
    block[column] = run.scales[0];
    block[kQuantizedPanel + column] = run.minimum;
  } else if (format == MIDSPAN_CPU_GGUF_Q4_1 || format == MIDSPAN_CPU_GGUF_Q5_1) {
    std::memcpy(block + 32 + column * 2, &run.m, 2);
  }
}

void pack_gguf_group(const Job& job, const uint8_t* row, int64_t group, int64_t column, uint8_t* to) {
  const QuantizedFormat& format = job.quantized;
  const int64_t runs = format.group_columns / kBlock;
  uint8_t* block = to + format.group_bytes;
  for (int64_t run = 0; run < runs; ++run, block += format.block_bytes + format.tile_bytes()) {
    GgufRun from;
    read_gguf_run(job.weight.format, row + group * gguf_layout(job.weight.format).bytes, run, from);
    pack_numbers(job.weight.format, from, column, to, block);
    pack_quants(format, from.quants, column, block + format.block_bytes);
  }
}

void pack_int4_group(const Job& job, int64_t output, int64_t group, int64_t column, uint8_t* to) {
  const QuantizedFormat& format = job.quantized;
  const int64_t groups = job.weight.k / format.group_columns;
  std::memcpy(to + column * 4, job.weight.scales + output * groups + group, 4);
  to[kQuantizedPanel * 4 + column] = job.weight.zeros[output * groups + group];
  const uint8_t* packed = job.row(output) + group * format.group_columns / 2;
  uint8_t* tiles = to + format.group_bytes;
  for (int64_t block = 0; block < format.group_columns / kBlock; ++block, packed += 16, tiles += format.tile_bytes()) {
    int8_t quants[kBlock];
    for (int64_t index = 0; index < kBlock; ++index) {
      quants[index] = static_cast<int8_t>(packed[index / 2] >> (index % 2 * 4) & 15);
    }
    pack_quants(format, quants, column, tiles);
  }
}

void pack_quantized_panel(const Job& job, int64_t panel) {
  const int64_t groups = job.weight.k / job.quantized.group_columns, group_size = job.quantized.group_size();
  uint8_t* to = job.packed + panel * groups * group_size;
  std::memset(to, 0, static_cast<size_t>(groups * group_size));
  for (int64_t column = 0; column < kQuantizedPanel; ++column) {
    const int64_t output = panel * kQuantizedPanel + column;
    if (output >= job.weight.n) break;
    for (int64_t group = 0; group < groups; ++group) {
      if (job.weight.format == MIDSPAN_CPU_INT4_GROUP) {
        pack_int4_group(job, output, group, column, to + group * group_size);
      } else {
        pack_gguf_group(job, job.row(output), group, column, to + group * group_size);
      }
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
  if (has_quants(weight.format)) {
    QuantizedFormat format;
    if (!quantized_format(weight, format)) return 0;
    const int64_t panels = (weight.n + kQuantizedPanel - 1) / kQuantizedPanel;
    return panels * (weight.k / format.group_columns) * format.group_size();
  }
  const int64_t panels = (weight.n + kDensePanel - 1) / kDensePanel;
  if (is_scaled(weight.format)) return panels * scaled_panel_bytes(weight.format, weight.k);
  if (weight.format < MIDSPAN_CPU_DENSE_FLOAT32 || weight.format > MIDSPAN_CPU_DENSE_PAIRS) return 0;
  return panels * kDensePanel * filled(weight.format, weight.k) * element_bytes(weight.format);
}

int32_t pack_linear(Context& context, const midspan_cpu_weight& weight, void* packed) {
  if (packed_linear_bytes(weight) == 0) return MIDSPAN_CPU_UNSUPPORTED;
  Job job{weight, {}, static_cast<uint8_t*>(packed)};
  const int64_t width = quantized_format(weight, job.quantized) ? kQuantizedPanel : kDensePanel;
  run_tasks(context, (weight.n + width - 1) / width, 0, pack_panel, &job);
  return MIDSPAN_CPU_OK;
}

}  // namespace midspan
