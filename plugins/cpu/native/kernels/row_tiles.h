// Rows cut into register tiles, and rows laid out for them.
#ifndef MIDSPAN_CPU_ROW_TILES_H
#define MIDSPAN_CPU_ROW_TILES_H

#include "simd.h"

namespace midspan::MIDSPAN_ISA {

/// Rows cut into tiles of nearly equal height, `max_height` at most.
template <int max_height>
struct RowTiles {
  int64_t rows;
  int64_t tiles;

  explicit RowTiles(int64_t count) : rows(count), tiles((count + max_height - 1) / max_height) {}

  /// The first row of a tile; of the tile after the last one: the number of rows.
  int64_t begin(int64_t tile) const {
    const int64_t height = rows / tiles, taller = rows % tiles;
    return tile * height + (tile < taller ? tile : taller);
  }
};

/// A row of `size` elements as every `apart`-th float of `to`.
template <class T>
MIDSPAN_INLINE void spread_row(const T* from, int64_t size, float* to, int64_t apart) {
  int64_t index = 0;
  for (; index + kLanes <= size; index += kLanes) {
    float values[kLanes];
    store(values, load(from + index));
    for (int lane = 0; lane < kLanes; ++lane) to[(index + lane) * apart] = values[lane];
  }
  for (; index < size; ++index) to[index * apart] = to_float(from[index]);
}

}  // namespace midspan::MIDSPAN_ISA

#endif
