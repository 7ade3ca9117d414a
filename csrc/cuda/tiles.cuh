// More tokens, or 8-bit activations: a block has 256 outputs, 64 of each warp, and 8 MT tokens, whose inputs its warps
// share in shared memory. The weights are unpacked once for all tokens of a block.
#pragma once

#include "finish.cuh"

namespace nybble {
namespace cuda {

template <class W, class X, int MT>
struct Tiles {
  static constexpr int kRows = kWarps * kTile, kBlockTokens = MT * kTokens;
  static constexpr int kBlocks = X::kElementBytes == 1 ? 1 : W::kBlocks;  // of a multiprocessor; 0: as ptxas chooses
  static constexpr int kWeights = kWarps * W::kVectors * kLanes;          // vectors of a stage, then those of x
  static constexpr int kStage = kWeights + kBlockTokens * X::kChunks;
  static constexpr int kRing = kStages * kStage * 16;
  static constexpr int kSums = kBlockTokens * (kRows + kPad) * 4;
  static constexpr int kShared = kRing > kSums ? kRing : kSums;
};

// Vector of x's part of a stage that holds a chunk of a token. Chunks of 8-bit codes, four a token, need no swizzle.
template <class X>
__device__ __forceinline__ int x_vector(int token, int chunk) {
  return token * X::kChunks + (X::kChunks == 8 ? swizzle(token, chunk) : chunk);
}

template <class X, int MT>
__device__ __forceinline__ void load_x(const NybbleCudaProduct& p, int64_t block, int64_t first_token, Vector* to) {
  constexpr int kChunks = MT * kTokens * X::kChunks;
#pragma unroll
  for (int i = 0; i < (kChunks + kThreads - 1) / kThreads; i++) {
    const int index = i * kThreads + static_cast<int>(threadIdx.x), token = index / X::kChunks,
              chunk = index % X::kChunks;
    if (kChunks % kThreads && index >= kChunks) break;
    const int64_t k = block * kTile + chunk * (16 / X::kElementBytes);
    // 8-bit codes are padded as the weights are.
    const int64_t end = X::kElementBytes == 1 ? p.k_padded : p.k;
    const int bytes = first_token + token < p.m ? chunk_bytes(end, k, X::kElementBytes) : 0;
    const uint8_t* row = static_cast<const uint8_t*>(p.x) + (first_token + token) * p.ldx * X::kElementBytes;
    copy_async(to + x_vector<X>(token, chunk), bytes ? row + k * X::kElementBytes : p.x, bytes);
  }
}

// A tile of 16-bit activations.
template <class W, class X, int MT>
__device__ __forceinline__ void multiply(const NybbleCudaProduct& p, const Vector* weights, const Vector* x, int lane,
                                         float (&acc)[MT][4][4]) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    Vector scales{};
    if constexpr (W::kGrouped) scales = W::scales(p, weights, half);
    typename W::Half w;
    W::template fragments<X>(p, weights, half, w);
#pragma unroll
    for (int mt = 0; mt < MT; mt++) {
      const int token = mt * kTokens + group_of_lane(lane);
      const Vector chunk = load_shared(x + x_vector<X>(token, W::chunk(half, lane)));
      multiply_half<W, X>(w, chunk, scales, acc[mt]);
    }
  }
}

// A tile of 8-bit codes: acc += scale * (16 sum of q (n - 8) - 16 (z - 8) sum of q), where ones times q is the last
// sum.
template <int MT>
__device__ __forceinline__ void multiply_s8(const NybbleCudaProduct& p, const Vector* weights, const Vector* x,
                                            int lane, float (&acc)[MT][4][4]) {
#pragma unroll 1  // else registers spill
  for (int half = 0; half < 2; half++) {
    uint32_t a[4][4];
#pragma unroll
    for (int f = 0; f < 4; f++) {
      const Vector codes = load_shared(weights + f * kLanes);
      S8::nibbles(half ? codes.w[2] : codes.w[0], half ? codes.w[3] : codes.w[1], a[f]);
    }
    const Vector scales = Frag4::scales(p, weights, half);
    const Frag4::Zeros zeros = Frag4::zeros(p, weights, half);
#pragma unroll
    for (int mt = 0; mt < MT; mt++) {
      const Vector codes = load_shared(x + x_vector<S8>(mt * kTokens + group_of_lane(lane), thread_in_group(lane)));
      const uint32_t b[2] = {half ? codes.w[2] : codes.w[0], half ? codes.w[3] : codes.w[1]};
      float total[2] = {0, 0};
      if (p.zero_point) {
        const uint32_t ones[4] = {S8::kOnes, S8::kOnes, S8::kOnes, S8::kOnes};
        uint32_t sum[4] = {S8::kMagicBits, S8::kMagicBits, S8::kMagicBits, S8::kMagicBits};
        mma_s8(sum, ones, b);
        total[0] = as_float(sum[0]) - S8::kMagic;
        total[1] = as_float(sum[1]) - S8::kMagic;
      }
#pragma unroll
      for (int f = 0; f < 4; f++) {
        uint32_t sum[4] = {S8::kMagicBits, S8::kMagicBits, S8::kMagicBits, S8::kMagicBits};
        mma_s8(sum, a[f], b);
        const float scale[2] = {as_float(scales.w[f] << 16), as_float(scales.w[f] & 0xFFFF0000u)};
#pragma unroll
        for (int i = 0; i < 4; i++) {
          float product = as_float(sum[i]) - S8::kMagic;
          if (p.zero_point) {
            const int zero = static_cast<int>(zeros.of(2 * f + (i >> 1)));
            product = fused(static_cast<float>(16 * (8 - zero)), total[i & 1], product);
          }
          acc[mt][f][i] = fused(scale[i >> 1], product, acc[mt][f][i]);
        }
      }
    }
  }
}

template <class W, class X, int MT>
__global__ void __launch_bounds__(kThreads, (Tiles<W, X, MT>::kBlocks)) tiles_kernel(const NybbleCudaProduct p) {
  using T = Tiles<W, X, MT>;
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int64_t tiles = p.n_padded / kTile, first_token = static_cast<int64_t>(blockIdx.z) * T::kBlockTokens;
  // A warp beyond the last tile repeats it; its outputs are not stored.
  int64_t tile = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (tile >= tiles) tile = tiles - 1;
  const Range range = split_range(p.k_padded / kTile, p.splits, blockIdx.y);
  Vector* ring = reinterpret_cast<Vector*>(shared_memory());
  const int own = warp * W::kVectors * kLanes + lane;
  const auto stage = [&](int64_t block) { return ring + (block - range.begin) % kStages * T::kStage; };
  const auto load = [&](int64_t block) {
    if (block < range.end) {
      W::load(p, tile, block, lane, stage(block) + own);
      load_x<X, MT>(p, block, first_token, stage(block) + T::kWeights);
    }
    commit();
  };

#pragma unroll
  for (int i = 0; i < kStages - 1; i++) load(range.begin + i);
  float acc[MT][4][4] = {};
  for (int64_t block = range.begin; block < range.end; block++) {
    arrived<kStages - 2>();
    __syncthreads();  // x has come for everyone, and the stage that is loaded next has been read
    load(block + kStages - 1);
    const Vector* weights = stage(block) + own;
    const Vector* x = stage(block) + T::kWeights;
    if constexpr (X::kElementBytes == 1)
      multiply_s8<MT>(p, weights, x, lane, acc);
    else
      multiply<W, X, MT>(p, weights, x, lane, acc);
  }

  arrived<0>();
  __syncthreads();  // the sums take the ring's place
  float* sums = reinterpret_cast<float*>(shared_memory());
#pragma unroll
  for (int mt = 0; mt < MT; mt++) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float (&c)[4][4] = acc[mt];
      const int token = mt * kTokens + 2 * thread_in_group(lane) + i;
      float* at = sums + sum_offset(token, warp * kTile + 8 * group_of_lane(lane), T::kRows);
      store_shared(at, {{as_bits(c[0][i]), as_bits(c[0][2 + i]), as_bits(c[1][i]), as_bits(c[1][2 + i])}});
      store_shared(at + 4, {{as_bits(c[2][i]), as_bits(c[2][2 + i]), as_bits(c[3][i]), as_bits(c[3][2 + i])}});
    }
  }
  reduce<W, X, T::kRows, T::kBlockTokens, 1>(p, sums, {static_cast<int64_t>(blockIdx.x) * T::kRows, first_token});
}

}  // namespace cuda
}  // namespace nybble
