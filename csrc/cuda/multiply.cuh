// One step along K: multiplies the weights in a lane's stage with the activations of MT groups of 8 tokens.
#pragma once

#include "sparse.cuh"

namespace nybble {
namespace cuda {

// Whether sums are integers over all of K; scales and zero points are then applied in the epilogue.
template <class W, class X>
constexpr bool kExact = X::kElementBytes == 1 && !W::kGrouped;

template <bool Exact>
struct SumOf {
  using Type = float;
};
template <>
struct SumOf<true> {
  using Type = uint32_t;
};
template <class W, class X>
using Sum = typename SumOf<kExact<W, X>>::Type;

// Chunks of 16 bytes of a token's activations in a step.
template <class W, class X>
constexpr int kTokenChunks = W::kTiles * kTile * X::kElementBytes / 16;

// total += scale * sum for rows 2 f and 2 f + 1 of a fragment, whose bf16 scales share a word.
__device__ __forceinline__ void add_scaled(uint32_t scales, const float (&sum)[4], float (&total)[4]) {
  const float scale[2] = {as_float(scales << 16), as_float(scales & 0xFFFF0000u)};
#pragma unroll
  for (int i = 0; i < 4; i++) total[i] = fused(scale[i >> 1], sum[i], total[i]);
}

// Fragments of weights that a lane holds in registers at a time.
constexpr int kHeld = 2;

// 16-bit activations. chunk_of(mt, half): the lane's chunk for its token of group mt.
template <class W, class X, int MT, class ChunkOf>
__device__ __forceinline__ void multiply_floats(const Vector* stage, const ChunkOf& chunk_of, float (&acc)[MT][4][4]) {
  constexpr int kEach = 2 / W::kParts;  // halves per part
#pragma unroll
  for (int part = 0; part < W::kParts; part++) {
    const Vector scales = W::scales(stage, part);
    const Zeros zero = W::zeros(stage, part);
#pragma unroll
    for (int first = 0; first < 4; first += kHeld) {
      typename W::Fragment w[kHeld][kEach];
#pragma unroll
      for (int f = 0; f < kHeld; f++)
#pragma unroll
        for (int e = 0; e < kEach; e++) W::template fragment<X>(stage, 0, part * kEach + e, first + f, zero, w[f][e]);
#pragma unroll
      for (int mt = 0; mt < MT; mt++) {
        Vector x[kEach];
#pragma unroll
        for (int e = 0; e < kEach; e++) x[e] = W::right(chunk_of(mt, part * kEach + e));
#pragma unroll
        for (int f = 0; f < kHeld; f++) {
          float (&total)[4] = acc[mt][first + f];
          float sum[4] = {0, 0, 0, 0};
#pragma unroll
          for (int e = 0; e < kEach; e++) W::template multiply<X>(w[f][e], first + f, x[e], W::kGrouped ? sum : total);
          if (W::kGrouped) add_scaled(scales.w[first + f], sum, total);
        }
      }
    }
  }
}

// 8-bit activations and weights with group scales. chunk_of(mt, tile): both halves of the lane's codes. The int32 sum
// of a part, at most 128 products of up to 2^14, is converted to float once.
template <class W, int MT, class ChunkOf>
__device__ __forceinline__ void multiply_s8(const Vector* stage, const ChunkOf& chunk_of, float (&acc)[MT][4][4]) {
  constexpr int kHalves = 2 * W::kTiles, kEach = kHalves / W::kParts, kChunks = (kEach + 1) / 2;
  const uint32_t magic[4] = {S8::kMagicBits, S8::kMagicBits, S8::kMagicBits, S8::kMagicBits};
#pragma unroll 2  // unrolling by 4 spills registers
  for (int part = 0; part < W::kParts; part++) {
    const Vector scales = W::scales(stage, part);
    const Zeros zero = W::zeros(stage, part);
#pragma unroll
    for (int first = 0; first < 4; first += kHeld) {
      uint32_t a[kHeld][kEach][4];
#pragma unroll
      for (int f = 0; f < kHeld; f++)
#pragma unroll
        for (int e = 0; e < kEach; e++) {
          const int half = part * kEach + e;
          W::fragment_s8(stage, half / 2, half % 2, first + f, zero, a[f][e]);
        }
#pragma unroll
      for (int mt = 0; mt < MT; mt++) {
        Vector x[kChunks];
#pragma unroll
        for (int i = 0; i < kChunks; i++) x[i] = chunk_of(mt, part * kEach / 2 + i);
#pragma unroll
        for (int f = 0; f < kHeld; f++) {
          uint32_t sum[4];
          mma_s8(sum, a[f][0], x[0].w + 2 * (part * kEach % 2), magic);
#pragma unroll
          for (int e = 1; e < kEach; e++) mma_s8(sum, a[f][e], x[e / 2].w + 2 * (e % 2), sum);
          float product[4];
#pragma unroll
          for (int i = 0; i < 4; i++) product[i] = as_float(sum[i]) - S8::kMagic;
          add_scaled(scales.w[first + f], product, acc[mt][first + f]);
        }
      }
    }
  }
}

// 8-bit activations and weights with one scale per row: exact int32 sums.
template <class W, int MT, class ChunkOf>
__device__ __forceinline__ void multiply_s8(const Vector* stage, const ChunkOf& chunk_of, uint32_t (&acc)[MT][4][4]) {
  Vector x[MT];
#pragma unroll
  for (int mt = 0; mt < MT; mt++) x[mt] = chunk_of(mt, 0);
#pragma unroll
  for (int f = 0; f < 4; f++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      uint32_t a[4];
      W::fragment_s8(stage, 0, half, f, {}, a);
#pragma unroll
      for (int mt = 0; mt < MT; mt++) mma_s8(acc[mt][f], a, x[mt].w + 2 * half, acc[mt][f]);
    }
}

}  // namespace cuda
}  // namespace nybble
