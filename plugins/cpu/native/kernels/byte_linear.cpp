// Linear layers of 8-bit weights and 8-bit inputs (W8A8).
//
// Each row of inputs becomes integers in [-127, 127] and a scale, largest magnitude / 127; the products are summed
// exactly, and y = float(sum) * input scale * weight scale. So all instruction sets and numbers of rows give the same
// sums, and the bits of a row do not depend on the other rows.
//
// Packed weight: panels of 32 outputs, each [k / 4][32][4] int8, k filled up with zeros to a multiple of 64; then 32
// float32 scales and 32 int32: the sums of each output's integers times 128. The integers are also the layout of two
// tiles side by side, sixteen runs of four high.
#include "matrix_tiles.h"
#include "panels.h"
#include "parallel.h"
#include "row_tiles.h"

namespace midspan::MIDSPAN_ISA {

namespace {

constexpr int kPanel = 32;
constexpr int64_t kStep = 64;  // of k: what k is filled up to
constexpr int64_t kRowBytes = kPanel * 4;
constexpr int64_t kRowsOfBlock = 96;  // rows whose inputs stay in the second-level cache

int64_t filled(int64_t k) { return (k + kStep - 1) / kStep * kStep; }
int64_t panel_bytes(int64_t k) { return filled(k) * kPanel + kPanel * 8; }

/// Rows as integers, `size` rounded up to kStep with zeros.
template <class T>
MIDSPAN_INLINE void round_row(const T* from, int64_t size, int8_t* quants, float& scale) {
  Floats largest = {}, poison = {};
  int64_t index = 0;
  for (; index + kLanes <= size; index += kLanes) {
    const Floats value = load(from + index);
    largest = larger(bits_as<Floats>(bits_as<Words>(value) & 0x7fffffffu), largest);
    poison += value * splat(0.0f);  // NaN when a value is infinite or NaN
  }
  const Floats rest = load_some(from + index, size - index);
  largest = larger(bits_as<Floats>(bits_as<Words>(rest) & 0x7fffffffu), largest);
  poison += rest * splat(0.0f);
  scale = largest_of(largest) / 127.0f + sum_of(poison);
  memset(quants, 0, static_cast<size_t>(filled(size)));
  if (!(scale > 0.0f)) return;  // all are zero; or integers cannot say it, and the scale does
  const auto store_rounded = [&](Floats value, int64_t at, int64_t count) {
    const Ints rounded = __builtin_convertvector(round_to_integer(value / splat(scale)), Ints);
    for (int64_t lane = 0; lane < count; ++lane) quants[at + lane] = static_cast<int8_t>(rounded[lane]);
  };
#if defined(__AVX512F__)
  for (index = 0; index + kLanes <= size; index += kLanes) {
    const Floats value = round_to_integer(load(from + index) / splat(scale));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(quants + index), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(value)));
  }
#else
  for (index = 0; index + kLanes <= size; index += kLanes) store_rounded(load(from + index), index, kLanes);
#endif
  store_rounded(rest, index, size - index);
}

#if defined(MIDSPAN_HAS_TILES)

constexpr bool kHasExcess = false;
constexpr int64_t kArrangedBytes = 0;  // of four inputs: rows are read as they are
using Arranged = uint8_t;

/// sums [rows, 32] = inputs * a panel.
void multiply_block(const int8_t* quants, const Arranged*, int64_t rows, int64_t k, const uint8_t* panel, int32_t* sums) {
  Tiles tiles;
  for_tile_rows(tiles, 0, rows, [&](int64_t row, int, TileShape shape) {
    multiply_tiles(tiles, shape, reinterpret_cast<const uint8_t*>(quants) + row * filled(k), filled(k), panel,
                   filled(k) / kStep, sums + row * kPanel);
  });
}

MIDSPAN_INLINE void arrange_inputs(Context&, const int8_t*, int64_t, int64_t, Arranged*) {}

#else

#if defined(__AVX512VNNI__)

constexpr int kMaxRows = 12;
constexpr bool kHasExcess = true;

/// Four inputs, 128 added to each: the instruction takes one operand without sign.
using Four = uint32_t;
using Weights = Words;

MIDSPAN_INLINE Four four(const int8_t* quants) { return load_as<uint32_t>(quants) ^ 0x80808080u; }
MIDSPAN_INLINE Weights unpack(Words words) { return words; }
MIDSPAN_INLINE Ints add_products_of_four(Ints sum, Four input, Weights weights) {
  return bits_as<Ints>(_mm512_dpbusd_epi32(bits_as<__m512i>(sum), _mm512_set1_epi32(static_cast<int>(input)),
                                           bits_as<__m512i>(weights)));
}

#else

constexpr int kMaxRows = kLanes == 16 ? 8 : kLanes == 8 ? 4 : 2;
constexpr bool kHasExcess = false;

/// Four inputs as 16-bit integers: the first and third, the second and fourth.
struct Four {
  int16_t even[2];
  int16_t odd[2];
};
struct Weights {
  Shorts even;
  Shorts odd;
};

MIDSPAN_INLINE Four four(const int8_t* quants) { return {{quants[0], quants[2]}, {quants[1], quants[3]}}; }
MIDSPAN_INLINE Weights unpack(Words words) {
  return {bits_as<Shorts>(bits_as<UnsignedShorts>(words) << 8) >> 8, bits_as<Shorts>(words) >> 8};
}
MIDSPAN_INLINE Ints add_products_of_four(Ints sum, const Four& input, const Weights& weights) {
  sum = add_products(sum, weights.even, splat_pair(input.even));
  return add_products(sum, weights.odd, splat_pair(input.odd));
}

#endif

constexpr int64_t kArrangedBytes = sizeof(Four);
using Arranged = Four;
constexpr int kVectors = 2;      // at once, of a panel
constexpr int64_t kPiece = 128;  // runs of four k: half of a first-level cache

/// Adds a piece of k to `sums` [rows][32]. `x` is [fours][rows].
template <int rows>
void multiply_tile(const Four* x, const uint8_t* panel, int64_t fours, int32_t* sums, bool first) {
  for (int v0 = 0; v0 < kPanel / kLanes; v0 += kVectors) {
    Ints sum[rows][kVectors];
    for (int row = 0; row < rows; ++row) {
      for (int v = 0; v < kVectors; ++v) {
        sum[row][v] = first ? Ints{} : load_as<Ints>(sums + row * kPanel + (v0 + v) * kLanes);
      }
    }
    const uint8_t* at = panel + v0 * kLanes * 4;
    for (int64_t index = 0; index < fours; ++index, at += kRowBytes) {
      if (v0 == 0) {
        __builtin_prefetch(at + kPiece * kRowBytes);
        __builtin_prefetch(at + kPiece * kRowBytes + 64);
      }
      for (int v = 0; v < kVectors; ++v) {
        const Weights weights = unpack(load_as<Words>(at + v * kLanes * 4));
        for (int row = 0; row < rows; ++row) {
          sum[row][v] = add_products_of_four(sum[row][v], x[index * rows + row], weights);
        }
      }
    }
    for (int row = 0; row < rows; ++row) {
      for (int v = 0; v < kVectors; ++v) store_as(sums + row * kPanel + (v0 + v) * kLanes, sum[row][v]);
    }
  }
}

using MultiplyTile = void (*)(const Four*, const uint8_t*, int64_t, int32_t*, bool);

template <int... index>
struct TileTable {
  static constexpr MultiplyTile by_rows[] = {multiply_tile<index + 1>...};
};

MIDSPAN_INLINE MultiplyTile tile_for(int64_t rows) {
#if defined(__AVX512VNNI__)
  return TileTable<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11>::by_rows[rows - 1];
#elif defined(__AVX512F__)
  return TileTable<0, 1, 2, 3, 4, 5, 6, 7>::by_rows[rows - 1];
#elif defined(__AVX2__)
  return TileTable<0, 1, 2, 3>::by_rows[rows - 1];
#else
  return TileTable<0, 1>::by_rows[rows - 1];
#endif
}

/// The rows of a block in the order in which tiles read them: for each tile [filled k / 4][rows of the tile].
void arrange_inputs(Context& context, const int8_t* quants, int64_t rows, int64_t k, Four* arranged) {
  const int64_t fours = filled(k) / 4, blocks = (rows + kRowsOfBlock - 1) / kRowsOfBlock;
  auto arrange = [&](int64_t block, int32_t) {
    const int64_t first = block * kRowsOfBlock;
    const RowTiles<kMaxRows> tiles(rows - first < kRowsOfBlock ? rows - first : kRowsOfBlock);
    for (int64_t tile = 0; tile < tiles.tiles; ++tile) {
      const int64_t begin = first + tiles.begin(tile), height = tiles.begin(tile + 1) - tiles.begin(tile);
      Four* to = arranged + begin * fours;
      for (int64_t row = 0; row < height; ++row) {
        const int8_t* from = quants + (begin + row) * filled(k);
        for (int64_t index = 0; index < fours; ++index) to[index * height + row] = four(from + 4 * index);
      }
    }
  };
  for_each_task(context, blocks, 1, arrange);
}

/// sums [rows, 32] = inputs * a panel.
void multiply_block(const int8_t*, const Four* arranged, int64_t rows, int64_t k, const uint8_t* panel, int32_t* sums) {
  const RowTiles<kMaxRows> tiles(rows);
  const int64_t fours = filled(k) / 4;
  for (int64_t at = 0; at < fours; at += kPiece) {
    const int64_t count = fours - at < kPiece ? fours - at : kPiece;
    for (int64_t tile = 0; tile < tiles.tiles; ++tile) {
      const int64_t begin = tiles.begin(tile), height = tiles.begin(tile + 1) - begin;
      tile_for(height)(arranged + begin * fours + at * height, panel + at * kRowBytes, count, sums + begin * kPanel,
                       at == 0);
    }
  }
}

#endif

/// Outputs of a panel for `rows` rows, from sums [rows][32] and the numbers behind the panel's integers.
void store_sums(const midspan_cpu_linear& linear, const int32_t* sums, const uint8_t* numbers, const float* scales,
                int64_t panel, int64_t begin, int64_t end, void* y, int64_t y_stride) {
  const float* weight_scales = reinterpret_cast<const float*>(numbers);
  const int32_t* excess = reinterpret_cast<const int32_t*>(numbers + kPanel * 4);
  alignas(64) float values[kPanel];
  for (int64_t row = begin; row < end; ++row, sums += kPanel) {
    for (int column = 0; column < kPanel; column += kLanes) {
      Ints exact = load_as<Ints>(sums + column);
      if (kHasExcess) exact -= load_as<Ints>(excess + column);
      store(values + column, to_floats(exact) * splat(scales[row]) * load(weight_scales + column));
    }
    store_panel(linear, values, kPanel, panel * kPanel, kPanel, row, row + 1, y, y_stride);
  }
}

int32_t run(Context& context, const midspan_cpu_linear& linear, const void* x, int64_t x_stride, int64_t rows, void* y,
            int64_t y_stride) {
  const int64_t k = linear.k, panels = (linear.n + kPanel - 1) / kPanel;
  const int64_t quant_bytes = rows * filled(k), arranged_bytes = quant_bytes / 4 * kArrangedBytes;
  uint8_t* memory =
      static_cast<uint8_t*>(scratch_memory(context, SCRATCH_INPUTS, quant_bytes + arranged_bytes + rows * 4));
  if (memory == nullptr) return MIDSPAN_CPU_OUT_OF_MEMORY;
  int8_t* quants = reinterpret_cast<int8_t*>(memory);
  auto* arranged = reinterpret_cast<Arranged*>(memory + quant_bytes);
  float* scales = reinterpret_cast<float*>(memory + quant_bytes + arranged_bytes);
  const int32_t result = with_type(linear.input_type, [&](auto element) {
    const auto* from = static_cast<const decltype(element)*>(x);
    auto round_rows = [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        round_row(from + row * x_stride, k, quants + row * filled(k), scales[row]);
      }
    };
    for_row_parts(context, rows, k, round_rows);
    return MIDSPAN_CPU_OK;
  });
  if (result != MIDSPAN_CPU_OK) return result;
  arrange_inputs(context, quants, rows, k, arranged);

  const int64_t blocks = (rows + kRowsOfBlock - 1) / kRowsOfBlock;
  const uint8_t* packed = static_cast<const uint8_t*>(linear.packed);
  auto multiply = [&](int64_t task, int32_t) {
    const int64_t panel = task % panels, begin = task / panels * kRowsOfBlock;
    const int64_t end = begin + kRowsOfBlock < rows ? begin + kRowsOfBlock : rows;
    const uint8_t* weight = packed + panel * panel_bytes(k);
    alignas(64) int32_t sums[kRowsOfBlock * kPanel];
    multiply_block(quants + begin * filled(k), arranged + begin * (filled(k) / 4), end - begin, k, weight, sums);
    store_sums(linear, sums, weight + filled(k) * kPanel, scales, panel, begin, end, y, y_stride);
  };
  for_each_task(context, panels * blocks, 0, multiply);
  return MIDSPAN_CPU_OK;
}

}  // namespace

int32_t run_byte_linear(Context& context, const midspan_cpu_linear& linear, const void* x, int64_t x_stride,
                        int64_t rows, void* y, int64_t y_stride) {
  if (rows <= 0) return MIDSPAN_CPU_OK;
  if (linear.output_type != linear.input_type && linear.output_type != MIDSPAN_CPU_FLOAT32) {
    return MIDSPAN_CPU_UNSUPPORTED;
  }
  return run(context, linear, x, x_stride, rows, y, y_stride);
}

}  // namespace midspan::MIDSPAN_ISA
