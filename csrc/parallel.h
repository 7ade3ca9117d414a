// All threading is in this file. The OpenMP pool is shared with torch: the extension links libgomp by the SONAME in
// torch's wheels, and is loaded after torch.
#pragma once

#include <omp.h>
#include <pthread.h>

#include <atomic>
#include <cstdint>

namespace nybble {

// libgomp's pool does not survive fork(), so a forked child runs on one thread.
inline std::atomic<bool> in_forked_child{false};

inline int watch_forks() {
  return pthread_atfork(nullptr, nullptr, [] { in_forked_child.store(true, std::memory_order_relaxed); });
}

inline int usable_threads(int wanted) {
  if (wanted < 2 || in_forked_child.load(std::memory_order_relaxed) || omp_in_parallel()) return 1;
  return wanted;
}

// Runs fn(i) for i in [0, count), dynamically scheduled. fn must not throw.
template <class Fn>
void parallel_for(int64_t count, int threads, const Fn& fn) {
  const int workers = count < threads ? static_cast<int>(count) : threads;
  if (workers < 2) {
    for (int64_t i = 0; i < count; i++) fn(i);
    return;
  }
#pragma omp parallel for schedule(dynamic) num_threads(workers)
  for (int64_t i = 0; i < count; i++) fn(i);
}

}  // namespace nybble
