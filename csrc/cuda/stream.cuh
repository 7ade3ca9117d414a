// The kernel for up to 8 tokens, bound by reading the weights once. A block has 64 outputs; its four warps take turns
// along K. Each lane copies only what it reads itself, so warps need no synchronization until the final reduction. Each
// warp keeps kStages tiles in flight.
#pragma once

#include "finish.cuh"

namespace nybble {
namespace cuda {

template <class W>
struct Stream {
  static constexpr int kStages = 4, kRows = kTile, kVectors = W::kVectors + 2;  // weights, and two chunks of x
  static constexpr int kStage = kVectors * kLanes;
  static constexpr int kRing = kWarps * kStages * kStage * 16;
  static constexpr int kSums = kWarps * kTokens * (kRows + kPad) * 4;
  static constexpr int kShared = kRing > kSums ? kRing : kSums;
  static_assert(kShared <= kMostShared, "exceeds the shared memory of some GPUs");
};

// Copies a lane's chunks of token g, tile by tile. Tokens from m on and inputs from k on are read as 0.
template <class W, class X>
struct StreamInputs {
  static constexpr int kBytes = kTile * X::kElementBytes;  // per token and tile
  const uint8_t* first;
  bool there;    // whether token g exists
  int k, whole;  // tiles below `whole` are complete

  __device__ __forceinline__ StreamInputs(const NybbleCudaProduct& p, int64_t block, int lane)
      : there(group_of_lane(lane) < p.m), k(p.k), whole(p.k / kTile) {
    const uint8_t* row = static_cast<const uint8_t*>(p.x) + group_of_lane(lane) * p.ldx * X::kElementBytes;
    first = row + block * kBytes + 16 * W::chunk(0, lane);
  }
  __device__ __forceinline__ void forward(int blocks) { first += blocks * kBytes; }
  __device__ __forceinline__ void copy(const NybbleCudaProduct& p, int block, int lane, Vector* to) const {
    const int apart = 16 * (W::chunk(1, 0) - W::chunk(0, 0));
    if (block < whole) {
      copy_async_or_zero(to, first, there);
      copy_async_or_zero(to + kLanes, first + apart, there);
      return;
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int bytes = there ? chunk_bytes(k, block * kTile + 8 * W::chunk(half, lane), X::kElementBytes) : 0;
      copy_async(to + half * kLanes, bytes ? first + half * apart : p.x, bytes);
    }
  }
};

template <class W, class X>
__global__ void __launch_bounds__(kThreads) stream_kernel(const NybbleCudaProduct p) {
  using S = Stream<W>;
  constexpr int kStages = S::kStages;
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int64_t tile = blockIdx.x;
  const Range range = split_range(static_cast<int>(p.k_padded / kTile), p.splits, blockIdx.y);
  Vector* ring = reinterpret_cast<Vector*>(shared_memory()) + warp * kStages * S::kStage + lane;

  const int first = range.begin + warp, end = range.end;
  typename W::Reader weights(p, tile, first, lane);
  StreamInputs<W, X> inputs(p, first, lane);
  const auto load = [&](int block, Vector* stage) {
    if (block < end) {
      weights.copy(block, stage);
      inputs.copy(p, block, lane, stage + W::kVectors * kLanes);
      weights.forward(kWarps);
      inputs.forward(kWarps);
    }
    commit();
  };
#pragma unroll 1
  for (int i = 0; i < kStages - 1; i++) load(first + i * kWarps, ring + i * S::kStage);
  float acc[1][4][4] = {};
  int here = 0, fill = (kStages - 1) * S::kStage;
#pragma unroll 1
  for (int block = first; block < end; block += kWarps) {
    arrived<kStages - 2>();
    load(block + (kStages - 1) * kWarps, ring + fill);
    const Vector* stage = ring + here;
    multiply_floats<W, X>(
        stage, [&](int, int half) { return load_shared(stage + (W::kVectors + half) * kLanes); }, acc);
    fill = here;
    here = here == (kStages - 1) * S::kStage ? 0 : here + S::kStage;
  }

  arrived<0>();
  __syncthreads();  // the sums overwrite the ring
  float* sums = reinterpret_cast<float*>(shared_memory());
  store_sums(acc[0], sums + warp * kTokens * (kTile + kPad), 0, 0, kTile, lane);
  reduce<EndingOf<W, X>, kTile, kTokens, kWarps, kThreads>(p, sums, {tile * kTile, 0});
}

}  // namespace cuda
}  // namespace nybble
