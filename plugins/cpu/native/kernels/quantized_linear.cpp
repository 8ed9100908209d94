// Linear layers with GGUF weights: Q4_0, Q4_1, Q8_0.
//
// One numerical scheme for every number of rows. Each run of 32 inputs becomes 16-bit integers and a scale; the
// integer products with the quants are summed exactly; then, block after block in the order of k,
//     sum += (d * scale) * products   and, for Q4_1,   sum += m * (scale * sum of the integers)
// in float32. So the bits of a row do not depend on the other rows, and the only deviation from float32
// arithmetic on unpacked weights is the rounding of inputs, 2^-16 of the largest of 32. (8-bit inputs would be
// 2^-8, and no faster where a 16-bit multiply-add is as fast as an 8-bit one.)
//
// Packed weight: panels of 16 outputs, each [k / 32] blocks of: 16 fp16 d; for Q4_1 16 fp16 m; then tiles
// of 64 bytes, 32 little-endian words of 16 bits. In a tile of 4-bit quants, word 2c + i holds those of output c at
// k = i, 2 + i, 4 + i, 6 + i from the lowest bits up (i = 0, 1; 8 columns of k a tile); of 8-bit quants, those
// at k = i, 2 + i (4 columns). One shift and mask give pairs of neighbouring k for add_products.
#include "panels.h"
#include "parallel.h"

namespace midspan::MIDSPAN_ISA {

namespace {

constexpr int kPanel = 16;
constexpr int kVectors = kPanel / kLanes;
constexpr int kBlock = 32;
constexpr int kMaxRows = kLanes == 16 ? 8 : kLanes == 8 ? 4 : 2;
constexpr int kRowsOfBlock = 64;

/// 4-bit quants; `offset` is subtracted from each, `has_minimum` says that the panel holds m.
template <int subtracted, bool with_minimum>
struct Nibbles {
  static constexpr int offset = subtracted;
  static constexpr bool has_minimum = with_minimum;
  static constexpr int tiles = 4;
  static constexpr int pairs = 4;  // of k, in a tile

  template <int pair>
  MIDSPAN_INLINE Shorts unpack(UnsignedShorts words) {
    const UnsignedShorts shifted = words >> (4 * pair);
    return bits_as<Shorts>(pair == 3 ? shifted : shifted & 15);
  }
};

struct Bytes {
  static constexpr int offset = 0;
  static constexpr bool has_minimum = false;
  static constexpr int tiles = 8;
  static constexpr int pairs = 2;

  template <int pair>
  MIDSPAN_INLINE Shorts unpack(UnsignedShorts words) {
    const Shorts high_byte = bits_as<Shorts>(pair == 0 ? words << 8 : words);
    return high_byte >> 8;
  }
};

template <class Format>
constexpr int64_t block_bytes() {
  return kPanel * 2 * (Format::has_minimum ? 2 : 1) + Format::tiles * 64;
}

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
                                    const QuantizedInputs& to) {
  const int64_t blocks = k / kBlock;
  auto quantize = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t at = row * blocks + block;
        quantize_block(x + row * x_stride + block * kBlock, to.quants + at * kBlock, to.scales[at], to.sums[at],
                       to.totals[at]);
      }
    }
  };
  for_row_parts(context, rows, k, quantize);
}

template <class Format, int rows, int pair>
MIDSPAN_INLINE void add_pairs(const UnsignedShorts* words, const int16_t* const* x, int64_t column,
                              Ints (&products)[rows][kVectors]) {
  if constexpr (pair < Format::pairs) {
    Shorts weights[kVectors];
    for (int v = 0; v < kVectors; ++v) weights[v] = Format::template unpack<pair>(words[v]);
    for (int row = 0; row < rows; ++row) {
      const Shorts input = splat_pair(x[row] + column + 2 * pair);
      for (int v = 0; v < kVectors; ++v) products[row][v] = add_products(products[row][v], weights[v], input);
    }
    add_pairs<Format, rows, pair + 1>(words, x, column, products);
  }
}

/// One panel times rows [first, first + rows), to sums [rows][16].
template <class Format, int rows>
void multiply_tile(const QuantizedInputs& inputs, int64_t first, const uint8_t* panel, int64_t blocks, float* sums) {
  Floats result[rows][kVectors] = {};
  const int16_t* x[rows];
  for (int row = 0; row < rows; ++row) x[row] = inputs.quants + (first + row) * blocks * kBlock;
  for (int64_t block = 0; block < blocks; ++block, panel += block_bytes<Format>()) {
    const Float16* scales = reinterpret_cast<const Float16*>(panel);
    const uint8_t* tiles = panel + kPanel * 2 * (Format::has_minimum ? 2 : 1);
    Ints products[rows][kVectors] = {};
    for (int tile = 0; tile < Format::tiles; ++tile) {
      UnsignedShorts words[kVectors];
      for (int v = 0; v < kVectors; ++v) words[v] = load_as<UnsignedShorts>(tiles + tile * 64 + v * kLanes * 4);
      add_pairs<Format, rows, 0>(words, x, block * kBlock + tile * 2 * Format::pairs, products);
    }
    for (int v = 0; v < kVectors; ++v) {
      const Floats d = load(scales + v * kLanes);
      const Floats m = Format::has_minimum ? load(scales + kPanel + v * kLanes) : Floats{};
      for (int row = 0; row < rows; ++row) {
        const int64_t at = (first + row) * blocks + block;
        Ints exact = products[row][v];
        if constexpr (Format::offset != 0) exact -= splat(Format::offset * inputs.totals[at]);
        result[row][v] = multiply_add(d * splat(inputs.scales[at]), to_floats(exact), result[row][v]);
        if constexpr (Format::has_minimum) result[row][v] = multiply_add(m, splat(inputs.sums[at]), result[row][v]);
      }
    }
  }
  for (int row = 0; row < rows; ++row) {
    for (int v = 0; v < kVectors; ++v) store(sums + row * kPanel + v * kLanes, result[row][v]);
  }
}

template <class Format>
MIDSPAN_INLINE void multiply_rows(const QuantizedInputs& inputs, int64_t first, int64_t rows, const uint8_t* panel,
                                  int64_t blocks, float* sums) {
  using Tile = void (*)(const QuantizedInputs&, int64_t, const uint8_t*, int64_t, float*);
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
  by_rows[rows - 1](inputs, first, panel, blocks, sums);
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
    quantize_inputs(context, static_cast<const T*>(x), x_stride, rows, k, inputs);
    return MIDSPAN_CPU_OK;
  });
  if (result != MIDSPAN_CPU_OK) return result;

  const int64_t panels = (linear.n + kPanel - 1) / kPanel;
  const int64_t row_blocks = (rows + kRowsOfBlock - 1) / kRowsOfBlock;
  const uint8_t* packed = static_cast<const uint8_t*>(linear.packed);
  auto multiply = [&](int64_t task, int32_t) {
    const int64_t panel = task % panels, row_begin = task / panels * kRowsOfBlock;
    const int64_t row_end = row_begin + kRowsOfBlock < rows ? row_begin + kRowsOfBlock : rows;
    const uint8_t* weight = packed + panel * blocks * block_bytes<Format>();
    alignas(64) float sums[kRowsOfBlock * kPanel];
    for (int64_t row = row_begin; row < row_end; row += kMaxRows) {
      const int64_t height = row_end - row < kMaxRows ? row_end - row : kMaxRows;
      multiply_rows<Format>(inputs, row, height, weight, blocks, sums + (row - row_begin) * kPanel);
    }
    store_panel(linear, sums, kPanel, panel * kPanel, kPanel, row_begin, row_end, y, y_stride);
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
      return run<Nibbles<8, false>>(context, linear, x, x_stride, rows, y, y_stride);
    case MIDSPAN_CPU_GGUF_Q4_1:
      return run<Nibbles<0, true>>(context, linear, x, x_stride, rows, y, y_stride);
    case MIDSPAN_CPU_GGUF_Q8_0:
      return run<Bytes>(context, linear, x, x_stride, rows, y, y_stride);
    default:
      return MIDSPAN_CPU_UNSUPPORTED;
  }
}

}  // namespace midspan::MIDSPAN_ISA
