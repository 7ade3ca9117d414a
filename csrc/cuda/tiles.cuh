// The kernel for more tokens, or for 8-bit activations. A block has 256 outputs, 64 per warp, and 8 MT tokens, whose
// activations the warps share in shared memory. A warp unpacks weights once for up to 32 tokens, whose accumulators fit
// its registers; in a block of 64 tokens, a second team of four warps takes the other half.
#pragma once

#include "finish.cuh"

namespace nybble {
namespace cuda {

template <class W, class X, int MT>
struct Tiles {
  static constexpr int kRows = kWarps * kTile, kBlockTokens = MT * kTokens, kChunks = kTokenChunks<W, X>;
  static constexpr int kTeams = MT > 4 ? 2 : 1, kEights = MT / kTeams;  // teams of 4 warps; groups of 8 tokens per team
  static constexpr int kBlockThreads = kTeams * kThreads;
  // Minimum blocks per multiprocessor, for __launch_bounds__; 0: no constraint on registers.
  static constexpr int kBlocks = kTeams > 1 ? 1 : X::kElementBytes == 1 ? 2 : W::kBlocks;
  static constexpr int kWeights = kWarps * W::kVectors * kLanes;  // vectors of weights in a stage; those of x follow
  static constexpr int kStage = kWeights + kBlockTokens * kChunks;
  static constexpr int kStages = W::kTiles == 1 ? 4 : 3 * kStage * 16 <= kMostShared ? 3 : 2;
  static constexpr int kRing = kStages * kStage * 16;
  static constexpr int kSums = kBlockTokens * (kRows + kPad) * 4;
  static constexpr int kShared = kRing > kSums ? kRing : kSums;
  static_assert(kShared <= kMostShared, "exceeds the shared memory of some GPUs");
};

// Index of the vector that holds a token's chunk, in the x part of a stage. With four chunks per token, adjacent tokens
// already fall into different banks.
template <int Chunks>
__device__ __forceinline__ int x_vector(int token, int chunk) {
  return token * Chunks + (Chunks == 8 ? swizzle(token, chunk) : chunk);
}

// Copies a thread's share of the activations, step by step: one chunk of every kApart-th token. Tokens from m on and
// inputs from k on are read as 0.
template <class W, class X, int MT>
struct TilesInputs {
  static constexpr int kChunks = kTokenChunks<W, X>, kApart = Tiles<W, X, MT>::kBlockThreads / kChunks;
  static constexpr int kCopies = (MT * kTokens + kApart - 1) / kApart,
                       kBytes = 16 * kChunks;           // bytes per token and step
  static constexpr bool kAll = MT * kTokens >= kApart;  // whether every thread copies
  const uint8_t* from;
  int64_t apart;
  int tokens, token, chunk, k, whole;  // steps below `whole` are complete

  __device__ __forceinline__ TilesInputs(const NybbleCudaProduct& p, int64_t block, int64_t first_token)
      : apart(p.ldx * X::kElementBytes * kApart),
        tokens(static_cast<int>(p.m - first_token)),
        token(static_cast<int>(threadIdx.x) / kChunks),
        chunk(static_cast<int>(threadIdx.x) % kChunks),
        k(X::kElementBytes == 1 ? static_cast<int>(p.k_padded) : p.k),  // codes are padded as the weights are
        whole(k / (W::kTiles * kTile)) {
    from = static_cast<const uint8_t*>(p.x) + (first_token + token) * p.ldx * X::kElementBytes +
           block * kTile * X::kElementBytes + 16 * chunk;
  }
  __device__ __forceinline__ void forward() { from += kBytes; }
  __device__ __forceinline__ void copy(const NybbleCudaProduct& p, int block, Vector* x) const {
    if (!kAll && token >= MT * kTokens) return;
    Vector* to = x + x_vector<kChunks>(token, chunk);
    const bool all = block < whole * W::kTiles;
    const int bytes = all ? 16 : chunk_bytes(k, block * kTile + chunk * (16 / X::kElementBytes), X::kElementBytes);
#pragma unroll
    for (int i = 0; i < kCopies; i++) {
      const bool there = token + i * kApart < tokens;
      if (all)
        copy_async_or_zero(to + i * kApart * kChunks, from + i * apart, there);
      else
        copy_async(to + i * kApart * kChunks, there && bytes ? from + i * apart : p.x, there ? bytes : 0);
    }
  }
};

template <class W, class X, int MT>
__global__ void __launch_bounds__((Tiles<W, X, MT>::kBlockThreads), (Tiles<W, X, MT>::kBlocks))
    tiles_kernel(const NybbleCudaProduct p) {
  using T = Tiles<W, X, MT>;
  constexpr int kStages = T::kStages, kEights = T::kEights;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes % kWarps, team = threadIdx.x / kThreads;
  const int column = static_cast<int>(blockIdx.x) / p.token_tiles;
  const int64_t first_token = static_cast<int64_t>(static_cast<int>(blockIdx.x) % p.token_tiles) * T::kBlockTokens;
  // A warp beyond the last tile repeats the last; its outputs are not stored.
  int64_t tile = static_cast<int64_t>(column) * kWarps + warp;
  if (tile >= p.n_padded / kTile) tile = p.n_padded / kTile - 1;
  const int blocks = static_cast<int>(p.k_padded / kTile);
  const Range range = split_range((blocks + W::kTiles - 1) / W::kTiles, p.splits, blockIdx.y);
  const int begin = range.begin * W::kTiles, end = range.end * W::kTiles;
  Vector* ring = reinterpret_cast<Vector*>(shared_memory());
  const int own = warp * W::kVectors * kLanes + lane;

  typename W::Reader weights(p, tile, begin, lane);
  TilesInputs<W, X, MT> inputs(p, begin, first_token);
  const auto load = [&](int block, Vector* stage) {
    if (block < end) {
      if (T::kTeams == 1 || team == 0) weights.copy(block, stage + own);
      inputs.copy(p, block, stage + T::kWeights);
      weights.forward(W::kTiles);
      inputs.forward();
    }
    commit();
  };
#pragma unroll 1
  for (int i = 0; i < kStages - 1; i++) load(begin + i * W::kTiles, ring + i * T::kStage);
  Sum<W, X> acc[kEights][4][4] = {};
  int here = 0, fill = (kStages - 1) * T::kStage;
#pragma unroll 1
  for (int block = begin; block < end; block += W::kTiles) {
    arrived<kStages - 2>();
    __syncthreads();  // all of x has arrived, and the stage to be loaded next has been read
    load(block + (kStages - 1) * W::kTiles, ring + fill);
    const Vector* stage = ring + here + own;
    const Vector* x = ring + here + T::kWeights;
    const auto chunk_of = [&](int mt, int part) {
      const int chunk = X::kElementBytes == 1 ? 4 * part + thread_in_group(lane) : W::chunk(part, lane);
      const int token = (team * kEights + mt) * kTokens + group_of_lane(lane);
      return load_shared(x + x_vector<T::kChunks>(token, chunk));
    };
    if constexpr (X::kElementBytes == 1)
      multiply_s8<W, kEights>(stage, chunk_of, acc);
    else
      multiply_floats<W, X, kEights>(stage, chunk_of, acc);
    fill = here;
    here = here == (kStages - 1) * T::kStage ? 0 : here + T::kStage;
  }

  arrived<0>();
  __syncthreads();  // the sums overwrite the ring
  float* sums = reinterpret_cast<float*>(shared_memory());
#pragma unroll
  for (int mt = 0; mt < kEights; mt++)
    store_sums(acc[mt], sums, (team * kEights + mt) * kTokens, warp * kTile, T::kRows, lane);
  const Corner corner{static_cast<int64_t>(column) * T::kRows, first_token};
  reduce<EndingOf<W, X>, T::kRows, T::kBlockTokens, 1, T::kBlockThreads>(p, sums, corner);
}

}  // namespace cuda
}  // namespace nybble
