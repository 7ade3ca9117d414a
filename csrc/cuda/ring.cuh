// A ring of stages in shared memory between the thread that copies and the warps that multiply. Of each stage one
// barrier is complete when its bytes have come, `full`, and one when all warps have read it, `empty`. Steps take stages
// in turn; what lies after the ring is the kernel's own. Two blocks form a cluster and each copies for both, so a stage
// is empty when the warps of both have read theirs.
#pragma once

#include "hopper.cuh"
#include "wgmma_maps.h"

namespace nybble {
namespace cuda {

constexpr int kPair = 2;                            // blocks of a cluster
constexpr uint16_t kBothBlocks = (1 << kPair) - 1;  // as the multicast wants them

// Where a step's stage is, and whether the ring has been round an odd number of times before.
struct Slot {
  int index;
  uint32_t parity;
};

template <int Stages, int StageBytes>
struct Ring {
  static_assert(StageBytes % kAtomBytes == 0, "a stage starts where the swizzle does");
  static constexpr int kBarriers = Stages * 2 * static_cast<int>(sizeof(Barrier));
  static constexpr int kBytes = kAtomBytes + Stages * StageBytes + kBarriers;  // the first of them to align it

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

  // All threads of the block: the barriers, for so many warps that read.
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
  // All threads of the block, at their end: its memory is there until the other block has done with it.
  __device__ __forceinline__ void leave() const { sync_blocks(); }

  // The thread that copies: the stage is free, and so many bytes will come.
  __device__ __forceinline__ Barrier* fill(const Slot& slot, int bytes) const {
    wait(empty(slot.index), slot.parity ^ 1);
    arrive_expecting(full(slot.index), bytes);
    return full(slot.index);
  }
  // The warps that read.
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

// Which tiles a block takes, where clusters take pairs of them in turn, and which block of its cluster it is.
struct Turn {
  int64_t first, step;
  int block;
};
__device__ __forceinline__ Turn turn_of_block() { return {blockIdx.x / kPair, gridDim.x / kPair, block_of_cluster()}; }

}  // namespace cuda
}  // namespace nybble
