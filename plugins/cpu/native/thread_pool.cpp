#include "thread_pool.h"

#include <algorithm>
#include <chrono>

namespace midspan {

namespace {

void pause_processor() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

/// Polls for a limited time without a system call.
class Spin {
 public:
  explicit Spin(int32_t microseconds)
      : end_(std::chrono::steady_clock::now() + std::chrono::microseconds(microseconds)) {}

  /// False when the time is over.
  bool wait() {
    for (int i = 0; i < 16; ++i) pause_processor();
    return std::chrono::steady_clock::now() < end_;
  }

 private:
  std::chrono::steady_clock::time_point end_;
};

}  // namespace

void Loop::drain(int32_t slot) {
  for (;;) {
    const int64_t begin = next.fetch_add(chunk, std::memory_order_relaxed);
    if (begin >= tasks) return;
    const int64_t end = std::min(begin + chunk, tasks);
    for (int64_t index = begin; index < end; ++index) task(index, slot, argument);
  }
}

ThreadPool::ThreadPool(int32_t workers, int32_t spin_microseconds) : spin_microseconds_(spin_microseconds) {
  threads_.reserve(static_cast<size_t>(workers));
  for (int32_t worker = 0; worker < workers; ++worker) threads_.emplace_back([this, worker] { work(worker + 1); });
}

ThreadPool::~ThreadPool() {
  stopping_.store(true);
  bell_.fetch_add(1);
  bell_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

bool ThreadPool::join_next(uint64_t& last_generation) {
  uint64_t state = state_.load(std::memory_order_acquire);
  while ((state & kOpen) != 0 && state / kGeneration != last_generation) {
    if (state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) {
      last_generation = state / kGeneration;
      return true;
    }
  }
  return false;
}

void ThreadPool::work(int32_t slot) {
  uint64_t last_generation = 0;
  Spin spin(spin_microseconds_);
  while (!stopping_.load(std::memory_order_relaxed)) {
    if (join_next(last_generation)) {
      loop_->drain(slot);
      state_.fetch_sub(1, std::memory_order_acq_rel);
      spin = Spin(spin_microseconds_);
      continue;
    }
    if (spin.wait()) continue;
    const uint32_t bell = bell_.load();
    sleepers_.fetch_add(1);
    const uint64_t state = state_.load();
    const bool missed = (state & kOpen) != 0 && state / kGeneration != last_generation;
    if (!missed && !stopping_.load()) bell_.wait(bell);
    sleepers_.fetch_sub(1);
    spin = Spin(spin_microseconds_);
  }
}

void ThreadPool::run(Loop& loop) {
  loop_ = &loop;
  const uint64_t generation = state_.load(std::memory_order_relaxed) / kGeneration + 1;
  state_.store(generation * kGeneration | kOpen);
  if (sleepers_.load() > 0) {
    bell_.fetch_add(1);
    bell_.notify_all();
  }
  loop.drain(0);
  state_.fetch_and(~kOpen);
  if ((state_.load(std::memory_order_acquire) & kActive) == 0) return;
  Spin spin(spin_microseconds_);
  while ((state_.load(std::memory_order_acquire) & kActive) != 0) {
    if (!spin.wait()) std::this_thread::yield();
  }
}

}  // namespace midspan
