// An emulator that implements csrc/cuda/hopper.cuh on a CPU, following the PTX manual: mbarriers with phases and byte
// counts, TMA copies with their swizzle, wgmma from descriptors and registers. The threads of a cluster are fibers, as
// in emulate_cuda.h. Warps run in any order: a few have priority, and the priorities change from time to time.
//
// Copies complete either at once, or only when no thread can continue, in any order. A wgmma reads its operands either
// when it is issued, or only in the wait that completes it. So stages that are read or overwritten too early are
// detected.
#pragma once

#include <algorithm>
#include <numeric>

#include "emulate_cuda.h"

#define __grid_constant__

namespace nybble {
namespace cuda {

using Barrier = uint64_t;

struct TensorMap {
  const uint8_t* codes;
  int64_t rows, columns;
  int box_rows;
};

namespace emulated {

constexpr uint32_t kSharedBase = 0x410;  // start of shared memory, aligned to 16 bytes only
constexpr int kWarpWaits = 1, kBlockWaits = 2, kClusterWaits = 3, kNameWaits = 4, kBarrierWaits = 5;  // Fiber::waits

struct BarrierState {
  int arrivals, left;
  int64_t bytes = 0;
  uint32_t phase = 0;
  bool published = false;
};

struct Wgmma {
  int32_t* c;
  const uint32_t* a;  // in registers, or null
  uint64_t a_operand, b_operand;
  int n, add, group;
};

// Pending operations of a thread.
struct Thread {
  Barrier* barrier = nullptr;
  uint32_t parity = 0;
  int name = 0, committed = 0, issued = 0;
  bool fenced = false;
  std::vector<Wgmma> products;
  std::function<void(Fiber* const*)> together;  // warp-wide operation, run when all lanes wait
};

struct Hopper {
  bool late_copies = true, late_products = true;
  std::map<Barrier*, BarrierState> barriers;
  std::vector<std::function<void()>> copies;
  std::vector<std::pair<const uint8_t*, size_t>> readable;  // memory that copy_bytes may read
  std::vector<Thread> threads;
  std::vector<int> left;  // number of finished threads, by block
};

inline Hopper& hopper() {
  static Hopper one;
  return one;
}
inline Thread& thread_of(const Fiber* fiber) {
  return hopper().threads[fiber->rank * machine().threads + fiber->thread.x];
}
inline Thread& mine() { return thread_of(machine().now); }

inline unsigned drawn(unsigned below) {
  Machine& m = machine();
  m.order = m.order * 1664525u + 1013904223u;
  return (m.order >> 8) % below;
}

inline BarrierState& state_of(Barrier* barrier) {
  const auto found = hopper().barriers.find(barrier);
  if (found == hopper().barriers.end()) fail("a barrier is not initialized");
  return found->second;
}
inline void turn(BarrierState& state) {
  if (state.left < 0) fail("a barrier has more arrivals than expected");
  if (state.left || state.bytes) return;
  state.left = state.arrivals;
  state.phase++;
}
inline void arrive_once(Barrier* barrier) {
  BarrierState& state = state_of(barrier);
  state.left--;
  turn(state);
}
inline bool complete(Barrier* barrier, uint32_t parity) { return (state_of(barrier).phase & 1) != parity; }
inline void come(Barrier* barrier, int64_t bytes) {
  BarrierState& state = state_of(barrier);
  if (!state.published) fail("a copy uses a barrier that is not yet visible to the TMA");
  state.bytes -= bytes;
  turn(state);
}

// A byte of the shared memory of a block that has not exited.
inline uint8_t* shared_byte(int block, uint32_t address) {
  Machine& m = machine();
  auto& shared = m.shared[block];
  if (address < kSharedBase || address - kSharedBase >= shared.size() * 16) fail("an address outside shared memory");
  if (hopper().left[block] == m.threads) fail("access to shared memory of a block that has exited");
  return reinterpret_cast<uint8_t*>(shared.data()) + (address - kSharedBase);
}
// The 128-byte swizzle: bits 4-6 of an address are exchanged with bits 7-9.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 3 & 0x70); }

// 32 inputs of a row of an operand in shared memory, K-major with the 128-byte swizzle.
inline void operand_row(int block, uint64_t operand, int row, int8_t* to) {
  const uint32_t start = static_cast<uint32_t>(operand & 0x3FFF) << 4;
  const uint32_t eight_rows = static_cast<uint32_t>(operand >> 32 & 0x3FFF) << 4;
  if (operand >> 62 != 1 || (operand >> 49 & 7)) fail("a descriptor without the 128-byte swizzle");
  for (int chunk = 0; chunk < 2; chunk++) {
    const uint32_t address = swizzled(start + row / 8 * eight_rows + row % 8 * 128 + 16 * chunk);
    std::memcpy(to + 16 * chunk, shared_byte(block, address), 16);
  }
}

// Computes one warp's 16 rows of a warpgroup's product.
inline void multiply_rows(Fiber* const* lanes, const Wgmma* (&of)[kLanes]) {
  static int8_t a[16][32], b[256][32];
  const int first = 16 * (lanes[0]->warp % 4);
  for (int lane = 0; lane < kLanes; lane++) {
    const Wgmma &one = *of[lane], &same = *of[0];
    if (one.a_operand != same.a_operand || one.b_operand != same.b_operand || one.n != same.n || one.add != same.add)
      fail("a warp's lanes multiply different operands");
    if (!one.a) continue;
    for (int i = 0; i < 16; i++)  // a[i / 4]: row g + 8 (i / 4 % 2), column 16 (i / 8) + 4 t + i % 4
      a[lane / 4 + 8 * (i / 4 % 2)][16 * (i / 8) + 4 * (lane % 4) + i % 4] =
          static_cast<int8_t>(one.a[i / 4] >> 8 * (i % 4));
  }
  if (!of[0]->a)
    for (int row = 0; row < 16; row++) operand_row(lanes[0]->rank, of[0]->a_operand, first + row, a[row]);
  for (int row = 0; row < of[0]->n; row++) operand_row(lanes[0]->rank, of[0]->b_operand, row, b[row]);
  for (int lane = 0; lane < kLanes; lane++)
    for (int i = 0; i < of[0]->n / 2; i++) {  // row g + 8 (i / 2 % 2), column 8 (i / 4) + 2 t + i % 2
      const int8_t *x = a[lane / 4 + 8 * (i / 2 % 2)], *y = b[8 * (i / 4) + 2 * (lane % 4) + i % 2];
      int32_t sum = 0;
      for (int k = 0; k < 32; k++) sum += x[k] * y[k];
      int32_t& c = of[lane]->c[i];
      c = (of[lane]->add ? c : 0) + sum;
    }
}

// Executes and removes a warp's products, except for those of the last `pending` groups.
inline void finish_products(Fiber* const* lanes, int pending) {
  std::vector<Thread*> threads;
  for (int lane = 0; lane < kLanes; lane++) threads.push_back(&thread_of(lanes[lane]));
  const auto& first = *threads[0];
  size_t count = 0;
  while (count < first.products.size() && first.products[count].group < first.committed - pending) count++;
  for (Thread* thread : threads)
    if (thread->committed != first.committed || thread->products.size() != first.products.size())
      fail("a warp's lanes issue different products");
  for (size_t i = 0; i < count; i++) {
    const Wgmma* of[kLanes];
    for (int lane = 0; lane < kLanes; lane++) of[lane] = &threads[lane]->products[i];
    multiply_rows(lanes, of);
  }
  for (Thread* thread : threads) thread->products.erase(thread->products.begin(), thread->products.begin() + count);
}

inline void as_warp(std::function<void(Fiber* const*)> act) {
  mine().together = std::move(act);
  pause(kWarpWaits);
}

inline void issue(const Wgmma& product) {
  Thread& me = mine();
  if (!me.fenced) fail("a wgmma without wgmma_fence since the last wait");
  me.products.push_back(product);
  me.products.back().group = me.committed;
  me.issued++;
  if (!hopper().late_products) as_warp([](Fiber* const* lanes) { finish_products(lanes, -1); });
}

inline void copy_when_it_comes(std::function<void()> copy) {
  if (hopper().late_copies)
    hopper().copies.push_back(std::move(copy));
  else
    copy();
}

// Lets the threads of a warp run until each waits.
inline bool run_warp(size_t warp) {
  Machine& m = machine();
  bool moved = false;
  for (size_t i = warp * kLanes; i < (warp + 1) * kLanes; i++) {
    Fiber* fiber = m.fibers[i].get();
    const Thread& thread = hopper().threads[i];
    if (fiber->waits == kBarrierWaits && complete(thread.barrier, thread.parity)) fiber->waits = 0;
    if (fiber->done || fiber->waits) continue;
    m.now = fiber;
    swapcontext(&m.scheduler, &fiber->context);
    hopper().left[fiber->rank] += fiber->done;
    moved = true;
  }
  return moved;
}

// If all `count` fibers from `begin` on wait at the same kind of barrier, lets them continue and returns true.
inline bool release(size_t begin, size_t count, int kind, int name = 0) {
  Machine& m = machine();
  for (size_t i = begin; i < begin + count; i++) {
    if (m.fibers[i]->waits != kind || (kind == kNameWaits && hopper().threads[i].name != name)) return false;
  }
  if (kind == kWarpWaits) {
    Fiber* lanes[kLanes];
    for (int i = 0; i < kLanes; i++) lanes[i] = m.fibers[begin + i].get();
    hopper().threads[begin].together(lanes);
  }
  for (size_t i = begin; i < begin + count; i++) m.fibers[i]->waits = 0;
  return true;
}

// One scheduling step: runs the first warp of `preferred` that can continue, else releases a cluster barrier, else
// completes a late copy. A warp-wide operation is a separate step, so that other warps can run before it.
inline bool step(const std::vector<size_t>& preferred) {
  Machine& m = machine();
  for (size_t warp : preferred) {
    const size_t group = warp / kWarps * kWarps * kLanes;
    if (release(warp * kLanes, kLanes, kWarpWaits) || run_warp(warp)) return true;
    if (release(group, kWarps * kLanes, kNameWaits, hopper().threads[group].name)) return true;
    if (release(warp * kLanes / m.threads * m.threads, m.threads, kBlockWaits)) return true;
  }
  if (release(0, m.fibers.size(), kClusterWaits)) return true;
  auto& copies = hopper().copies;
  if (copies.empty()) return false;
  std::swap(copies[drawn(static_cast<unsigned>(copies.size()))], copies.back());
  const auto copy = std::move(copies.back());
  copies.pop_back();
  copy();
  return true;
}

// Runs the cluster of `blocks` blocks from x on, of a grid with `grid` blocks of `threads` threads.
inline void run_blocks(int grid, int x, int blocks, int threads, size_t shared_bytes, std::function<void()> kernel) {
  Machine& m = machine();
  Hopper& h = hopper();
  m.fibers.clear();
  m.shared.assign(blocks, std::vector<Vector>(shared_bytes / 16));
  for (auto& block : m.shared) std::memset(block.data(), 0xFB, shared_bytes);
  m.pending_reads.clear();
  m.grid = {grid, 1, 1};
  m.threads = threads;
  h.left.assign(blocks, 0);
  h.barriers.clear();
  h.threads.assign(blocks * threads, Thread{});
  for (int i = 0; i < blocks * threads; i++) add_fiber(i % threads, {x + i / threads, 0, 0}, i / threads, kernel);
  std::vector<size_t> preferred(blocks * threads / kLanes);
  std::iota(preferred.begin(), preferred.end(), 0);
  for (size_t i = preferred.size(); i > 1; i--) std::swap(preferred[i - 1], preferred[drawn(static_cast<unsigned>(i))]);
  const size_t early = drawn(2), half = preferred.size() / blocks;  // one block runs ahead of the other
  if (blocks > 1)
    std::stable_partition(preferred.begin(), preferred.end(), [=](size_t w) { return w / half == early; });
  do {
    const auto warps = static_cast<unsigned>(preferred.size());
    if (drawn(4) == 0) std::swap(preferred[drawn(warps)], preferred[drawn(warps)]);
  } while (step(preferred));
  for (int i = 0; i < blocks * threads; i++) {
    if (!m.fibers[i]->done) fail("deadlock");
    if (!h.threads[i].products.empty()) fail("a thread exited before its products were complete");
    if (h.threads[i].issued != h.threads[i / kThreads * kThreads].issued)
      fail("a warpgroup's warps issue different products");
  }
  if (!h.copies.empty()) fail("a block exited before its copies were complete");
}

}  // namespace emulated

inline uint32_t shared_address(const void* p) {
  const auto* begin =
      reinterpret_cast<const uint8_t*>(emulated::machine().shared[emulated::machine().now->rank].data());
  return static_cast<uint32_t>(static_cast<const uint8_t*>(p) - begin) + emulated::kSharedBase;
}

inline void init_barrier(Barrier* barrier, int arrivals) {
  if (reinterpret_cast<uintptr_t>(barrier) % 8) emulated::fail("a barrier is not aligned");
  emulated::hopper().barriers[barrier] = {arrivals, arrivals};
}
inline void publish_barriers() {
  for (auto& each : emulated::hopper().barriers) each.second.published = true;
}
inline Barrier* barrier_of(Barrier* barrier, int block) {
  return reinterpret_cast<Barrier*>(emulated::shared_byte(block, shared_address(barrier)));
}
inline void arrive_at(Barrier* barrier, int block) { emulated::arrive_once(barrier_of(barrier, block)); }
inline void arrive_expecting(Barrier* barrier, int bytes) {
  emulated::state_of(barrier).bytes += bytes;
  emulated::arrive_once(barrier);
}
inline void wait(Barrier* barrier, uint32_t parity) {
  auto& me = emulated::mine();
  me.barrier = barrier;
  me.parity = parity;
  if (!emulated::complete(barrier, parity)) emulated::pause(emulated::kBarrierWaits);
}

inline void copy_box_to(uint16_t blocks, void* to, const TensorMap* map, Barrier* barrier, int column, int row) {
  const uint32_t address = shared_address(to);
  if (address % 1024) emulated::fail("a swizzled box is not aligned");
  const TensorMap of = *map;
  for (int block = 0; block < 16; block++) {
    if (!(blocks >> block & 1)) continue;
    Barrier* there = barrier_of(barrier, block);
    emulated::copy_when_it_comes([=] {
      for (int r = 0; r < of.box_rows; r++)
        for (int i = 0; i < 128; i++) {
          const bool inside = row + r < of.rows && column + i < of.columns;
          *emulated::shared_byte(block, emulated::swizzled(address + 128 * r + i)) =
              inside ? of.codes[(row + r) * of.columns + column + i] : 0;
        }
      emulated::come(there, 128 * of.box_rows);
    });
  }
}
inline void copy_box(void* to, const TensorMap* map, Barrier* barrier, int column, int row) {
  copy_box_to(static_cast<uint16_t>(1 << emulated::machine().now->rank), to, map, barrier, column, row);
}
inline void copy_bytes(void* to, const void* from, int bytes, Barrier* barrier) {
  const uint8_t* bytes_from = static_cast<const uint8_t*>(from);
  if (shared_address(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16 || bytes <= 0)
    emulated::fail("a copy is not aligned");
  bool inside = false;
  for (const auto& range : emulated::hopper().readable)
    inside = inside || (bytes_from >= range.first && bytes_from + bytes <= range.first + range.second);
  if (!inside) emulated::fail("a copy reads beyond its tensor");
  emulated::copy_when_it_comes([=] {
    std::memcpy(to, from, bytes);
    emulated::come(barrier, bytes);
  });
}

inline void store_shared_8(void* to, uint32_t first, uint32_t second) {
  if (shared_address(to) % 8) emulated::fail("a store is not aligned");
  const uint32_t pair[2] = {first, second};
  std::memcpy(to, pair, 8);
}
inline uint32_t from_lane_xor(uint32_t value, int mask) {
  uint32_t got = 0;
  emulated::machine().now->exchange = {&value, nullptr, &got, mask, 0};
  emulated::as_warp([](emulated::Fiber* const* lanes) {
    for (int lane = 0; lane < kLanes; lane++) {
      const auto& e = lanes[lane]->exchange;
      *static_cast<uint32_t*>(e.c) = *lanes[lane ^ e.kind]->exchange.a;
    }
  });
  return got;
}
inline void sync_warpgroup(int name) {
  emulated::mine().name = name;
  emulated::pause(emulated::kNameWaits);
}
inline int block_of_cluster() { return emulated::machine().now->rank; }
inline void sync_blocks() { emulated::pause(emulated::kClusterWaits); }
template <int>
inline void shrink_registers() {}
template <int>
inline void grow_registers() {}

inline void wgmma_fence() { emulated::mine().fenced = true; }
inline void wgmma_commit() { emulated::mine().committed++; }
template <int Pending, int N>
inline void wgmma_wait(int32_t (&)[N]) {
  emulated::mine().fenced = false;
  emulated::as_warp([](emulated::Fiber* const* lanes) { emulated::finish_products(lanes, Pending); });
}
inline void wgmma_s8(int32_t (&c)[128], uint64_t a, uint64_t b, int add) {
  emulated::issue({c, nullptr, a, b, 256, add, 0});
}
inline void wgmma_s8(int32_t (&c)[64], uint64_t a, uint64_t b, int add) {
  emulated::issue({c, nullptr, a, b, 128, add, 0});
}
inline void wgmma_s8(int32_t (&c)[32], const uint32_t* a, uint64_t b, int add) {
  emulated::issue({c, a, 0, b, 64, add, 0});
}

}  // namespace cuda
}  // namespace nybble
