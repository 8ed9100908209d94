// The public functions: contexts, and the hand-over to the kernels of the chosen instruction set.
//
// Compiled for the oldest supported processor.
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <new>

#include "context.h"
#include "instruction_sets.h"
#include "plan.h"
#include "thread_pool.h"

namespace midspan {

namespace {

void free_scratch(Context& context) {
  for (void* memory : context.scratch) std::free(memory);
  for (int32_t slot = 0; context.alone != nullptr && slot < context.threads; ++slot) free_scratch(context.alone[slot]);
  delete[] context.alone;
}

/// The context for one call: the caller's own, or, while another call holds that, a small one of one thread.
class Call {
 public:
  explicit Call(midspan_cpu_context* handle) : shared_(*reinterpret_cast<Context*>(handle)) {
    owner_ = __atomic_exchange_n(&shared_.busy, 1, __ATOMIC_ACQUIRE) == 0;
    if (owner_) return;
    private_.kernels = shared_.kernels;
    private_.threads = 1;
  }
  ~Call() {
    if (owner_) __atomic_store_n(&shared_.busy, 0, __ATOMIC_RELEASE);
    free_scratch(private_);
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  Context& context() { return owner_ ? shared_ : private_; }
  const Kernels& kernels() const { return *shared_.kernels; }

 private:
  Context& shared_;
  Context private_{};
  bool owner_;
};

void drain_slots(int64_t begin, int64_t end, void* argument) {
  for (int64_t slot = begin; slot < end; ++slot) static_cast<Loop*>(argument)->drain(static_cast<int32_t>(slot));
}

}  // namespace

void run_tasks(Context& context, int64_t tasks, int64_t chunk, Task task, void* argument) {
  if (tasks <= 1 || context.threads == 1) {
    for (int64_t index = 0; index < tasks; ++index) task(index, 0, argument);
    return;
  }
  Loop loop;
  loop.tasks = tasks;
  loop.chunk = chunk > 0 ? chunk : std::max<int64_t>(1, tasks / (int64_t{8} * context.threads));
  loop.task = task;
  loop.argument = argument;
  if (context.pool != nullptr) {
    context.pool->run(loop);
    return;
  }
  context.parallel_for(0, context.threads, 1, drain_slots, &loop);
  loop.drain(0);  // nothing is left unless parallel_for failed before it began
}

Context* contexts_of_one_thread(Context& context) {
  if (context.alone == nullptr) {
    context.alone = new (std::nothrow) Context[static_cast<size_t>(context.threads)]{};
    for (int32_t slot = 0; context.alone != nullptr && slot < context.threads; ++slot) {
      context.alone[slot].kernels = context.kernels;
      context.alone[slot].threads = 1;
    }
  }
  return context.alone;
}

void* scratch_memory(Context& context, Scratch use, int64_t bytes) {
  if (context.scratch_bytes[use] >= bytes) return context.scratch[use];
  const int64_t wanted = (std::max(bytes, context.scratch_bytes[use] * 3 / 2) + 4095) / 4096 * 4096;
  std::free(context.scratch[use]);
  context.scratch[use] = std::aligned_alloc(4096, static_cast<size_t>(wanted));
  context.scratch_bytes[use] = context.scratch[use] == nullptr ? 0 : wanted;
  return context.scratch[use];
}

}  // namespace midspan

using midspan::Call;
using midspan::Context;
using midspan::Kernels;

extern "C" {

uint32_t midspan_cpu_abi_version(void) { return MIDSPAN_CPU_ABI_VERSION; }

const char* midspan_cpu_error_text(int32_t result) {
  switch (result) {
    case MIDSPAN_CPU_OK:
      return "no error";
    case MIDSPAN_CPU_UNSUPPORTED:
      return "a type, format or size that the native kernel does not serve";
    case MIDSPAN_CPU_OUT_OF_MEMORY:
      return "no memory for the native kernel's scratch space";
    case MIDSPAN_CPU_OUT_OF_RANGE:
      return "a token id, position, slot or block number outside its table";
    default:
      return "an unknown result";
  }
}

const char* midspan_cpu_instruction_sets(void) { return midspan::runnable_sets(); }

midspan_cpu_context* midspan_cpu_create(const char* instruction_set, int32_t threads,
                                        midspan_cpu_parallel_for parallel_for, int32_t spin_microseconds) {
  const Kernels* kernels = midspan::choose_kernels(instruction_set);
  if (kernels == nullptr || threads < 1 || threads > 1024) return nullptr;
  Context* context = new (std::nothrow) Context{};
  if (context == nullptr) return nullptr;
  context->kernels = kernels;
  context->threads = threads;
  context->parallel_for = parallel_for;
  if (parallel_for == nullptr && threads > 1) {
    try {
      context->pool = new midspan::ThreadPool(threads - 1, spin_microseconds);
    } catch (const std::exception&) {
      delete context;
      return nullptr;
    }
  }
  return reinterpret_cast<midspan_cpu_context*>(context);
}

void midspan_cpu_destroy(midspan_cpu_context* handle) {
  if (handle == nullptr) return;
  Context* context = reinterpret_cast<Context*>(handle);
  delete context->pool;
  midspan::free_scratch(*context);
  delete context;
}

const char* midspan_cpu_instruction_set(const midspan_cpu_context* handle) {
  return reinterpret_cast<const Context*>(handle)->kernels->name;
}

void midspan_cpu_advise_huge_pages(void* address, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(address) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(address) + static_cast<uintptr_t>(bytes)) / page * page;
  if (end > begin) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)address;
  (void)bytes;
#endif
}

int32_t midspan_cpu_dense_format(const midspan_cpu_context* handle, int32_t weight_type, int32_t input_type) {
  const Kernels& kernels = *reinterpret_cast<const Context*>(handle)->kernels;
  const bool pairs = weight_type == MIDSPAN_CPU_BFLOAT16 && input_type == MIDSPAN_CPU_BFLOAT16;
  return pairs && kernels.run_pair_linear != nullptr ? MIDSPAN_CPU_DENSE_PAIRS : weight_type;
}

int64_t midspan_cpu_packed_linear_bytes(const midspan_cpu_weight* weight) {
  return midspan::packed_linear_bytes(*weight);
}

int32_t midspan_cpu_pack_linear(midspan_cpu_context* context, const midspan_cpu_weight* weight, void* packed) {
  Call call(context);
  return midspan::pack_linear(call.context(), *weight, packed);
}

int32_t midspan_cpu_read(midspan_cpu_context* context, const void* data, int64_t bytes, float* sum) {
  Call call(context);
  return call.kernels().read_memory(call.context(), data, bytes, sum);
}

int32_t midspan_cpu_argmax(midspan_cpu_context* context, const float* logits, int64_t logits_stride, int64_t rows,
                           int64_t columns, int32_t* ids, uint8_t* failed) {
  Call call(context);
  return call.kernels().argmax(call.context(), logits, logits_stride, rows, columns, ids, failed);
}

int32_t midspan_cpu_sample(midspan_cpu_context* context, const midspan_cpu_sampling* sampling, const float* logits,
                           int64_t logits_stride, int64_t rows, int64_t columns, int32_t* ids, uint8_t* failed) {
  Call call(context);
  return call.kernels().sample(call.context(), *sampling, logits, logits_stride, rows, columns, ids, failed);
}

int32_t midspan_cpu_run_plan(midspan_cpu_context* context, const midspan_cpu_instruction* instructions, int64_t count,
                             const midspan_cpu_step* step, int64_t* nanoseconds, int64_t* failed) {
  Call call(context);
  return midspan::run_plan(call.context(), call.kernels(), instructions, count, *step, nanoseconds, failed);
}

}  // extern "C"
