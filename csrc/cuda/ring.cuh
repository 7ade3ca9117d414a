// A ring buffer of stages in shared memory between the producer thread, which issues TMA copies, and the consumer
// warps, which multiply. Each stage has two barriers: `full` completes when its bytes have arrived, `empty` when all
// consumer warps have read it. Two blocks form a cluster and each copies for both, so a stage is empty when the
// consumers of both blocks have read it. Memory after the ring is free for the kernel.
#pragma once

#include "hopper.cuh"
#include "wgmma_maps.h"

namespace nybble {
namespace cuda {

constexpr int kPair = 2;                            // blocks per cluster
constexpr uint16_t kBothBlocks = (1 << kPair) - 1;  // multicast mask

// Stage of a step, and the parity of the number of completed rounds through the ring.
struct Slot {
  int index;
  uint32_t parity;
};

template <int Stages, int StageBytes>
struct Ring {
  static_assert(StageBytes % kAtomBytes == 0, "stages must be aligned to the swizzle pattern");
  static constexpr int kBarriers = Stages * 2 * static_cast<int>(sizeof(Barrier));
  static constexpr int kBytes = kAtomBytes + Stages * StageBytes + kBarriers;  // with room to align the first stage

  unsigned char* stages;

  static __device__ __forceinline__ Ring here() {
    unsigned char* memory = shared_memory();
    return {memory + to_atom(shared_address(memory))};
  }
  __device__ __forceinline__ unsigned char* stage(const Slot& slot) const { return stages + slot.index * StageBytes; }
  __device__ __forceinline__ Barrier* full(int index) const {
    return reinterpret_cast<Barrier*>(stages + Stages * StageBytes) + index;
  }
  __device__ __forceinline__ Barrier* empty(int index) const { return full(Stages + index); }
  __device__ __forceinline__ unsigned char* after() const { return stages + Stages * StageBytes + kBarriers; }

  // Called by all threads of the block: initializes the barriers for `readers` consumer warps per block.
  __device__ __forceinline__ void set_up(int readers) const {
    if (threadIdx.x == 0) {
      for (int i = 0; i < Stages; i++) {
        init_barrier(full(i), 1);
        init_barrier(empty(i), readers * kPair);
      }
      publish_barriers();
    }
    sync_blocks();
  }
  // Called by all threads of the block before they exit: keeps its shared memory alive until the other block is done.
  __device__ __forceinline__ void leave() const { sync_blocks(); }

  // Producer: waits until the stage is empty, and announces the bytes to come.
  __device__ __forceinline__ Barrier* fill(const Slot& slot, int bytes) const {
    wait(empty(slot.index), slot.parity ^ 1);
    arrive_expecting(full(slot.index), bytes);
    return full(slot.index);
  }
  // Consumers: wait for a stage, and release it.
  __device__ __forceinline__ void wait_full(const Slot& slot) const { wait(full(slot.index), slot.parity); }
  __device__ __forceinline__ void give_back(int index) const {
    const int lane = threadIdx.x % kLanes;
    if (lane < kPair) arrive_at(empty(index), lane);
  }

  static __device__ __forceinline__ void advance(Slot& slot) {
    if (++slot.index < Stages) return;
    slot.index = 0;
    slot.parity ^= 1;
  }
};

// Tile scheduling: a cluster takes pairs of tiles first, first + step, ...; block: rank within the cluster.
struct Turn {
  int64_t first, step;
  int block;
};
__device__ __forceinline__ Turn turn_of_block() { return {blockIdx.x / kPair, gridDim.x / kPair, block_of_cluster()}; }

}  // namespace cuda
}  // namespace nybble
