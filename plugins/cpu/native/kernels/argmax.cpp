// The largest logit of each row, and whether the row can be sampled at all.
#include "largest.h"
#include "parallel.h"

namespace midspan::MIDSPAN_ISA {

namespace {

constexpr int64_t kPart = 16384;  // columns looked at by one task

}  // namespace

int32_t argmax(Context& context, const float* logits, int64_t logits_stride, int64_t rows, int64_t columns,
               int32_t* ids, uint8_t* failed) {
  const int64_t parts = (columns + kPart - 1) / kPart;
  Found* found = static_cast<Found*>(scratch_memory(context, SCRATCH_PLAN, rows * parts * int64_t{sizeof(Found)}));
  if (found == nullptr) return MIDSPAN_CPU_OUT_OF_MEMORY;
  auto task = [&](int64_t index, int32_t) {
    const int64_t row = index / parts, begin = index % parts * kPart;
    found[index] = look(logits + row * logits_stride, begin, begin + kPart < columns ? begin + kPart : columns);
  };
  for_each_task(context, rows * parts, 0, task);
  for (int64_t row = 0; row < rows; ++row) {
    Found best = {-INFINITY, 0, false};
    for (int64_t part = 0; part < parts; ++part) {
      const Found& next = found[row * parts + part];
      const bool bad = best.failed || next.failed;
      if (next.value > best.value) best = next;
      best.failed = bad;
    }
    const bool nothing = best.failed || best.value == -INFINITY;
    ids[row] = nothing ? 0 : best.column;
    failed[row] = nothing ? 1 : 0;
  }
  return MIDSPAN_CPU_OK;
}

}  // namespace midspan::MIDSPAN_ISA
