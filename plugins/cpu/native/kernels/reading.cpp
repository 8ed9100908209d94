// Reads memory and does nothing else: what a step that is bound by memory can reach at best.
#include "parallel.h"

namespace midspan::MIDSPAN_ISA {

namespace {

constexpr int64_t kPart = 1 << 20;  // bytes read by one task
constexpr int kStreams = 8;

}  // namespace

int32_t read_memory(Context& context, const void* data, int64_t bytes, float* sum) {
  const int64_t parts = bytes / kPart;
  if (parts <= 0) return MIDSPAN_CPU_UNSUPPORTED;
  float* sums = static_cast<float*>(scratch_memory(context, SCRATCH_PLAN, parts * int64_t{sizeof(float)}));
  if (sums == nullptr) return MIDSPAN_CPU_OUT_OF_MEMORY;
  auto task = [&](int64_t index, int32_t) {
    const char* at = static_cast<const char*>(data) + index * kPart;
    Floats found[kStreams] = {};
    for (int64_t offset = 0; offset < kPart; offset += kStreams * int64_t{sizeof(Floats)}) {
      for (int stream = 0; stream < kStreams; ++stream) {
        found[stream] += load_as<Floats>(at + offset + stream * int64_t{sizeof(Floats)});
      }
    }
    for (int stream = 1; stream < kStreams; ++stream) found[0] += found[stream];
    float total = 0.0f;
    for (int lane = 0; lane < kLanes; ++lane) total += found[0][lane];
    sums[index] = total;
  };
  for_each_task(context, parts, 0, task);
  *sum = 0.0f;
  for (int64_t index = 0; index < parts; ++index) *sum += sums[index];
  return MIDSPAN_CPU_OK;
}

}  // namespace midspan::MIDSPAN_ISA
