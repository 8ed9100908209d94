// Packing of linear weights into panels; the layouts are described where they are used, in
// kernels/linear.cpp and kernels/quantized_linear.cpp.
//
// Compiled for the oldest supported processor; packing happens once.
#include <cstring>

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

int64_t element_bytes(int32_t format) { return format == MIDSPAN_CPU_DENSE_FLOAT32 ? 4 : 2; }

struct Job {
  int32_t format;
  QuantizedFormat quantized;
  const uint8_t* source;
  int64_t source_row_bytes;
  int64_t n;
  int64_t k;
  uint8_t* packed;
};

template <class T>
void pack_dense_panel(const Job& job, int64_t panel) {
  T* to = reinterpret_cast<T*>(job.packed) + panel * job.k * kDensePanel;
  for (int64_t column = 0; column < kDensePanel; ++column) {
    const int64_t place = job.format != MIDSPAN_CPU_DENSE_BFLOAT16 ? column
                          : column < 16                            ? 2 * column
                                                                   : 2 * (column - 16) + 1;
    const int64_t output = panel * kDensePanel + column;
    if (output >= job.n) {
      for (int64_t index = 0; index < job.k; ++index) to[index * kDensePanel + place] = 0;
      continue;
    }
    const uint8_t* from = job.source + output * job.source_row_bytes;
    for (int64_t index = 0; index < job.k; ++index) {
      std::memcpy(&to[index * kDensePanel + place], from + index * int64_t{sizeof(T)}, sizeof(T));
    }
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
  const int64_t blocks = job.k / kBlock, block_bytes = job.quantized.panel_bytes();
  uint8_t* to = job.packed + panel * blocks * block_bytes;
  std::memset(to, 0, static_cast<size_t>(blocks * block_bytes));
  for (int64_t column = 0; column < kQuantizedPanel; ++column) {
    const int64_t output = panel * kQuantizedPanel + column;
    if (output >= job.n) break;
    const uint8_t* from = job.source + output * job.source_row_bytes;
    for (int64_t block = 0; block < blocks; ++block) {
      pack_quantized_block(job.quantized, from + block * job.quantized.file_bytes, column, to + block * block_bytes);
    }
  }
}

void pack_panel(int64_t panel, int32_t, void* argument) {
  const Job& job = *static_cast<const Job*>(argument);
  switch (job.format) {
    case MIDSPAN_CPU_DENSE_FLOAT32:
      return pack_dense_panel<uint32_t>(job, panel);
    case MIDSPAN_CPU_DENSE_BFLOAT16:
    case MIDSPAN_CPU_DENSE_FLOAT16:
      return pack_dense_panel<uint16_t>(job, panel);
    default:
      return pack_quantized_panel(job, panel);
  }
}

}  // namespace

int64_t packed_linear_bytes(int32_t format, int64_t n, int64_t k) {
  if (n <= 0 || k <= 0) return 0;
  QuantizedFormat quantized;
  if (quantized_format(format, quantized)) {
    if (k % kBlock != 0) return 0;
    return (n + kQuantizedPanel - 1) / kQuantizedPanel * (k / kBlock) * quantized.panel_bytes();
  }
  if (format < MIDSPAN_CPU_DENSE_FLOAT32 || format > MIDSPAN_CPU_DENSE_FLOAT16) return 0;
  return (n + kDensePanel - 1) / kDensePanel * kDensePanel * k * element_bytes(format);
}

int32_t pack_linear(Context& context, int32_t format, const void* source, int64_t source_row_bytes, int64_t n,
                    int64_t k, void* packed) {
  if (packed_linear_bytes(format, n, k) == 0) return MIDSPAN_CPU_UNSUPPORTED;
  Job job{format, {}, static_cast<const uint8_t*>(source), source_row_bytes, n, k, static_cast<uint8_t*>(packed)};
  const int64_t width = quantized_format(format, job.quantized) ? kQuantizedPanel : kDensePanel;
  run_tasks(context, (n + width - 1) / width, 0, pack_panel, &job);
  return MIDSPAN_CPU_OK;
}

}  // namespace midspan
