// An emulator that implements csrc/cuda/hardware.cuh on a CPU. The threads of a cluster are fibers in one thread; they
// switch where a warp, a block or the cluster synchronizes. mma.sync follows the fragment tables of the PTX manual, in
// float64 for 16-bit floats. Asynchronous copies complete either at once or only when waited for, so that a missing
// wait or barrier is detected. Shared memory is filled with garbage, and bank conflicts of 16-byte reads are counted.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "../../csrc/cuda/maps.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct Index3 {
  int x = 0, y = 0, z = 0;
};

namespace nybble {
namespace cuda {
namespace emulated {

// Arguments and result of a thread in a warp-wide operation.
struct Exchange {
  const uint32_t *a, *b;
  void* c;
  int kind;
  uint32_t places;
};

// Warp-wide operations: mma of bfloat16, float16, int8; 2:4-sparse mma of both floats, with selector 0 and 1; exchange
// of a word with the neighbouring lane.
enum Kind { kBf16, kF16, kS8, kSparseBf16, kSparseF16, kOtherSparseBf16, kOtherSparseF16, kNeighbour };

constexpr int kMostWarps = 32;  // per block

struct Copy {
  void* to;
  std::vector<unsigned char> bytes;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Index3 thread, block;
  int rank = 0, lane = 0, warp = 0;
  bool done = false;
  int waits = 0;  // 1 warp, 2 block, 3 cluster
  Exchange exchange{};
  std::vector<std::vector<Copy>> groups{1};  // groups of pending copies, the last one not committed
  size_t reads = 0;
};

struct Machine {
  bool lazy = true;  // copies complete as late as allowed
  unsigned order = 1;
  long conflicts = 0, reads = 0;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<std::vector<Vector>> shared;  // by rank
  std::map<std::pair<int, size_t>, std::vector<uintptr_t>> pending_reads;
  Fiber* now = nullptr;
  ucontext_t scheduler;
  std::vector<std::pair<uintptr_t, uintptr_t>> readable;  // where copies may read: [first, second)
  Index3 grid;
  int threads = kThreads;  // per block
};

inline Machine& machine() {
  static Machine one;
  return one;
}

inline void fail(const char* what) {
  std::printf("emulator: %s\n", what);
  std::exit(1);
}

inline void pause(int kind) {
  Fiber* me = machine().now;
  me->waits = kind;
  swapcontext(&me->context, &machine().scheduler);
}

inline double value_of(uint16_t bits, bool bf16) {
  if (bf16) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float f;
    std::memcpy(&f, &wide, 4);
    return f;
  }
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const double sign = bits >> 15 ? -1 : 1;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24));
}

// The dense column of stored column `column` of a row. Positions are two bits each, in the row's half of a word, in the
// lanes that the selector names; the first lane has columns 0-7.
inline int column_of(Fiber* const* lanes, int row, int column, int selector) {
  const uint32_t word = lanes[4 * (row % 8) + 2 * selector + column / 8]->exchange.places;
  const uint32_t quad = word >> (16 * (row / 8) + 4 * (column / 2 % 4)) & 15;
  if ((quad & 3) >= quad >> 2) fail("positions are not ascending");
  return 4 * (column / 2) + static_cast<int>(column & 1 ? quad >> 2 : quad & 3);
}

// Executes the operation of a warp whose lanes all wait, by the PTX manual's tables (g = lane / 4, t = lane % 4).
inline void multiply(Fiber* const* lanes) {
  const int kind = lanes[0]->exchange.kind;
  for (int lane = 1; lane < kLanes; lane++)
    if (lanes[lane]->exchange.kind != kind) fail("the lanes of a warp execute different operations");
  if (kind == kNeighbour) {
    for (int lane = 0; lane < kLanes; lane++)
      *static_cast<uint32_t*>(lanes[lane]->exchange.c) = *lanes[lane ^ 1]->exchange.a;
    return;
  }
  const bool sparse = kind >= kSparseBf16, bf16 = kind == kBf16 || kind == kSparseBf16 || kind == kOtherSparseBf16;
  const int ks = kind == kS8 || sparse ? 32 : 16, selector = kind >= kOtherSparseBf16;
  static double a[16][32], b[32][8];
  std::memset(a, 0, sizeof a);
  for (int lane = 0; lane < kLanes; lane++) {
    const Exchange& e = lanes[lane]->exchange;
    const int g = lane / 4, t = lane % 4;
    if (kind == kS8) {
      for (int i = 0; i < 16;
           i++)  // a_i: row g for i in 0-3 and 8-11, else g + 8; column 4 t + i % 4, + 16 from i = 8 on
        a[(i < 4 || (i >= 8 && i < 12)) ? g : g + 8][4 * t + (i & 3) + (i >= 8 ? 16 : 0)] =
            reinterpret_cast<const int8_t*>(e.a)[i];
      for (int i = 0; i < 8; i++) b[4 * t + (i & 3) + (i >= 4 ? 16 : 0)][g] = reinterpret_cast<const int8_t*>(e.b)[i];
    } else {
      const uint16_t* ah = reinterpret_cast<const uint16_t*>(e.a);
      const uint16_t* bh = reinterpret_cast<const uint16_t*>(e.b);
      for (int i = 0; i < 8; i++) {  // row g for i in 0, 1, 4, 5, else g + 8; column 2 t + i % 2, + 8 from i = 4 on
        const int row = (i & 2) ? g + 8 : g, column = 2 * t + (i & 1) + (i >= 4 ? 8 : 0);
        a[row][sparse ? column_of(lanes, row, column, selector) : column] += value_of(ah[i], bf16);
      }
      for (int i = 0; i < ks / 4; i++) b[2 * t + (i & 1) + 8 * (i / 2)][g] = value_of(bh[i], bf16);
    }
  }
  for (int lane = 0; lane < kLanes; lane++) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; i++) {  // row g for i in 0, 1, else g + 8; column 2 t + i % 2
      double sum = 0;
      for (int k = 0; k < ks; k++) sum += a[i < 2 ? g : g + 8][k] * b[k][2 * t + (i & 1)];
      if (kind == kS8)
        static_cast<uint32_t*>(lanes[lane]->exchange.c)[i] += static_cast<uint32_t>(static_cast<int32_t>(sum));
      else
        static_cast<float*>(lanes[lane]->exchange.c)[i] =
            static_cast<float>(static_cast<float*>(lanes[lane]->exchange.c)[i] + sum);
    }
  }
}

inline void together(int kind, const uint32_t* a, const uint32_t* b, void* c, uint32_t places = 0) {
  machine().now->exchange = {a, b, c, kind, places};
  pause(1);
}

inline void arrive(Fiber* fiber, size_t pending) {
  while (fiber->groups.size() > pending + 1) {
    for (const Copy& copy : fiber->groups.front()) std::memcpy(copy.to, copy.bytes.data(), copy.bytes.size());
    fiber->groups.erase(fiber->groups.begin());
  }
}

// A copy from outside the tensors would fault on a GPU, or read another tensor.
inline void check_readable(const void* from, size_t bytes) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(from);
  for (const auto& range : machine().readable)
    if (at >= range.first && at + bytes <= range.second) return;
  fail("a copy reads beyond its tensor");
}
template <class T>
void may_read(const std::vector<T>& tensor) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(tensor.data());
  machine().readable.emplace_back(at, at + tensor.size() * sizeof(T));
}

inline void copy(void* to, const void* from, size_t bytes, size_t whole) {
  if (reinterpret_cast<uintptr_t>(to) % whole || (bytes && reinterpret_cast<uintptr_t>(from) % whole))
    fail("a copy is not aligned");
  Copy one{to, std::vector<unsigned char>(whole, 0)};
  if (bytes) {
    check_readable(from, bytes);
    std::memcpy(one.bytes.data(), from, bytes);
  }
  if (machine().lazy)
    machine().now->groups.back().push_back(one);
  else
    std::memcpy(to, one.bytes.data(), whole);
}

// Counts bank conflicts: a warp's 16-byte reads are served eight lanes at a time, which must touch all 32 banks once.
inline void count_banks(const void* from) {
  Fiber* me = machine().now;
  auto& seen = machine().pending_reads[{me->rank * kMostWarps + me->warp, me->reads++}];
  seen.resize(kLanes);
  seen[me->lane] = reinterpret_cast<uintptr_t>(from);
  for (uintptr_t address : seen)
    if (!address) return;
  for (int eight = 0; eight < 4; eight++) {
    std::map<uintptr_t, uintptr_t> banks;  // group of four banks -> address read
    for (int i = 0; i < 8; i++) {
      const uintptr_t address = seen[8 * eight + i];
      const auto found = banks.emplace(address / 16 % 8, address);
      if (!found.second && found.first->second != address) machine().conflicts++;
    }
  }
  machine().reads++;
  machine().pending_reads.erase({me->rank * kMostWarps + me->warp, me->reads - 1});
}

inline void trampoline(unsigned high, unsigned low) {
  const uintptr_t pointer = static_cast<uintptr_t>(high) << 32 | low;
  (*reinterpret_cast<const std::function<void()>*>(pointer))();
  machine().now->done = true;
  swapcontext(&machine().now->context, &machine().scheduler);
}

// Adds a thread of a block, not yet started.
inline void add_fiber(int thread, Index3 block, int rank, const std::function<void()>& kernel) {
  auto fiber = std::make_unique<Fiber>();
  fiber->thread.x = thread;
  fiber->block = block;
  fiber->rank = rank;
  fiber->lane = thread % kLanes;
  fiber->warp = thread / kLanes;
  constexpr size_t kStack = 1 << 16;
  fiber->stack.reset(new char[kStack]);
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = fiber->stack.get();
  fiber->context.uc_stack.ss_size = kStack;
  const uintptr_t pointer = reinterpret_cast<uintptr_t>(&kernel);
  makecontext(&fiber->context, reinterpret_cast<void (*)()>(trampoline), 2, static_cast<unsigned>(pointer >> 32),
              static_cast<unsigned>(pointer));
  machine().fibers.push_back(std::move(fiber));
}

// Runs one cluster: blocks (x, first_y .. first_y + ranks - 1) of a grid, with `threads` threads each.
inline void run_cluster(Index3 grid, int x, int first_y, int ranks, int threads, size_t shared_bytes,
                        std::function<void()> kernel) {
  Machine& m = machine();
  m.threads = threads;
  m.fibers.clear();
  m.shared.assign(ranks, std::vector<Vector>(shared_bytes / 16));
  for (auto& block : m.shared) std::memset(block.data(), 0xFB, shared_bytes);
  m.pending_reads.clear();
  m.grid = grid;
  for (int rank = 0; rank < ranks; rank++)
    for (int i = 0; i < threads; i++) add_fiber(i, {x, first_y + rank, 0}, rank, kernel);
  const auto release = [&](size_t begin, size_t count, int kind) {
    size_t waiting = 0, done = 0;
    for (size_t i = begin; i < begin + count; i++) {
      waiting += m.fibers[i]->waits == kind;
      done += m.fibers[i]->done;
    }
    if (!waiting || waiting + done < count) return false;
    if (done) fail("some threads have exited, but others wait for all");
    if (kind == 1) {
      Fiber* lanes[kLanes];
      for (int i = 0; i < kLanes; i++) lanes[i] = m.fibers[begin + i].get();
      multiply(lanes);
    }
    for (size_t i = begin; i < begin + count; i++) m.fibers[i]->waits = 0;
    return true;
  };
  std::vector<int> left(ranks, 0);  // number of finished threads, by block
  for (bool moved = true; moved;) {
    moved = false;
    const size_t count = m.fibers.size();
    m.order = m.order * 1664525u + 1013904223u;
    const size_t start = (m.order >> 8) / kLanes * kLanes % count;  // warps take turns in any order
    for (size_t i = 0; i < count; i++) {
      Fiber* fiber = m.fibers[(start + i) % count].get();
      if (fiber->done || fiber->waits) continue;
      m.now = fiber;
      swapcontext(&m.scheduler, &fiber->context);
      moved = true;
      // The shared memory of a finished block is invalid.
      if (fiber->done && ++left[fiber->rank] == threads) std::memset(m.shared[fiber->rank].data(), 0xFB, shared_bytes);
    }
    for (size_t w = 0; w < count; w += kLanes) moved |= release(w, kLanes, 1);
    if (moved) continue;
    for (size_t b = 0; b < count; b += threads) moved |= release(b, threads, 2);
    if (!moved) moved = release(0, count, 3);
  }
  for (const auto& fiber : m.fibers)
    if (!fiber->done) fail("deadlock");
}

}  // namespace emulated

#define threadIdx (::nybble::cuda::emulated::machine().now->thread)
#define blockIdx (::nybble::cuda::emulated::machine().now->block)
#define gridDim (::nybble::cuda::emulated::machine().grid)

inline void __syncthreads() { emulated::pause(2); }

inline unsigned char* shared_memory() {
  return reinterpret_cast<unsigned char*>(emulated::machine().shared[emulated::machine().now->rank].data());
}

inline void copy_async(Vector* to, const void* from, int bytes = 16) { emulated::copy(to, from, bytes, 16); }
inline void copy_async_or_zero(Vector* to, const void* from, bool there) {
  emulated::copy(to, from, there ? 16 : 0, 16);
}
inline void copy_async_8(void* to, const void* from) { emulated::copy(to, from, 8, 8); }
inline void commit() { emulated::machine().now->groups.emplace_back(); }
template <int Pending>
inline void arrived() {
  emulated::arrive(emulated::machine().now, Pending);
}

inline Vector load_shared(const Vector* from) {
  emulated::count_banks(from);
  return *from;
}
inline void store_shared(void* to, const Vector& v) { std::memcpy(to, &v, 16); }

// Global memory, with checks of the alignment.
inline void check_aligned(const void* at, size_t to) {
  if (reinterpret_cast<uintptr_t>(at) % to) emulated::fail("an access is not aligned");
}
inline Vector load_global(const void* from) {
  check_aligned(from, 16);
  return *static_cast<const Vector*>(from);
}
inline void store_global(void* to, const Vector& v) {
  check_aligned(to, 16);
  std::memcpy(to, &v, 16);
}
inline void store_global_4(void* to, uint32_t value) {
  check_aligned(to, 4);
  std::memcpy(to, &value, 4);
}
inline void store_global_8(void* to, uint32_t first, uint32_t second) {
  check_aligned(to, 8);
  const uint32_t both[2] = {first, second};
  std::memcpy(to, both, 8);
}

inline uint32_t and_or(uint32_t a, uint32_t mask, uint32_t with) { return (a & mask) | with; }
inline uint32_t and_xor(uint32_t a, uint32_t mask, uint32_t with) { return (a & mask) ^ with; }

inline uint32_t select_bytes(uint32_t a, uint32_t b, uint32_t which) {
  const uint64_t all = static_cast<uint64_t>(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; i++) out |= static_cast<uint32_t>(all >> (8 * (which >> (4 * i) & 7)) & 255) << (8 * i);
  return out;
}

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t as_bits(uint32_t bits) { return bits; }
inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float fused(float a, float b, float c) { return std::fma(a, b, c); }
inline float float_of_f16(uint16_t bits) { return static_cast<float>(emulated::value_of(bits, false)); }

// Rounds to nearest even, to `digits` significant bits, for exponents of at least `least`.
inline double rounded(double value, int digits, int least) {
  if (value == 0 || !std::isfinite(value)) return value;
  int exponent;
  std::frexp(value, &exponent);
  const int unit = (exponent - 1 > least ? exponent - 1 : least) - digits + 1;
  return std::ldexp(std::nearbyint(std::ldexp(value, -unit)), unit);
}
inline uint16_t bf16_of_float(float value) {
  if (std::isnan(value)) return 0x7FFF;
  return static_cast<uint16_t>(as_bits(static_cast<float>(rounded(value, 8, -126))) >> 16);
}
inline uint16_t f16_of_float(float value) {
  if (std::isnan(value)) return 0x7FFF;
  const double near = rounded(value, 11, -14), size = std::fabs(near);
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (size >= 65536) return sign | 0x7C00;
  if (size < std::ldexp(1, -14)) return static_cast<uint16_t>(sign | static_cast<int>(std::ldexp(size, 24)));
  int exponent;
  const double fraction = std::frexp(size, &exponent);
  return static_cast<uint16_t>(sign | (exponent + 14) << 10 | (static_cast<int>(std::ldexp(fraction, 11)) & 1023));
}

inline uint32_t add_pair(uint32_t a, uint32_t b, bool bf16, double factor = 1) {
  uint32_t sum = 0;
  for (int i = 0; i < 2; i++) {
    const double exact = emulated::value_of(static_cast<uint16_t>(a >> (16 * i)), bf16) * factor +
                         emulated::value_of(static_cast<uint16_t>(b >> (16 * i)), bf16);
    const uint16_t half = bf16 ? bf16_of_float(static_cast<float>(exact)) : f16_of_float(static_cast<float>(exact));
    sum |= static_cast<uint32_t>(half) << (16 * i);
  }
  return sum;
}
inline uint32_t add_bf16(uint32_t a, uint32_t b) { return add_pair(a, b, true); }
inline uint32_t add_f16(uint32_t a, uint32_t b) { return add_pair(a, b, false); }
inline uint32_t add_sixteenth_f16(uint32_t a, uint32_t b) { return add_pair(a, b, false, 1.0 / 16); }

inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
  emulated::together(emulated::kBf16, a, b, c);
}
inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
  emulated::together(emulated::kF16, a, b, c);
}
inline void mma_s8(uint32_t (&sum)[4], const uint32_t (&a)[4], const uint32_t* b, const uint32_t (&c)[4]) {
  for (int i = 0; i < 4; i++) sum[i] = c[i];
  emulated::together(emulated::kS8, a, b, sum);
}
template <int Selector>
inline void mma_sparse_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b, uint32_t places) {
  emulated::together(Selector ? emulated::kOtherSparseBf16 : emulated::kSparseBf16, a, b, c, places);
}
template <int Selector>
inline void mma_sparse_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b, uint32_t places) {
  emulated::together(Selector ? emulated::kOtherSparseF16 : emulated::kSparseF16, a, b, c, places);
}
inline uint32_t from_neighbour(uint32_t value) {
  uint32_t got = 0;
  emulated::together(emulated::kNeighbour, &value, nullptr, &got);
  return got;
}

// Whether split-K uses clusters; set by the test.
inline bool& with_clusters() {
  static bool on = true;
  return on;
}
#define kClusters (::nybble::cuda::with_clusters())
inline void sync_cluster() { emulated::pause(3); }
inline Vector load_cluster(const void* shared, int rank) {
  auto& m = emulated::machine();
  const auto offset = static_cast<const char*>(shared) - reinterpret_cast<const char*>(m.shared[m.now->rank].data());
  return *reinterpret_cast<const Vector*>(reinterpret_cast<const char*>(m.shared[rank].data()) + offset);
}

}  // namespace cuda
}  // namespace nybble
