// See midspan_cpu_run_plan.
#ifndef MIDSPAN_CPU_PLAN_H
#define MIDSPAN_CPU_PLAN_H

#include "context.h"

namespace midspan {

int32_t run_plan(Context& context, const Kernels& kernels, const midspan_cpu_instruction* instructions, int64_t count,
                 const midspan_cpu_step& step, int64_t* nanoseconds, int64_t* failed);

}  // namespace midspan

#endif
