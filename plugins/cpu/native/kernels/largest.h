// The largest element of a row.
#ifndef MIDSPAN_CPU_LARGEST_H
#define MIDSPAN_CPU_LARGEST_H

#include "simd.h"

namespace midspan::MIDSPAN_ISA {

struct Found {
  float value;
  int32_t column;
  bool failed;  // a NaN or plus infinity
};

/// The largest of row[begin:end], the first among equals.
MIDSPAN_INLINE Found look(const float* row, int64_t begin, int64_t end) {
  Floats best = splat(-INFINITY), poison = {};
  Ints columns = splat(static_cast<int32_t>(begin)) + lane_numbers(), best_columns = columns;
  int64_t index = begin;
  for (; index + kLanes <= end; index += kLanes) {
    const Floats value = load(row + index);
    const Ints greater = value > best;
    best = greater ? value : best;
    best_columns = greater ? columns : best_columns;
    // minus infinity is allowed: what is tested is max(value, 0), NaN kept
    poison += larger(splat(0.0f), value) * splat(0.0f);
    columns += kLanes;
  }
  Found found = {-INFINITY, static_cast<int32_t>(begin), false};
  for (int lane = 0; lane < kLanes; ++lane) {
    const bool better = best[lane] > found.value || (best[lane] == found.value && best_columns[lane] < found.column);
    if (better) found = {best[lane], best_columns[lane], false};
  }
  for (; index < end; ++index) {
    if (row[index] > found.value) found = {row[index], static_cast<int32_t>(index), false};
    poison[0] += (row[index] > 0.0f || row[index] != row[index] ? row[index] : 0.0f) * 0.0f;
  }
  const float total = sum_of(poison);
  found.failed = total != total;
  return found;
}

}  // namespace midspan::MIDSPAN_ISA

#endif
