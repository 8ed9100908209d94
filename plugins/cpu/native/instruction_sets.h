// Which kernels the processor runs.
#ifndef MIDSPAN_CPU_INSTRUCTION_SETS_H
#define MIDSPAN_CPU_INSTRUCTION_SETS_H

#include "context.h"

namespace midspan {

/// The kernels of a runnable instruction set; of the fastest for NULL. NULL when it is not there or not runnable.
const Kernels* choose_kernels(const char* name);

/// Names of the runnable sets, the fastest first, separated by spaces.
const char* runnable_sets();

}  // namespace midspan

#endif
