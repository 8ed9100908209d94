// Linear layers with weights of small integers in groups: GGUF formats, and 4-bit groups (GPTQ, AWQ).
//
// One numerical scheme for every number of rows. Each run of 32 inputs becomes 16-bit integers and a scale; the
// integer products with the quants are summed exactly; then, run after run in the order of k,
//     sum += (d * scale) * products   and, where the format has minimums,   sum += m * (scale * sum of the integers)
// in float32. So the bits of a row do not depend on the other rows, and the only deviation from float32
// arithmetic on unpacked weights is the rounding of inputs, 2^-16 of the largest of 32. (8-bit inputs would be
// 2^-8, and no faster where a 16-bit multiply-add is as fast as an 8-bit one.)
//
// Packed weight: panels of 16 outputs, each [k / group] groups of: numbers of the group; then for each 32 columns:
// numbers of the block; then tiles of 64 bytes, 32 little-endian words of 16 bits. In a tile of 4-bit quants, word 2c + i
// holds those of output c at k = i, 2 + i, 4 + i, 6 + i from the lowest bits up (i = 0, 1; 8 columns of k a tile); of
// 8-bit quants, those at k = i, 2 + i (4 columns). One shift and mask give pairs of neighbouring k for add_products.
// The numbers stand in quantized_formats.h.
#include "panels.h"
#include "parallel.h"
#include "quantized_formats.h"

namespace midspan::MIDSPAN_ISA {

namespace {

constexpr int kVectors = kQuantizedPanel / kLanes;
constexpr int kBlock = 32;
constexpr int kMaxRows = kLanes == 16 ? 8 : kLanes == 8 ? 4 : 2;
constexpr int kRowsOfBlock = 64;

/// Inputs of all rows, rounded.
struct QuantizedInputs {
  int16_t* quants;  // [rows][k]
  float* scales;    // [rows][k / 32]
  float* sums;      // [rows][k / 32]: of the integers, times the scale
  int32_t* totals;  // [rows][k / 32]: of the integers
};

template <class T>
MIDSPAN_INLINE void quantize_block(const T* from, int16_t* quants, float& scale, float& sum, int32_t& total) {
  Floats values[kBlock / kLanes];
  Floats largest = {}, poison = {};
  for (int part = 0; part < kBlock / kLanes; ++part) {
    values[part] = load(from + part * kLanes);
    largest = larger(bits_as<Floats>(bits_as<Words>(values[part]) & 0x7fffffffu), largest);
    poison += values[part] * splat(0.0f);  // NaN when a value is infinite or NaN
  }
  const float maximum = largest_of(largest);
  const bool tiny = !(maximum > 1e-30f);
  const float inverse = tiny ? 0.0f : 32767.0f / maximum;
  scale = (tiny ? 0.0f : maximum / 32767.0f) + sum_of(poison);
  if (scale != scale) {  // integers cannot say this; the scale does
    for (int index = 0; index < kBlock; ++index) quants[index] = 0;
    total = 0;
    sum = scale;
    return;
  }
  Ints totals = {};
  for (int part = 0; part < kBlock / kLanes; ++part) {
    const Ints rounded = __builtin_convertvector(round_to_integer(values[part] * splat(inverse)), Ints);
    store_as(quants + part * kLanes, narrow(bits_as<Words>(rounded)));
    totals += rounded;
  }
  total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += totals[lane];
  sum = scale * static_cast<float>(total);
}

template <class T>
MIDSPAN_INLINE void quantize_inputs(Context& context, const T* x, int64_t x_stride, int64_t rows, int64_t k,
                                    const int32_t* order, const QuantizedInputs& to) {
  const int64_t blocks = k / kBlock;
  auto quantize = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t at = row * blocks + block;
        const T* from = x + row * x_stride;
        T picked[kBlock];
        if (order == nullptr) {
          from += block * kBlock;
        } else {
          for (int index = 0; index < kBlock; ++index) picked[index] = from[order[block * kBlock + index]];
          from = picked;
        }
        quantize_block(from, to.quants + at * kBlock, to.scales[at], to.sums[at], to.totals[at]);
      }
    }
  };
  for_row_parts(context, rows, k, quantize);
}

template <class Format, int rows, int pair>
MIDSPAN_INLINE void add_pairs(const UnsignedShorts* words, const int16_t* const* x, int64_t column,
                              Ints (&products)[rows][kVectors]) {
  if constexpr (pair < Format::Quants::pairs) {
    Shorts weights[kVectors];
    for (int v = 0; v < kVectors; ++v) weights[v] = Format::Quants::template unpack<pair>(words[v]);
    for (int row = 0; row < rows; ++row) {
      const Shorts input = splat_pair(x[row] + column + 2 * pair);
      for (int v = 0; v < kVectors; ++v) products[row][v] = add_products(products[row][v], weights[v], input);
    }
    add_pairs<Format, rows, pair + 1>(words, x, column, products);
  }
}

/// One panel times rows [first, first + rows), to sums [rows][16]. A group has so many blocks.
template <class Format, int rows>
void multiply_tile(const QuantizedInputs& inputs, int64_t first, const uint8_t* panel, int64_t blocks,
                   int64_t group_blocks, float* sums) {
  constexpr int tiles = Format::Quants::tiles / Format::parts;  // of a part of a block, which has numbers of its own
  Floats result[rows][kVectors] = {};
  const int16_t* x[rows];
  for (int row = 0; row < rows; ++row) x[row] = inputs.quants + (first + row) * blocks * kBlock;
  for (int64_t block = 0; block < blocks;) {
    const uint8_t* group = panel;
    panel += Format::group_bytes;
    for (const int64_t end = block + group_blocks; block < end; ++block) {
      const uint8_t* numbers = panel;
      panel += Format::block_bytes;
      for (int part = 0; part < Format::parts; ++part) {
        Ints products[rows][kVectors] = {};
        for (int tile = 0; tile < tiles; ++tile, panel += 64) {
          UnsignedShorts words[kVectors];
          for (int v = 0; v < kVectors; ++v) words[v] = load_as<UnsignedShorts>(panel + v * kLanes * 4);
          add_pairs<Format, rows, 0>(words, x, block * kBlock + (part * tiles + tile) * 2 * Format::Quants::pairs,
                                     products);
        }
        for (int v = 0; v < kVectors; ++v) {
          const Numbers at = Format::numbers(group, numbers, part, v * kLanes);
          for (int row = 0; row < rows; ++row) {
            const int64_t place = (first + row) * blocks + block;
            Ints exact = products[row][v];
            if constexpr (Format::has_zero) exact -= at.zero * splat(inputs.totals[place]);
            result[row][v] = multiply_add(at.d * splat(inputs.scales[place]), to_floats(exact), result[row][v]);
            if constexpr (Format::has_minimum) {
              result[row][v] = multiply_add(at.m, splat(inputs.sums[place]), result[row][v]);
            }
          }
        }
      }
    }
  }
  for (int row = 0; row < rows; ++row) {
    for (int v = 0; v < kVectors; ++v) store(sums + row * kQuantizedPanel + v * kLanes, result[row][v]);
  }
}

template <class Format>
MIDSPAN_INLINE void multiply_rows(const QuantizedInputs& inputs, int64_t first, int64_t rows, const uint8_t* panel,
                                  int64_t blocks, int64_t group_blocks, float* sums) {
  using Tile = void (*)(const QuantizedInputs&, int64_t, const uint8_t*, int64_t, int64_t, float*);
#if defined(__AVX512F__)
  static constexpr Tile by_rows[] = {multiply_tile<Format, 1>, multiply_tile<Format, 2>, multiply_tile<Format, 3>,
                                     multiply_tile<Format, 4>, multiply_tile<Format, 5>, multiply_tile<Format, 6>,
                                     multiply_tile<Format, 7>, multiply_tile<Format, 8>};
#elif defined(__AVX2__)
  static constexpr Tile by_rows[] = {multiply_tile<Format, 1>, multiply_tile<Format, 2>, multiply_tile<Format, 3>,
                                     multiply_tile<Format, 4>};
#else
  static constexpr Tile by_rows[] = {multiply_tile<Format, 1>, multiply_tile<Format, 2>};
#endif
  by_rows[rows - 1](inputs, first, panel, blocks, group_blocks, sums);
}

template <class Format>
int32_t run(Context& context, const midspan_cpu_linear& linear, const void* x, int64_t x_stride, int64_t rows, void* y,
            int64_t y_stride) {
  const int64_t k = linear.k, blocks = k / kBlock;
  const int64_t quant_bytes = (rows * k * 2 + 63) / 64 * 64, row_bytes = (rows * blocks * 4 + 63) / 64 * 64;
  uint8_t* memory = static_cast<uint8_t*>(scratch_memory(context, SCRATCH_INPUTS, quant_bytes + 3 * row_bytes));
  if (memory == nullptr) return MIDSPAN_CPU_OUT_OF_MEMORY;
  const QuantizedInputs inputs = {reinterpret_cast<int16_t*>(memory), reinterpret_cast<float*>(memory + quant_bytes),
                                  reinterpret_cast<float*>(memory + quant_bytes + row_bytes),
                                  reinterpret_cast<int32_t*>(memory + quant_bytes + 2 * row_bytes)};
  const int32_t result = with_type(linear.input_type, [&](auto element) {
    using T = decltype(element);
    quantize_inputs(context, static_cast<const T*>(x), x_stride, rows, k, linear.order, inputs);
    return MIDSPAN_CPU_OK;
  });
  if (result != MIDSPAN_CPU_OK) return result;

  const int64_t group_blocks = Format::group_blocks > 0 ? Format::group_blocks : linear.group / kBlock;
  const int64_t panel_bytes = quantized_panel_bytes<Format>(blocks, group_blocks);
  const int64_t panels = (linear.n + kQuantizedPanel - 1) / kQuantizedPanel;
  const int64_t row_blocks = (rows + kRowsOfBlock - 1) / kRowsOfBlock;
  const uint8_t* packed = static_cast<const uint8_t*>(linear.packed);
  auto multiply = [&](int64_t task, int32_t) {
    const int64_t panel = task % panels, row_begin = task / panels * kRowsOfBlock;
    const int64_t row_end = row_begin + kRowsOfBlock < rows ? row_begin + kRowsOfBlock : rows;
    const uint8_t* weight = packed + panel * panel_bytes;
    alignas(64) float sums[kRowsOfBlock * kQuantizedPanel];
    for (int64_t row = row_begin; row < row_end; row += kMaxRows) {
      const int64_t height = row_end - row < kMaxRows ? row_end - row : kMaxRows;
      multiply_rows<Format>(inputs, row, height, weight, blocks, group_blocks, sums + (row - row_begin) * kQuantizedPanel);
    }
    store_panel(linear, sums, kQuantizedPanel, panel * kQuantizedPanel, kQuantizedPanel, row_begin, row_end, y, y_stride);
  };
  for_each_task(context, panels * row_blocks, 0, multiply);
  return MIDSPAN_CPU_OK;
}

}  // namespace

int32_t run_quantized_linear(Context& context, const midspan_cpu_linear& linear, const void* x, int64_t x_stride,
                             int64_t rows, void* y, int64_t y_stride) {
  if (rows <= 0) return MIDSPAN_CPU_OK;
  if (linear.k % kBlock != 0) return MIDSPAN_CPU_UNSUPPORTED;
  if (linear.output_type != linear.input_type && linear.output_type != MIDSPAN_CPU_FLOAT32) {
    return MIDSPAN_CPU_UNSUPPORTED;
  }
  switch (linear.format) {
    case MIDSPAN_CPU_GGUF_Q4_0:
      return run<FormatQ4_0>(context, linear, x, x_stride, rows, y, y_stride);
    case MIDSPAN_CPU_GGUF_Q4_1:
      return run<FormatQ4_1>(context, linear, x, x_stride, rows, y, y_stride);
    case MIDSPAN_CPU_GGUF_Q5_0:  // packed alike
    case MIDSPAN_CPU_GGUF_Q8_0:
      return run<FormatQ8_0>(context, linear, x, x_stride, rows, y, y_stride);
    case MIDSPAN_CPU_GGUF_Q5_1:
      return run<FormatQ5_1>(context, linear, x, x_stride, rows, y, y_stride);
    case MIDSPAN_CPU_GGUF_Q4_K:
      return run<FormatK<Nibbles>>(context, linear, x, x_stride, rows, y, y_stride);
    case MIDSPAN_CPU_GGUF_Q5_K:
      return run<FormatK<Bytes>>(context, linear, x, x_stride, rows, y, y_stride);
    case MIDSPAN_CPU_GGUF_Q6_K:
      return run<FormatQ6_K>(context, linear, x, x_stride, rows, y, y_stride);
    case MIDSPAN_CPU_INT4_GROUP:
      if (linear.group <= 0 || linear.group % kBlock != 0 || linear.k % linear.group != 0) {
        return MIDSPAN_CPU_UNSUPPORTED;
      }
      return run<FormatInt4>(context, linear, x, x_stride, rows, y, y_stride);
    default:
      return MIDSPAN_CPU_UNSUPPORTED;
  }
}

}  // namespace midspan::MIDSPAN_ISA
