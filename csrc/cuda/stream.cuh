// Up to eight tokens: the weights stream through the warps once, and bound the time. A block has 64 outputs; its four
// warps take turns along K. A lane copies what it will read itself, so nothing waits for another warp until the sums
// are added: kStages tiles a warp are under way.
#pragma once

#include "finish.cuh"

namespace nybble {
namespace cuda {

template <class W>
struct Stream {
  static constexpr int kRows = kTile, kVectors = W::kVectors + 2;  // and the lane's chunks of x
  static constexpr int kRing = kWarps * kStages * kVectors * kLanes * 16;
  static constexpr int kSums = kWarps * kTokens * (kRows + kPad) * 4;
  static constexpr int kShared = kRing > kSums ? kRing : kSums;
};

// A tile's weights, and the lane's chunks of token g, to a lane's stage.
template <class W, class X>
__device__ __forceinline__ void stream_load(const NybbleCudaProduct& p, int64_t tile, int64_t block, int lane,
                                            Vector* stage) {
  W::load(p, tile, block, lane, stage);
  const int token = group_of_lane(lane);
  const uint8_t* row = static_cast<const uint8_t*>(p.x) + token * p.ldx * X::kElementBytes;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int64_t k = block * kTile + 8 * W::chunk(half, lane);
    const int bytes = token < p.m ? chunk_bytes(p.k, k, X::kElementBytes) : 0;
    copy_async(stage + (W::kVectors + half) * kLanes, bytes ? row + k * X::kElementBytes : p.x, bytes);
  }
}

template <class W, class X>
__global__ void __launch_bounds__(kThreads) stream_kernel(const NybbleCudaProduct p) {
  constexpr int kVectors = Stream<W>::kVectors;
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int64_t tile = blockIdx.x;
  const Range range = split_range(p.k_padded / kTile, p.splits, blockIdx.y);
  Vector* ring = reinterpret_cast<Vector*>(shared_memory()) + warp * kStages * kVectors * kLanes + lane;
  const auto stage = [&](int64_t block) {
    return ring + (block - range.begin) / kWarps % kStages * (kVectors * kLanes);
  };

  const int64_t first = range.begin + warp;
#pragma unroll
  for (int i = 0; i < kStages - 1; i++) {
    const int64_t block = first + i * kWarps;
    if (block < range.end) stream_load<W, X>(p, tile, block, lane, stage(block));
    commit();
  }
  float acc[4][4] = {};
  for (int64_t block = first; block < range.end; block += kWarps) {
    arrived<kStages - 2>();
    const int64_t next = block + (kStages - 1) * kWarps;
    if (next < range.end) stream_load<W, X>(p, tile, next, lane, stage(next));
    commit();
    const Vector* here = stage(block);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      typename W::Half w;
      W::template fragments<X>(p, here, half, w);
      Vector scales{};
      if constexpr (W::kGrouped) scales = W::scales(p, here, half);
      multiply_half<W, X>(w, load_shared(here + (W::kVectors + half) * kLanes), scales, acc);
    }
  }

  arrived<0>();
  __syncthreads();  // the sums take the ring's place
  float* sums = reinterpret_cast<float*>(shared_memory());
  float* own = sums + warp * kTokens * (kTile + kPad);
#pragma unroll
  for (int i = 0; i < 2; i++) {
    // acc[f][2 h + i]: row 8 g + 2 f + h of token 2 t + i.
    float* at = own + sum_offset(2 * thread_in_group(lane) + i, 8 * group_of_lane(lane), kTile);
    store_shared(at, {{as_bits(acc[0][i]), as_bits(acc[0][2 + i]), as_bits(acc[1][i]), as_bits(acc[1][2 + i])}});
    store_shared(at + 4, {{as_bits(acc[2][i]), as_bits(acc[2][2 + i]), as_bits(acc[3][i]), as_bits(acc[3][2 + i])}});
  }
  reduce<W, X, kTile, kTokens, kWarps>(p, sums, {tile * kTile, 0});
}

}  // namespace cuda
}  // namespace nybble
