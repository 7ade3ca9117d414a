// What a multiply is made of: how activations of a type are multiplied (Bf16, F16, S8), and how weights of a layout
// become their left operand (Frag4, Rows8, Quads4, Quads8, Quads16).
//
//   4 bits, bf16   (16 + n) - (16 + z): the code is put below the exponent of 16, four bits to a half register; exact
//   4 bits, f16    likewise
//   4 bits, s8     16 (n - 8): the nibble stays in the upper half of its byte, with its sign bit flipped
//   8 bits, bf16   (128 + low seven bits) - (128 or 256, by the sign bit); exact
//   8 bits, f16    (1024 + (code + 128)) - 1152; exact
#pragma once

#include "hardware.cuh"

namespace nybble {
namespace cuda {

__device__ __forceinline__ float float_of_bf16(uint32_t bits) { return as_float(bits << 16); }
__device__ __forceinline__ uint32_t both(uint32_t half) { return half << 16 | half; }

struct Bf16 {
  static constexpr int kElementBytes = 2, kChunks = 8;
  static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
    mma_bf16(c, a, b);
  }
  template <int Selector>
  static __device__ __forceinline__ void mma_sparse(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b,
                                                    uint32_t places) {
    mma_sparse_bf16<Selector>(c, a, b, places);
  }
  // 16 + each nibble: registers i hold nibbles i and i + 4.
  static __device__ __forceinline__ void nibbles(uint32_t word, uint32_t (&a)[4]) {
    a[0] = (word << 3 & 0x00780078u) | 0x41804180u;
    a[1] = (word >> 1 & 0x00780078u) | 0x41804180u;
    a[2] = (word >> 5 & 0x00780078u) | 0x41804180u;
    a[3] = (word >> 9 & 0x00780078u) | 0x41804180u;
  }
  static __device__ __forceinline__ uint32_t minus_zero(uint32_t zero) { return both(0xC180u | zero << 3); }
  static __device__ __forceinline__ uint32_t add(uint32_t a, uint32_t b) { return add_bf16(a, b); }
  // The four signed bytes of a word: the first two, the last two.
  static __device__ __forceinline__ void bytes(uint32_t word, uint32_t& low, uint32_t& high) {
    low = widened(select_bytes(word, 0, 0x4140));
    high = widened(select_bytes(word, 0, 0x4342));
  }
  static __device__ __forceinline__ uint32_t widened(uint32_t pair) {
    return add_bf16((pair & 0x007F007Fu) | 0x43004300u, (pair & 0x00800080u) | 0xC300C300u);
  }
};

struct F16 {
  static constexpr int kElementBytes = 2, kChunks = 8;
  static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
    mma_f16(c, a, b);
  }
  template <int Selector>
  static __device__ __forceinline__ void mma_sparse(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b,
                                                    uint32_t places) {
    mma_sparse_f16<Selector>(c, a, b, places);
  }
  static __device__ __forceinline__ void nibbles(uint32_t word, uint32_t (&a)[4]) {
    a[0] = (word << 6 & 0x03C003C0u) | 0x4C004C00u;
    a[1] = (word << 2 & 0x03C003C0u) | 0x4C004C00u;
    a[2] = (word >> 2 & 0x03C003C0u) | 0x4C004C00u;
    a[3] = (word >> 6 & 0x03C003C0u) | 0x4C004C00u;
  }
  static __device__ __forceinline__ uint32_t minus_zero(uint32_t zero) { return both(0xCC00u | zero << 6); }
  static __device__ __forceinline__ uint32_t add(uint32_t a, uint32_t b) { return add_f16(a, b); }
  static __device__ __forceinline__ void bytes(uint32_t word, uint32_t& low, uint32_t& high) {
    const uint32_t biased = word ^ 0x80808080u;
    low = add_f16(select_bytes(biased, 0x64646464u, 0x4140), 0xE480E480u);
    high = add_f16(select_bytes(biased, 0x64646464u, 0x4342), 0xE480E480u);
  }
};

struct S8 {
  static constexpr int kElementBytes = 1, kChunks = 4;
  static constexpr uint32_t kOnes = 0x01010101u;
  // Integers of less than 23 bits, added to these bits, are the float of their sum with kMagic.
  static constexpr uint32_t kMagicBits = 0x4B400000u;
  static constexpr float kMagic = 12582912.0f;
  // 16 times (nibble - 8): words of a lane's inputs 0-3 and 4-7 to one fragment.
  static __device__ __forceinline__ void nibbles(uint32_t first, uint32_t second, uint32_t (&a)[4]) {
    a[0] = (first << 4 & 0xF0F0F0F0u) ^ 0x80808080u;
    a[1] = (first & 0xF0F0F0F0u) ^ 0x80808080u;
    a[2] = (second << 4 & 0xF0F0F0F0u) ^ 0x80808080u;
    a[3] = (second & 0xF0F0F0F0u) ^ 0x80808080u;
  }
};

// Where the groups' values of a lane's eight rows begin, for a half of a tile.
__device__ __forceinline__ int64_t group_at(const NybbleCudaProduct& p, int64_t tile, int64_t block, int half,
                                            int lane) {
  const int64_t row = tile * kTile + 8 * group_of_lane(lane);
  return ((block * kTile + 32 * half) >> p.group_shift) * p.n_padded + row;
}

// Scales by group, in two vectors of a lane's stage from First on, one a half; of groups over 32 one is both's.
template <int First>
struct Scales {
  static constexpr bool kGrouped = true;

  static __device__ __forceinline__ void load_scales(const NybbleCudaProduct& p, int64_t tile, int64_t block, int lane,
                                                     Vector* stage) {
#pragma unroll
    for (int half = 0; half < 2; half++)
      if (!half || p.group_shift == 5)
        copy_async(stage + (First + half) * kLanes, p.scale + group_at(p, tile, block, half, lane));
  }

  // The scales of a half: words f hold those of rows 2 f and 2 f + 1.
  static __device__ __forceinline__ Vector scales(const NybbleCudaProduct& p, const Vector* stage, int half) {
    return load_shared(stage + (First + (p.group_shift == 5 ? half : 0)) * kLanes);
  }
};

// Weights of a half of a tile, none left out: the two steps of m16n8k16 for four fragments.
struct Dense {
  static constexpr int kBlocks = 0;  // with many tokens, that a multiprocessor has registers for; 0: as ptxas chooses

  struct Half {
    uint32_t a[2][4][4];
  };

  static __device__ __forceinline__ Vector right(const Vector& x) { return x; }

  template <class X>
  static __device__ __forceinline__ void multiply(const Half& w, int f, const Vector& x, float (&sum)[4]) {
    X::mma(sum, w.a[0][f], x.w);
    X::mma(sum, w.a[1][f], x.w + 2);
  }
};

// Two of each four: one m16n8k32 for each fragment.
struct TwoOfFour {
  static constexpr int kBlocks = 2;  // where it chooses, registers spill

  static __device__ __forceinline__ int chunk(int half, int lane) { return frag4_chunk(half, lane); }

  struct Half {
    uint32_t a[4][4];
    uint32_t places[2];
  };

  static __device__ __forceinline__ void load_places(const Vector* from, int half, Half& w) {
    const Vector places = load_shared(from);
#pragma unroll
    for (int i = 0; i < 2; i++) w.places[i] = half ? places.w[2 + i] : places.w[i];
  }

  // Of the pairs of four quads: two lanes hold two quads each, and the even one multiplies the first pairs of all.
  static __device__ __forceinline__ Vector right(const Vector& x) {
    const bool odd = threadIdx.x & 1;
    const uint32_t first = from_neighbour(odd ? x.w[0] : x.w[1]), second = from_neighbour(odd ? x.w[2] : x.w[3]);
    return odd ? Vector{{first, second, x.w[1], x.w[3]}} : Vector{{x.w[0], x.w[2], first, second}};
  }

  template <class X>
  static __device__ __forceinline__ void multiply(const Half& w, int f, const Vector& x, float (&sum)[4]) {
    if (f & 1)
      X::template mma_sparse<1>(sum, w.a[f], x.w, w.places[f >> 1]);
    else
      X::template mma_sparse<0>(sum, w.a[f], x.w, w.places[f >> 1]);
  }
};

// frag4. In a lane's stage: four vectors of codes, one a fragment; scales of its eight rows for each half; zero points
// of both halves.
struct Frag4 : Dense, Scales<4> {
  static constexpr int kVectors = 7, kZero = 6;

  static __device__ __forceinline__ int chunk(int half, int lane) { return frag4_chunk(half, lane); }

  static __device__ __forceinline__ void load(const NybbleCudaProduct& p, int64_t tile, int64_t block, int lane,
                                              Vector* stage) {
    const int64_t blocks = p.k_padded / kTile;
#pragma unroll
    for (int f = 0; f < 4; f++) copy_async(stage + f * kLanes, p.codes + frag4_offset(tile, block, blocks, f, lane));
    load_scales(p, tile, block, lane, stage);
    if (!p.zero_point) return;
#pragma unroll
    for (int half = 0; half < 2; half++)
      if (!half || p.group_shift == 5)
        copy_async_8(stage[kZero * kLanes].w + 2 * half, p.zero_point + group_at(p, tile, block, half, lane));
  }

  // The zero points of a half: bytes of the two words.
  struct Zeros {
    uint32_t w[2];
    __device__ __forceinline__ uint32_t of(int row) const { return w[row >> 2] >> (8 * (row & 3)) & 15; }
  };
  static __device__ __forceinline__ Zeros zeros(const NybbleCudaProduct& p, const Vector* stage, int half) {
    if (!p.zero_point) return {{0x08080808u, 0x08080808u}};
    const Vector v = load_shared(stage + kZero * kLanes);
    const bool second = p.group_shift == 5 && half;
    return {{second ? v.w[2] : v.w[0], second ? v.w[3] : v.w[1]}};
  }

  // The weights of a half, less their zero points: a[step][fragment].
  template <class X>
  static __device__ __forceinline__ void fragments(const NybbleCudaProduct& p, const Vector* stage, int half, Half& w) {
    const Zeros zero = zeros(p, stage, half);
#pragma unroll
    for (int f = 0; f < 4; f++) {
      const Vector codes = load_shared(stage + f * kLanes);
      const uint32_t minus[2] = {X::minus_zero(zero.of(2 * f)), X::minus_zero(zero.of(2 * f + 1))};
#pragma unroll
      for (int step = 0; step < 2; step++) {
        X::nibbles(half ? codes.w[2 + step] : codes.w[step], w.a[step][f]);
#pragma unroll
        for (int i = 0; i < 4; i++) w.a[step][f][i] = X::add(w.a[step][f][i], minus[i & 1]);
      }
    }
  }
};

// rows8. In a lane's stage: 16 codes of each of its eight rows.
struct Rows8 : Dense {
  static constexpr int kVectors = 8;
  static constexpr bool kGrouped = false;

  static __device__ __forceinline__ int chunk(int half, int lane) { return rows8_chunk(half, lane); }

  static __device__ __forceinline__ void load(const NybbleCudaProduct& p, int64_t tile, int64_t block, int lane,
                                              Vector* stage) {
#pragma unroll
    for (int v = 0; v < 8; v++)
      copy_async(stage + v * kLanes, p.codes + rows8_offset(tile, block, p.k_padded, v, lane));
  }

  template <class X>
  static __device__ __forceinline__ void fragments(const NybbleCudaProduct&, const Vector* stage, int half, Half& w) {
#pragma unroll
    for (int f = 0; f < 4; f++) {
#pragma unroll
      for (int row = 0; row < 2; row++) {
        const Vector codes = load_shared(stage + (2 * f + row) * kLanes);
#pragma unroll
        for (int step = 0; step < 2; step++)
          X::bytes(half ? codes.w[2 + step] : codes.w[step], w.a[step][f][row], w.a[step][f][2 + row]);
      }
    }
  }
};

// quads8. In a lane's stage: four vectors of codes, one a fragment, and one of places.
struct Quads8 : TwoOfFour {
  static constexpr int kVectors = 5, kPlaces = 4;
  static constexpr bool kGrouped = false;

  static __device__ __forceinline__ void load(const NybbleCudaProduct& p, int64_t tile, int64_t block, int lane,
                                              Vector* stage) {
    const int64_t blocks = p.k_padded / kTile;
#pragma unroll
    for (int f = 0; f < 4; f++) copy_async(stage + f * kLanes, p.codes + frag4_offset(tile, block, blocks, f, lane));
    copy_async(stage + kPlaces * kLanes, p.places + places_offset(tile, block, blocks, lane));
  }

  template <class X>
  static __device__ __forceinline__ void fragments(const NybbleCudaProduct&, const Vector* stage, int half, Half& w) {
    load_places(stage + kPlaces * kLanes, half, w);
#pragma unroll
    for (int f = 0; f < 4; f++) {
      const Vector codes = load_shared(stage + f * kLanes);
#pragma unroll
      for (int row = 0; row < 2; row++) X::bytes(half ? codes.w[2 + row] : codes.w[row], w.a[f][row], w.a[f][2 + row]);
    }
  }
};

// quads4. In a lane's stage: two vectors of codes, one a half; one of places; scales.
struct Quads4 : TwoOfFour, Scales<3> {
  static constexpr int kVectors = 5, kPlaces = 2;

  static __device__ __forceinline__ void load(const NybbleCudaProduct& p, int64_t tile, int64_t block, int lane,
                                              Vector* stage) {
    const int64_t blocks = p.k_padded / kTile;
#pragma unroll
    for (int half = 0; half < 2; half++)
      copy_async(stage + half * kLanes, p.codes + quads4_offset(tile, block, blocks, half, lane));
    copy_async(stage + kPlaces * kLanes, p.places + places_offset(tile, block, blocks, lane));
    load_scales(p, tile, block, lane, stage);
  }

  template <class X>
  static __device__ __forceinline__ void fragments(const NybbleCudaProduct&, const Vector* stage, int half, Half& w) {
    load_places(stage + kPlaces * kLanes, half, w);
    const Vector codes = load_shared(stage + half * kLanes);
    const uint32_t minus = X::minus_zero(8);
#pragma unroll
    for (int f = 0; f < 4; f++) {
      X::nibbles(codes.w[f], w.a[f]);
#pragma unroll
      for (int i = 0; i < 4; i++) w.a[f][i] = X::add(w.a[f][i], minus);
    }
  }
};

// quads16. In a lane's stage: eight vectors of values, four a half, and one of places. For bfloat16 activations.
struct Quads16 : TwoOfFour {
  static constexpr int kVectors = 9, kPlaces = 8;
  static constexpr bool kGrouped = false;

  static __device__ __forceinline__ void load(const NybbleCudaProduct& p, int64_t tile, int64_t block, int lane,
                                              Vector* stage) {
    const int64_t blocks = p.k_padded / kTile;
#pragma unroll
    for (int v = 0; v < 8; v++)
      copy_async(stage + v * kLanes, p.codes + quads16_offset(tile, block, blocks, v / 4, v % 4, lane));
    copy_async(stage + kPlaces * kLanes, p.places + places_offset(tile, block, blocks, lane));
  }

  template <class X>
  static __device__ __forceinline__ void fragments(const NybbleCudaProduct&, const Vector* stage, int half, Half& w) {
    load_places(stage + kPlaces * kLanes, half, w);
#pragma unroll
    for (int f = 0; f < 4; f++) {
      const Vector values = load_shared(stage + (4 * half + f) * kLanes);
#pragma unroll
      for (int i = 0; i < 4; i++) w.a[f][i] = values.w[i];
    }
  }
};

// One half of a tile against a chunk of each of eight tokens: acc[fragment] += scale * (w x).
template <class W, class X>
__device__ __forceinline__ void multiply_half(const typename W::Half& w, const Vector& chunk, const Vector& scales,
                                              float (&acc)[4][4]) {
  const Vector x = W::right(chunk);
#pragma unroll
  for (int f = 0; f < 4; f++) {
    float (&total)[4] = acc[f];
    if (!W::kGrouped) {
      W::template multiply<X>(w, f, x, total);
      continue;
    }
    float sum[4] = {0, 0, 0, 0};
    W::template multiply<X>(w, f, x, sum);
    const uint32_t pair = scales.w[f];
    const float scale[2] = {as_float(pair << 16), as_float(pair & 0xFFFF0000u)};
#pragma unroll
    for (int i = 0; i < 4; i++) total[i] = fused(scale[i >> 1], sum[i], total[i]);
  }
}

}  // namespace cuda
}  // namespace nybble
