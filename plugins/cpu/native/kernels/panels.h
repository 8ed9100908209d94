// What dense and quantized linear layers share: from float32 sums to outputs.
#ifndef MIDSPAN_CPU_PANELS_H
#define MIDSPAN_CPU_PANELS_H

#include "parallel.h"
#include "vector_math.h"

namespace midspan::MIDSPAN_ISA {

template <class T>
MIDSPAN_INLINE void store_panel_as(const midspan_cpu_linear& linear, const float* sums, int64_t sums_stride,
                                   int64_t column, int64_t count, int64_t row_begin, int64_t row_end, T* y,
                                   int64_t y_stride) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    const float* from = sums + (row - row_begin) * sums_stride;
    T* to = y + row * y_stride + column;
    for (int64_t index = 0; index < count; index += kLanes) {
      const int64_t valid = count - index < kLanes ? count - index : kLanes;
      Floats value = load(from + index);
      if (linear.bias != nullptr) {
        const float* bias = linear.bias + column + index;
        value += valid == kLanes ? load(bias) : load_some(bias, valid);
      }
      value *= splat(linear.scale);
      if (linear.soft_cap != 0.0f) value = soft_capped(value, linear.soft_cap);
      if (valid == kLanes) {
        store(to + index, value);
      } else {
        store_some(to + index, value, valid);
      }
    }
  }
}

/// Writes y[row_begin:row_end, column:column + width] (cut at n) from sums [rows][sums_stride], whose rows are
/// readable up to a whole vector.
MIDSPAN_INLINE void store_panel(const midspan_cpu_linear& linear, const float* sums, int64_t sums_stride,
                                int64_t column, int64_t width, int64_t row_begin, int64_t row_end, void* y,
                                int64_t y_stride) {
  const int64_t count = linear.n - column < width ? linear.n - column : width;
  with_type(linear.output_type, [&](auto element) {
    using T = decltype(element);
    store_panel_as(linear, sums, sums_stride, column, count, row_begin, row_end, static_cast<T*>(y), y_stride);
    return MIDSPAN_CPU_OK;
  });
}

}  // namespace midspan::MIDSPAN_ISA

#endif
