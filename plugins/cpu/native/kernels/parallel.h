// Loops over tasks with a closure, and the choice of an element type.
#ifndef MIDSPAN_CPU_PARALLEL_H
#define MIDSPAN_CPU_PARALLEL_H

#include "../context.h"
#include "simd.h"

namespace midspan::MIDSPAN_ISA {

/// body(task, slot) for every task, on the context's threads.
template <class Body>
MIDSPAN_INLINE void for_each_task(Context& context, int64_t tasks, int64_t chunk, Body& body) {
  run_tasks(
      context, tasks, chunk,
      [](int64_t task, int32_t slot, void* argument) { (*static_cast<Body*>(argument))(task, slot); }, &body);
}

/// body(begin, end) over parts of [0, rows); a part costs some tens of thousands of elements.
template <class Body>
MIDSPAN_INLINE void for_row_parts(Context& context, int64_t rows, int64_t columns, Body& body) {
  const int64_t worth = 16384;
  const int64_t part = columns >= worth ? 1 : (worth + columns - 1) / (columns > 0 ? columns : 1);
  auto task = [&](int64_t index, int32_t) {
    const int64_t begin = index * part;
    body(begin, begin + part < rows ? begin + part : rows);
  };
  for_each_task(context, (rows + part - 1) / part, 0, task);
}

/// function(T{}) with the element type that the code names.
template <class Function>
MIDSPAN_INLINE int32_t with_type(int32_t type, Function function) {
  switch (type) {
    case MIDSPAN_CPU_FLOAT32:
      return function(float{});
    case MIDSPAN_CPU_BFLOAT16:
      return function(BFloat16{});
    case MIDSPAN_CPU_FLOAT16:
      return function(Float16{});
    default:
      return MIDSPAN_CPU_UNSUPPORTED;
  }
}

}  // namespace midspan::MIDSPAN_ISA

#endif
