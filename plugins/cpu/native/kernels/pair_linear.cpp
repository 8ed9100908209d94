// Linear layers of bfloat16 weights and inputs by instructions that multiply pairs of bfloat16.
//
// The sum of an output is one chain in float32 over pairs (or, on tiles, sixteen pairs) of k in order, whatever the
// number of rows, so the bits of a row do not depend on the other rows. Subnormal numbers count as zero.
//
// Packed weight: panels of 32 outputs, [panels][k / 2][32][2], k filled up with zeros to a multiple of 32, outputs to
// one of 32. That is also the layout of two tiles side by side, sixteen pairs high.
#include "matrix_tiles.h"
#include "panels.h"
#include "parallel.h"
#include "row_tiles.h"

namespace midspan::MIDSPAN_ISA {

namespace {

constexpr int kPanel = 32;
constexpr int64_t kStep = 32;  // of k: what k is filled up to
constexpr int64_t kRowBytes = kPanel * 4;
constexpr int64_t kRowsOfBlock = 96;  // rows whose inputs stay in the second-level cache

int64_t filled(int64_t k) { return (k + kStep - 1) / kStep * kStep; }

#if defined(MIDSPAN_HAS_TILES)

/// Copies a row of k elements and fills it up with zeros.
MIDSPAN_INLINE void fill_row(const uint16_t* from, int64_t k, uint16_t* to) {
  memcpy(to, from, static_cast<size_t>(2 * k));
  memset(to + k, 0, static_cast<size_t>(2 * (filled(k) - k)));
}

/// Rows of inputs as tiles read them, and elements between them.
struct Inputs {
  const uint16_t* rows;
  int64_t stride;
};

/// Rows that need no filling are read where they lie.
MIDSPAN_INLINE bool arrange_inputs(Context& context, const uint16_t* x, int64_t x_stride, int64_t rows, int64_t k,
                                   Inputs& inputs) {
  inputs = {x, x_stride};
  if (k == filled(k)) return true;
  uint16_t* to = static_cast<uint16_t*>(scratch_memory(context, SCRATCH_INPUTS, rows * filled(k) * 2));
  if (to == nullptr) return false;
  for (int64_t row = 0; row < rows; ++row) fill_row(x + row * x_stride, k, to + row * filled(k));
  inputs = {to, filled(k)};
  return true;
}

/// sums [rows, 32] = inputs from row `begin` on * a panel.
void multiply_block(const Inputs& inputs, int64_t begin, int64_t rows, int64_t k, const uint8_t* panel, float* sums) {
  const uint8_t* x = reinterpret_cast<const uint8_t*>(inputs.rows + begin * inputs.stride);
  Tiles tiles;
  for_tile_rows(tiles, 0, rows, [&](int64_t row, int, TileShape shape) {
    multiply_tiles(tiles, shape, x + row * inputs.stride * 2, inputs.stride * 2, panel, filled(k) / kStep,
                   sums + row * kPanel);
  });
}

#else

constexpr int kMaxRows = 12;     // twice as many accumulators leave registers for weights
constexpr int64_t kPiece = 128;  // pairs of k: half of a first-level cache

MIDSPAN_INLINE __m512 add_pairs(__m512 sum, uint32_t input, __m512i weight) {
  return _mm512_dpbf16_ps(sum, bits_as<__m512bh>(_mm512_set1_epi32(static_cast<int>(input))), bits_as<__m512bh>(weight));
}

/// Adds a piece of k to `sums` [rows][32]. `x` is [pairs][rows].
template <int rows>
void multiply_tile(const uint32_t* x, const uint8_t* panel, int64_t pairs, float* sums, bool first) {
  __m512 left[rows], right[rows];
  for (int row = 0; row < rows; ++row) {
    left[row] = first ? _mm512_setzero_ps() : _mm512_load_ps(sums + row * kPanel);
    right[row] = first ? _mm512_setzero_ps() : _mm512_load_ps(sums + row * kPanel + 16);
  }
  for (int64_t pair = 0; pair < pairs; ++pair, panel += kRowBytes, x += rows) {
    __builtin_prefetch(panel + kPiece * kRowBytes);
    __builtin_prefetch(panel + kPiece * kRowBytes + 64);
    const __m512i left_weight = load_as<__m512i>(panel), right_weight = load_as<__m512i>(panel + 64);
    for (int row = 0; row < rows; ++row) {
      left[row] = add_pairs(left[row], x[row], left_weight);
      right[row] = add_pairs(right[row], x[row], right_weight);
    }
  }
  for (int row = 0; row < rows; ++row) {
    _mm512_store_ps(sums + row * kPanel, left[row]);
    _mm512_store_ps(sums + row * kPanel + 16, right[row]);
  }
}

using MultiplyTile = void (*)(const uint32_t*, const uint8_t*, int64_t, float*, bool);
constexpr MultiplyTile kByRows[kMaxRows] = {multiply_tile<1>, multiply_tile<2>,  multiply_tile<3>,  multiply_tile<4>,
                                            multiply_tile<5>, multiply_tile<6>,  multiply_tile<7>,  multiply_tile<8>,
                                            multiply_tile<9>, multiply_tile<10>, multiply_tile<11>, multiply_tile<12>};

/// Pairs of inputs, for each tile of a block [filled k / 2][rows of the tile].
using Inputs = const uint32_t*;

MIDSPAN_INLINE bool arrange_inputs(Context& context, const uint16_t* x, int64_t x_stride, int64_t rows, int64_t k,
                                   Inputs& inputs) {
  inputs = reinterpret_cast<const uint32_t*>(x);
  if (rows == 1 && k == filled(k)) return true;
  const int64_t pairs = filled(k) / 2, blocks = (rows + kRowsOfBlock - 1) / kRowsOfBlock;
  uint32_t* arranged = static_cast<uint32_t*>(scratch_memory(context, SCRATCH_INPUTS, rows * pairs * 4));
  if (arranged == nullptr) return false;
  auto arrange = [&](int64_t block, int32_t) {
    const int64_t first = block * kRowsOfBlock;
    const RowTiles<kMaxRows> tiles(rows - first < kRowsOfBlock ? rows - first : kRowsOfBlock);
    for (int64_t tile = 0; tile < tiles.tiles; ++tile) {
      const int64_t begin = first + tiles.begin(tile), height = tiles.begin(tile + 1) - tiles.begin(tile);
      uint32_t* to = arranged + begin * pairs;
      for (int64_t row = 0; row < height; ++row) {
        const uint16_t* from = x + (begin + row) * x_stride;
        for (int64_t pair = 0; pair < k / 2; ++pair) to[pair * height + row] = load_as<uint32_t>(from + 2 * pair);
        for (int64_t pair = k / 2; pair < pairs; ++pair) to[pair * height + row] = 2 * pair < k ? from[2 * pair] : 0;
      }
    }
  };
  for_each_task(context, blocks, 1, arrange);
  inputs = arranged;
  return true;
}

/// sums [rows, 32] = inputs from row `begin` on * a panel.
void multiply_block(const Inputs& inputs, int64_t begin, int64_t rows, int64_t k, const uint8_t* panel, float* sums) {
  const RowTiles<kMaxRows> tiles(rows);
  const int64_t pairs = filled(k) / 2;
  for (int64_t pair = 0; pair < pairs; pair += kPiece) {
    const int64_t count = pairs - pair < kPiece ? pairs - pair : kPiece;
    for (int64_t tile = 0; tile < tiles.tiles; ++tile) {
      const int64_t row = tiles.begin(tile), height = tiles.begin(tile + 1) - row;
      kByRows[height - 1](inputs + (begin + row) * pairs + pair * height, panel + pair * kRowBytes, count,
                          sums + row * kPanel, pair == 0);
    }
  }
}

#endif

}  // namespace

int32_t run_pair_linear(Context& context, const midspan_cpu_linear& linear, const void* x, int64_t x_stride,
                        int64_t rows, void* y, int64_t y_stride) {
  if (rows <= 0) return MIDSPAN_CPU_OK;
  if (linear.input_type != MIDSPAN_CPU_BFLOAT16) return MIDSPAN_CPU_UNSUPPORTED;
  if (linear.output_type != linear.input_type && linear.output_type != MIDSPAN_CPU_FLOAT32) {
    return MIDSPAN_CPU_UNSUPPORTED;
  }
  const int64_t k = linear.k, panels = (linear.n + kPanel - 1) / kPanel;
  const int64_t blocks = (rows + kRowsOfBlock - 1) / kRowsOfBlock;
  const uint8_t* packed = static_cast<const uint8_t*>(linear.packed);
  Inputs inputs;
  if (!arrange_inputs(context, static_cast<const uint16_t*>(x), x_stride, rows, k, inputs)) {
    return MIDSPAN_CPU_OUT_OF_MEMORY;
  }
  auto multiply = [&](int64_t task, int32_t) {
    const int64_t panel = task % panels, begin = task / panels * kRowsOfBlock;
    const int64_t end = begin + kRowsOfBlock < rows ? begin + kRowsOfBlock : rows;
    alignas(64) float sums[kRowsOfBlock * kPanel];
    multiply_block(inputs, begin, end - begin, k, packed + panel * filled(k) / 2 * kRowBytes, sums);
    store_panel(linear, sums, kPanel, panel * kPanel, kPanel, begin, end, y, y_stride);
  };
  for_each_task(context, panels * blocks, 0, multiply);
  return MIDSPAN_CPU_OK;
}

}  // namespace midspan::MIDSPAN_ISA
