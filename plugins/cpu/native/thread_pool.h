// Threads that share one loop at a time.
//
// Knows nothing about kernels. A worker that is not awake in time does not delay the caller: the caller
// takes the tasks itself, closes the loop, and waits only for workers that have taken part.
#ifndef MIDSPAN_CPU_THREAD_POOL_H
#define MIDSPAN_CPU_THREAD_POOL_H

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "context.h"

namespace midspan {

/// A loop over tasks from which any number of threads take chunks.
struct Loop {
  std::atomic<int64_t> next{0};
  int64_t tasks = 0;
  int64_t chunk = 1;
  Task task = nullptr;
  void* argument = nullptr;

  /// Takes chunks until none is left.
  void drain(int32_t slot);
};

class ThreadPool {
 public:
  /// Starts `workers` threads; they hold slots 1 to `workers`, the caller of run holds slot 0.
  ThreadPool(int32_t workers, int32_t spin_microseconds);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  /// Runs a loop to its end. One caller at a time.
  void run(Loop& loop);

 private:
  void work(int32_t slot);
  bool join_next(uint64_t& last_generation);

  // state_: generation in the high bits, then one bit "open", then the number of workers taking part.
  static constexpr uint64_t kOpen = 1ull << 15;
  static constexpr uint64_t kActive = kOpen - 1;
  static constexpr uint64_t kGeneration = 1ull << 16;

  alignas(64) std::atomic<uint64_t> state_{0};
  alignas(64) std::atomic<uint32_t> bell_{0};
  std::atomic<int32_t> sleepers_{0};
  std::atomic<bool> stopping_{false};
  Loop* loop_ = nullptr;
  int32_t spin_microseconds_;
  std::vector<std::thread> threads_;
};

}  // namespace midspan

#endif
