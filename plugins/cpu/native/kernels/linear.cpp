// Linear layers with dense weights.
//
// Every output is one chain of multiply-adds over k = 0, 1, 2, ... in float32, however many rows there are and
// however the loops are cut: an accumulator may rest in memory between two pieces of k, exactly. So the
// bits of a row do not depend on the other rows.
//
// Packed weight: panels of 32 outputs, [panels][k][32], the last one filled up with zeros. In bfloat16 panels,
// element 2j of the 32 is output j and element 2j + 1 is output j + 16, so that one load gives both by
// a shift and a mask. Other panels are in natural order. Behind a panel of bytes lie 32 float32 scales, by which the sums
// are multiplied.
#include "panels.h"
#include "parallel.h"
#include "row_tiles.h"
#include "vector_math.h"

namespace midspan::MIDSPAN_ISA {

namespace {

constexpr int kPanel = 32;
// Rows of one register tile: accumulators must leave registers for weights and inputs.
constexpr int kMaxRows = kLanes == 16 ? 8 : kLanes == 8 ? 6 : 3;
constexpr int kPairs = 16 / kLanes;  // vector pairs in a panel
constexpr int kRowsOfBlock = 96;     // rows whose inputs stay in the second-level cache

/// Vector pairs of a tile.
constexpr int pairs_at_once(int rows) {
  if (kLanes == 16) return 1;
  if (kLanes == 8) return rows <= 3 ? 2 : 1;
  return rows == 1 ? 4 : 2;
}

/// Outputs [v * kLanes, (v + 1) * kLanes) of a panel row, and those 16 further.
template <class W>
MIDSPAN_INLINE void load_pair(const W* row, int v, Floats& low, Floats& high) {
  low = load(row + v * kLanes);
  high = load(row + 16 + v * kLanes);
}
MIDSPAN_INLINE void load_pair(const BFloat16* row, int v, Floats& low, Floats& high) {
  const Words both = load_as<Words>(row + 2 * v * kLanes);
  low = bits_as<Floats>(both << 16);
  high = bits_as<Floats>(both & 0xffff0000u);
}

/// Adds a piece of k to `sums` [rows][32]. `x` is [k][rows].
template <class W, int rows>
void multiply_tile(const float* x, const W* weight, int64_t k, float* sums, bool first) {
  constexpr int pairs = pairs_at_once(rows);
  for (int v0 = 0; v0 < kPairs; v0 += pairs) {
    Floats sum[rows][pairs][2];
    for (int row = 0; row < rows; ++row) {
      for (int pair = 0; pair < pairs; ++pair) {
        const float* at = sums + row * kPanel + (v0 + pair) * kLanes;
        sum[row][pair][0] = first ? Floats{} : load(at);
        sum[row][pair][1] = first ? Floats{} : load(at + 16);
      }
    }
    // The last pass over a piece finds it in the cache: time to fetch the next one, which lies behind it.
    const W* ahead = v0 + pairs == kPairs ? weight + k * kPanel : weight;
    for (int64_t index = 0; index < k; ++index) {
      for (size_t line = 0; line < sizeof(W) * kPanel; line += 64) {
        __builtin_prefetch(reinterpret_cast<const char*>(ahead + index * kPanel) + line);
      }
      for (int pair = 0; pair < pairs; ++pair) {
        Floats low, high;
        load_pair(weight + index * kPanel, v0 + pair, low, high);
        const float* inputs = pairs > 1 ? read_again(x + index * rows) : x + index * rows;
        for (int row = 0; row < rows; ++row) {
          const Floats input = splat(inputs[row]);
          sum[row][pair][0] = multiply_add(input, low, sum[row][pair][0]);
          sum[row][pair][1] = multiply_add(input, high, sum[row][pair][1]);
        }
      }
    }
    for (int row = 0; row < rows; ++row) {
      for (int pair = 0; pair < pairs; ++pair) {
        float* at = sums + row * kPanel + (v0 + pair) * kLanes;
        store(at, sum[row][pair][0]);
        store(at + 16, sum[row][pair][1]);
      }
    }
  }
}

template <class W>
using MultiplyTile = void (*)(const float*, const W*, int64_t, float*, bool);

template <class W, int... index>
struct TileTable {
  static constexpr MultiplyTile<W> by_rows[] = {multiply_tile<W, index + 1>...};
};

template <class W>
MIDSPAN_INLINE MultiplyTile<W> tile_for(int64_t rows) {
#if defined(__AVX512F__)
  return TileTable<W, 0, 1, 2, 3, 4, 5, 6, 7>::by_rows[rows - 1];
#elif defined(__AVX2__)
  return TileTable<W, 0, 1, 2, 3, 4, 5>::by_rows[rows - 1];
#else
  return TileTable<W, 0, 1, 2>::by_rows[rows - 1];
#endif
}

using Tiles = RowTiles<kMaxRows>;

/// Inputs as float32, for each tile [k][rows of the tile], tiles one behind the other.
template <class T>
MIDSPAN_INLINE void arrange_inputs(Context& context, const Tiles& tiles, const T* x, int64_t x_stride, int64_t k,
                                   float* arranged) {
  auto arrange = [&](int64_t tile, int32_t) {
    const int64_t begin = tiles.begin(tile), rows = tiles.begin(tile + 1) - begin;
    float* to = arranged + begin * k;
    for (int64_t row = 0; row < rows; ++row) spread_row(x + (begin + row) * x_stride, k, to + row, rows);
  };
  if (tiles.rows * k < 32768) {
    for (int64_t tile = 0; tile < tiles.tiles; ++tile) arrange(tile, 0);
  } else {
    for_each_task(context, tiles.tiles, 0, arrange);
  }
}

/// sums [rows][32] *= scales [32].
MIDSPAN_INLINE void scale_sums(const float* scales, int64_t rows, float* sums) {
  for (int64_t row = 0; row < rows; ++row, sums += kPanel) {
    for (int column = 0; column < kPanel; column += kLanes) {
      store(sums + column, load(sums + column) * load(scales + column));
    }
  }
}

template <class W>
int32_t run(Context& context, const midspan_cpu_linear& linear, const void* x, int64_t x_stride, int64_t rows, void* y,
            int64_t y_stride) {
  const int64_t k = linear.k, n = linear.n;
  float* arranged = static_cast<float*>(scratch_memory(context, SCRATCH_INPUTS, rows * k * 4));
  if (arranged == nullptr) return MIDSPAN_CPU_OUT_OF_MEMORY;
  const Tiles tiles(rows);
  const int32_t result = with_type(linear.input_type, [&](auto element) {
    using T = decltype(element);
    arrange_inputs(context, tiles, static_cast<const T*>(x), x_stride, k, arranged);
    return MIDSPAN_CPU_OK;
  });
  if (result != MIDSPAN_CPU_OK) return result;

  constexpr int64_t piece = 16384 / (kPanel * int64_t{sizeof(W)});  // of k: half of a first-level cache
  constexpr int64_t tiles_of_block = kRowsOfBlock / kMaxRows;
  const int64_t panels = (n + kPanel - 1) / kPanel;
  const int64_t blocks = (tiles.tiles + tiles_of_block - 1) / tiles_of_block;
  constexpr bool scaled = sizeof(W) == 1;
  const int64_t panel_bytes = k * kPanel * int64_t{sizeof(W)} + (scaled ? kPanel * 4 : 0);
  const uint8_t* packed = static_cast<const uint8_t*>(linear.packed);
  auto multiply = [&](int64_t task, int32_t) {
    const int64_t panel = task % panels, first_tile = task / panels * tiles_of_block;
    const int64_t last_tile = first_tile + tiles_of_block < tiles.tiles ? first_tile + tiles_of_block : tiles.tiles;
    const W* weight = reinterpret_cast<const W*>(packed + panel * panel_bytes);
    alignas(64) float sums[kRowsOfBlock * kPanel];
    const int64_t first_row = tiles.begin(first_tile);
    for (int64_t k0 = 0; k0 < k; k0 += piece) {
      const int64_t count = k - k0 < piece ? k - k0 : piece;
      for (int64_t tile = first_tile; tile < last_tile; ++tile) {
        const int64_t begin = tiles.begin(tile), height = tiles.begin(tile + 1) - begin;
        tile_for<W>(height)(arranged + begin * k + k0 * height, weight + k0 * kPanel, count,
                            sums + (begin - first_row) * kPanel, k0 == 0);
      }
    }
    if constexpr (scaled) {
      scale_sums(reinterpret_cast<const float*>(weight + k * kPanel), tiles.begin(last_tile) - first_row, sums);
    }
    store_panel(linear, sums, kPanel, panel * kPanel, kPanel, first_row, tiles.begin(last_tile), y, y_stride);
  };
  for_each_task(context, panels * blocks, 0, multiply);
  return MIDSPAN_CPU_OK;
}

}  // namespace

int32_t run_linear(Context& context, const midspan_cpu_linear& linear, const void* x, int64_t x_stride, int64_t rows,
                   void* y, int64_t y_stride) {
  if (rows <= 0) return MIDSPAN_CPU_OK;
  if (linear.output_type != linear.input_type && linear.output_type != MIDSPAN_CPU_FLOAT32) {
    return MIDSPAN_CPU_UNSUPPORTED;
  }
  if (linear.format == MIDSPAN_CPU_INT8_CHANNEL) return run<Int8>(context, linear, x, x_stride, rows, y, y_stride);
  if (linear.format == MIDSPAN_CPU_FP8_CHANNEL) return run<Float8>(context, linear, x, x_stride, rows, y, y_stride);
  return with_type(linear.format, [&](auto element) {
    return run<decltype(element)>(context, linear, x, x_stride, rows, y, y_stride);
  });
}

}  // namespace midspan::MIDSPAN_ISA
