// Loops over the elements of a row by vectors, with what is left at its end.
#ifndef MIDSPAN_CPU_ROW_VECTORS_H
#define MIDSPAN_CPU_ROW_VECTORS_H

#include "simd.h"

namespace midspan::MIDSPAN_ISA {

/// body(index, count) for vectors of a row; count < kLanes at its end.
template <class Body>
MIDSPAN_INLINE void for_vectors(int64_t columns, Body body) {
  int64_t index = 0;
  for (; index + kLanes <= columns; index += kLanes) body(index, kLanes);
  if (index < columns) body(index, static_cast<int>(columns - index));
}

template <class T>
MIDSPAN_INLINE Floats load_up_to(const T* from, int count) {
  return count == kLanes ? load(from) : load_some(from, count);
}

template <class T>
MIDSPAN_INLINE void store_up_to(T* to, Floats value, int count) {
  if (count == kLanes) {
    store(to, value);
  } else {
    store_some(to, value, count);
  }
}

}  // namespace midspan::MIDSPAN_ISA

#endif
