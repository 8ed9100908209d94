// What a call works with: threads, scratch memory, and the kernels of one instruction set.
//
// Knows nothing about what a kernel computes. Included by code that is compiled for several instruction
// sets, so it holds declarations only: no inline function here may be picked by the linker from an
// object that the processor cannot run.
#ifndef MIDSPAN_CPU_CONTEXT_H
#define MIDSPAN_CPU_CONTEXT_H

#include <stdint.h>

#include "midspan_cpu.h"

namespace midspan {

struct Context;

/// One piece of parallel work. `slot` is below Context::threads and held by one thread at a time.
using Task = void (*)(int64_t task, int32_t slot, void* argument);

/// A linear layer on rows: configuration, x and its stride, rows, y and its stride.
using LinearKernel = int32_t (*)(Context&, const midspan_cpu_linear&, const void*, int64_t, int64_t, void*, int64_t);

/// The kernels of one instruction set. What they compute stands at the operations in midspan_cpu.h.
struct Kernels {
  const char* name;
  LinearKernel run_linear;
  LinearKernel run_pair_linear;  // NULL where there are no instructions for pairs
  LinearKernel run_quantized_linear;
  LinearKernel run_byte_linear;
  int32_t (*add_rms_norm)(Context&, int32_t, const void*, int64_t, const void*, int64_t, int64_t, int64_t, const float*,
                          int64_t, float, float, void*, int64_t, void*, int64_t);
  int32_t (*gated)(Context&, int32_t, int32_t, const void*, int64_t, const void*, int64_t, int64_t, int64_t, void*,
                   int64_t);
  int32_t (*run_rotary)(Context&, const midspan_cpu_rotary&, const int32_t*, int64_t, const void*, int64_t, const void*,
                        int64_t, void*, int64_t, void*, int64_t);
  int32_t (*embedding)(Context&, int32_t, const void*, int64_t, int64_t, int64_t, float, const int32_t*, int64_t,
                       int32_t, void*, int64_t);
  int32_t (*argmax)(Context&, const float*, int64_t, int64_t, int64_t, int32_t*, uint8_t*);
  int32_t (*sample)(Context&, const midspan_cpu_sampling&, const float*, int64_t, int64_t, int64_t, int32_t*, uint8_t*);
  int32_t (*write_cache)(Context&, const midspan_cpu_attention&, const void*, int64_t, const void*, int64_t,
                         const int32_t*, int64_t);
  int32_t (*run_attention)(Context&, const midspan_cpu_attention&, const void*, int64_t, const int32_t*, const int32_t*,
                           const int32_t*, int64_t, int64_t, void*, int64_t);
  int32_t (*read_memory)(Context&, const void*, int64_t, float*);
  int32_t (*run_route)(Context&, const midspan_cpu_route&, const void*, int64_t, int64_t, int32_t*, int64_t, float*,
                       int64_t);
  int32_t (*run_experts)(Context&, const midspan_cpu_experts&, const void*, int64_t, const int32_t*, int64_t,
                         const float*, int64_t, int64_t, void*, int64_t);
  int32_t (*combine)(Context&, const midspan_cpu_instruction&, int64_t);
};

class ThreadPool;

/// Uses of scratch memory; each has a buffer that grows and is kept.
enum Scratch { SCRATCH_INPUTS, SCRATCH_PER_THREAD, SCRATCH_PLAN, SCRATCH_PARTIALS, SCRATCH_KINDS };

struct Context {
  const Kernels* kernels;
  int32_t threads;
  midspan_cpu_parallel_for parallel_for;
  ThreadPool* pool;
  void* scratch[SCRATCH_KINDS];
  int64_t scratch_bytes[SCRATCH_KINDS];
  int32_t busy;
  Context* alone;  // see contexts_of_one_thread
};

/// Runs all tasks and returns when they are done. Threads take `chunk` consecutive tasks at a time, in
/// order; 0 chooses a chunk. What a task computes must not depend on its slot.
void run_tasks(Context& context, int64_t tasks, int64_t chunk, Task task, void* argument);

/// Memory for one use, aligned to 64 bytes, valid until the next call for the same use; NULL if there is none.
void* scratch_memory(Context& context, Scratch use, int64_t bytes);

/// A context of one thread for each slot, with scratch memory of its own, for kernels that call other kernels from
/// their tasks; NULL if there is no memory.
Context* contexts_of_one_thread(Context& context);

/// See midspan_cpu_packed_linear_bytes and midspan_cpu_pack_linear.
int64_t packed_linear_bytes(const midspan_cpu_weight& weight);
int32_t pack_linear(Context& context, const midspan_cpu_weight& weight, void* packed);

/// The kernel for a weight format; NULL where there is none.
LinearKernel linear_kernel(const Kernels& kernels, int32_t format);

namespace portable {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512vnni {
extern const Kernels kernels;
}
namespace avx512bf16 {
extern const Kernels kernels;
}
namespace amx {
extern const Kernels kernels;
}
namespace amx_emulated {
extern const Kernels kernels;
}

}  // namespace midspan

#endif
