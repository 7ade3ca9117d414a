// 2:4-sparse weights (layouts quads8, quads4, quads16), with the interface of weights.cuh: one mma.sp m16n8k32 per half
// of a tile and fragment.
#pragma once

#include "weights.cuh"

namespace nybble {
namespace cuda {

struct TwoOfFour {
  static constexpr int kBlocks = 2;  // blocks per multiprocessor; ptxas's own choice spills registers

  static __device__ __forceinline__ int chunk(int half, int lane) { return frag4_chunk(half, lane); }

  struct Fragment {
    uint32_t a[4];
    uint32_t places;
  };

  static __device__ __forceinline__ uint32_t places(const Vector* from, int h, int f) {
    return load_shared(from).w[2 * h + f / 2];
  }

  // The right operand. Two lanes hold two quads each; the even lane needs the first pairs of all four quads, the odd
  // lane the second pairs.
  static __device__ __forceinline__ Vector right(const Vector& x) {
    const bool odd = threadIdx.x & 1;
    const uint32_t first = from_neighbour(odd ? x.w[0] : x.w[1]), second = from_neighbour(odd ? x.w[2] : x.w[3]);
    return odd ? Vector{{first, second, x.w[1], x.w[3]}} : Vector{{x.w[0], x.w[2], first, second}};
  }

  template <class X>
  static __device__ __forceinline__ void multiply(const Fragment& w, int f, const Vector& x, float (&sum)[4]) {
    if (f & 1)
      X::template mma_sparse<1>(sum, w.a, x.w, w.places);
    else
      X::template mma_sparse<0>(sum, w.a, x.w, w.places);
  }
};

// Copies a lane's `Vectors` vectors of codes, kLanes apart, then one vector of positions.
template <int Vectors>
struct QuadsReader {
  const uint8_t *codes, *places;
  __device__ __forceinline__ QuadsReader(const NybbleCudaProduct& p, int64_t tile, int64_t block, int lane)
      : codes(p.codes + tile_offset(tile, block, p.k_padded / kTile, Vectors, lane)),
        places(p.places + tile_offset(tile, block, p.k_padded / kTile, 1, lane)) {}
  __device__ __forceinline__ void forward(int blocks) {
    codes += blocks * Vectors * kLanes * 16;
    places += blocks * kLanes * 16;
  }
  __device__ __forceinline__ void copy(uint32_t, Vector* stage) const {
#pragma unroll
    for (int v = 0; v < Vectors; v++) copy_async(stage + v * kLanes, codes + v * kLanes * 16);
    copy_async(stage + Vectors * kLanes, places);
  }
};

// quads8: four vectors of codes, one per fragment, and one of positions.
struct Quads8 : TwoOfFour, ByRow {
  static constexpr int kVectors = 5;
  using Reader = QuadsReader<4>;

  template <class X>
  static __device__ __forceinline__ void fragment(const Vector* stage, int, int h, int f, const Zeros&, Fragment& w) {
    w.places = places(stage + 4 * kLanes, h, f);
    const Vector codes = load_shared(stage + f * kLanes);
#pragma unroll
    for (int row = 0; row < 2; row++) X::bytes(codes.w[2 * h + row], w.a[row], w.a[2 + row]);
  }
};

// quads16: eight vectors of values, four per half, and one of positions. For bfloat16 activations.
struct Quads16 : TwoOfFour, ByRow {
  static constexpr int kVectors = 9;
  using Reader = QuadsReader<8>;

  template <class X>
  static __device__ __forceinline__ void fragment(const Vector* stage, int, int h, int f, const Zeros&, Fragment& w) {
    w.places = places(stage + 8 * kLanes, h, f);
    const Vector values = load_shared(stage + (4 * h + f) * kLanes);
#pragma unroll
    for (int i = 0; i < 4; i++) w.a[i] = values.w[i];
  }
};

// quads4: two vectors of codes, one per half; one of positions; scales. All zero points are 8.
template <int Parts>
struct Quads4 : TwoOfFour, Scales<3, Parts, 1> {
  using Groups = typename Scales<3, Parts, 1>::Groups;
  static constexpr int kVectors = 3 + Parts;
  static constexpr bool kSymmetric = true;
  static bool serves(const NybbleCudaProduct& p) { return (p.group_shift < 6) == (Parts > 1); }
  static __device__ __forceinline__ Zeros zeros(const Vector*, int) { return {}; }

  struct Reader : QuadsReader<2> {
    const uint16_t* scale;
    Groups groups;
    __device__ __forceinline__ Reader(const NybbleCudaProduct& p, int64_t tile, int64_t block, int lane)
        : QuadsReader<2>(p, tile, block, lane), groups(p, tile, lane) {
      scale = p.scale + groups.row;
    }
    __device__ __forceinline__ void copy(uint32_t block, Vector* stage) const {
      QuadsReader<2>::copy(block, stage);
#pragma unroll
      for (int part = 0; part < Parts; part++) copy_async(stage + (3 + part) * kLanes, scale + groups.at(block, part));
    }
  };

  template <class X>
  static __device__ __forceinline__ void fragment(const Vector* stage, int, int h, int f, const Zeros&, Fragment& w) {
    w.places = places(stage + 2 * kLanes, h, f);
    X::nibbles(load_shared(stage + h * kLanes).w[f], X::kFirstMinusEight, X::kSecondMinusEight, w.a);
  }
};

}  // namespace cuda
}  // namespace nybble
