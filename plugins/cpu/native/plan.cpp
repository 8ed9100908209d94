// A plan: instructions that run one after the other, each a kernel on the context's threads.
//
// Knows what arguments each kernel takes, and nothing about why the instructions stand in this order.
#include "plan.h"

#include <chrono>

namespace midspan {

namespace {

using Nanoseconds = std::chrono::nanoseconds;

int64_t element_bytes(int32_t type) { return type == MIDSPAN_CPU_FLOAT32 ? 4 : 2; }

int32_t run_instruction(Context& context, const Kernels& kernels, const midspan_cpu_instruction& at,
                        const midspan_cpu_step& step) {
  const int64_t rows = at.rows == MIDSPAN_CPU_ROWS_SAMPLED ? step.sampled : step.tokens;
  const auto integers = [&](int index) { return step.integers[at.integers[index]]; };
  const auto* attention = static_cast<const midspan_cpu_attention*>(at.config);
  switch (at.op) {
    case MIDSPAN_CPU_OP_LINEAR: {
      const auto& linear = *static_cast<const midspan_cpu_linear*>(at.config);
      const LinearKernel run = linear_kernel(kernels, linear.format);
      if (run == nullptr) return MIDSPAN_CPU_UNSUPPORTED;
      return run(context, linear, at.x.data, at.x.stride, rows, at.y.data, at.y.stride);
    }
    case MIDSPAN_CPU_OP_RMS_NORM:
    case MIDSPAN_CPU_OP_ADD_RMS_NORM: {
      const bool adds = at.op == MIDSPAN_CPU_OP_ADD_RMS_NORM;
      return kernels.add_rms_norm(context, at.type, at.x.data, at.x.stride, adds ? at.x2.data : nullptr, at.x2.stride,
                                  rows, at.columns, static_cast<const float*>(at.config), at.config_columns, at.real,
                                  at.offset, at.y.data, at.y.stride, adds ? at.y2.data : nullptr, at.y2.stride);
    }
    case MIDSPAN_CPU_OP_GATED:
      return kernels.gated(context, at.type, at.code, at.x.data, at.x.stride, at.x2.data, at.x2.stride, rows,
                           at.columns, at.y.data, at.y.stride);
    case MIDSPAN_CPU_OP_ROTARY:
      return kernels.run_rotary(context, *static_cast<const midspan_cpu_rotary*>(at.config), integers(0), rows,
                                at.x.data, at.x.stride, at.x2.data, at.x2.stride, at.y.data, at.y.stride, at.y2.data,
                                at.y2.stride);
    case MIDSPAN_CPU_OP_EMBEDDING:
      return kernels.embedding(context, at.code, at.config, at.row_bytes, at.config_columns, at.columns, at.real,
                               integers(0), rows, at.type, at.y.data, at.y.stride);
    case MIDSPAN_CPU_OP_SELECT_ROWS:
      return kernels.embedding(context, at.type, at.x.data, at.x.stride * element_bytes(at.type), step.tokens,
                               at.columns, 1.0f, integers(0), rows, at.type, at.y.data, at.y.stride);
    case MIDSPAN_CPU_OP_WRITE_CACHE:
      return kernels.write_cache(context, *attention, at.x.data, at.x.stride, at.x2.data, at.x2.stride, integers(0),
                                 rows);
    case MIDSPAN_CPU_OP_ATTENTION:
      return kernels.run_attention(context, *attention, at.x.data, at.x.stride, integers(0), integers(1), integers(2),
                                   step.strides[at.integers[2]], step.requests, at.y.data, at.y.stride);
    case MIDSPAN_CPU_OP_ROUTE:
      return kernels.run_route(context, *static_cast<const midspan_cpu_route*>(at.config), at.x.data, at.x.stride, rows,
                               static_cast<int32_t*>(at.y.data), at.y.stride, static_cast<float*>(at.y2.data),
                               at.y2.stride);
    case MIDSPAN_CPU_OP_EXPERTS:
      return kernels.run_experts(context, *static_cast<const midspan_cpu_experts*>(at.config), at.x.data, at.x.stride,
                                 static_cast<const int32_t*>(at.x2.data), at.x2.stride,
                                 static_cast<const float*>(at.y2.data), at.y2.stride, rows, at.y.data, at.y.stride);
    case MIDSPAN_CPU_OP_SCALE_ROWS:
    case MIDSPAN_CPU_OP_ADD:
    case MIDSPAN_CPU_OP_MULTIPLY:
    case MIDSPAN_CPU_OP_SCALE:
      return kernels.combine(context, at, rows);
    default:
      return MIDSPAN_CPU_UNSUPPORTED;
  }
}

}  // namespace

LinearKernel linear_kernel(const Kernels& kernels, int32_t format) {
  switch (format) {
    case MIDSPAN_CPU_DENSE_FLOAT32:
    case MIDSPAN_CPU_DENSE_BFLOAT16:
    case MIDSPAN_CPU_DENSE_FLOAT16:
    case MIDSPAN_CPU_INT8_CHANNEL:
    case MIDSPAN_CPU_FP8_CHANNEL:
      return kernels.run_linear;
    case MIDSPAN_CPU_DENSE_PAIRS:
      return kernels.run_pair_linear;
    case MIDSPAN_CPU_INT8_DYNAMIC:
      return kernels.run_byte_linear;
    default:
      return kernels.run_quantized_linear;
  }
}

int32_t run_plan(Context& context, const Kernels& kernels, const midspan_cpu_instruction* instructions, int64_t count,
                 const midspan_cpu_step& step, int64_t* nanoseconds, int64_t* failed) {
  auto before = std::chrono::steady_clock::now();
  for (int64_t index = 0; index < count; ++index) {
    const int32_t result = run_instruction(context, kernels, instructions[index], step);
    if (result != MIDSPAN_CPU_OK) {
      *failed = index;
      return result;
    }
    if (nanoseconds == nullptr) continue;
    const auto now = std::chrono::steady_clock::now();
    nanoseconds[index] = std::chrono::duration_cast<Nanoseconds>(now - before).count();
    before = now;
  }
  return MIDSPAN_CPU_OK;
}

}  // namespace midspan
