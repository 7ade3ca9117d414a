// All threading is in this file. The OpenMP pool is shared with torch: the extension links libgomp by the SONAME in
// torch's wheels, and is loaded after torch.
#pragma once

#include <omp.h>
#include <pthread.h>
#include <sched.h>

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

// Threads that run one function together, each with a Team of its own, and wait for each other between its loops. This
// costs a tenth of entering a parallel region for each loop.
class Team {
 public:
  struct Shared {
    std::atomic<int64_t> next{0};
    std::atomic<int> arrived{0};
    std::atomic<uint32_t> phase{0};
  };
  Team(Shared& shared, int workers) : shared_(shared), workers_(workers) {}
  int workers() const { return workers_; }

  // Runs fn(i) for i in [0, count), dynamically scheduled, and waits for all. Every thread calls it with equal
  // arguments. fn must not throw.
  template <class Fn>
  void each(int64_t count, const Fn& fn) {
    if (workers_ == 1) {
      for (int64_t i = 0; i < count; i++) fn(i);
      return;
    }
    for (int64_t i; (i = shared_.next.fetch_add(1, std::memory_order_relaxed)) < count;) fn(i);
    wait();
  }

 private:
  // Rounds of spinning before a waiting thread lets others run. With more threads than cores, more rounds take the time
  // of those that are waited for: on 2 cores of Zen 5, a chain of 60 loops took 0.24 ms on 2 threads with any number,
  // and on 4 threads 0.40 ms with none, 0.48 with 64, 1.2 with 512 and 29 with 16,384.
  static constexpr int kSpins = 64;

  void wait() {
    const uint32_t phase = shared_.phase.load(std::memory_order_relaxed);
    if (shared_.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == workers_) {
      shared_.arrived.store(0, std::memory_order_relaxed);
      shared_.next.store(0, std::memory_order_relaxed);
      shared_.phase.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; shared_.phase.load(std::memory_order_acquire) == phase; spins++) {
      if (spins < kSpins)
        pause();
      else
        sched_yield();
    }
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  Shared& shared_;
  int workers_;
};

// Runs fn(team) on so many threads together; `threads` as usable_threads gives it. fn must not throw.
template <class Fn>
void run_team(int threads, const Fn& fn) {
  Team::Shared shared;
  if (threads < 2) {
    Team team(shared, 1);
    fn(team);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    Team team(shared, omp_get_num_threads());
    fn(team);
  }
}

}  // namespace nybble
