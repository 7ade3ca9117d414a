// Conversion of packed weights to the left operand of a multiply: dense layouts (Frag4, Rows8); sparse.cuh has 2:4.
//
// A kernel processes K in steps of kTiles tiles. Per step, a lane copies kVectors vectors to its stage with a Reader,
// whose pointers only move forward. A step has kParts parts with their own group scales. `fragment` returns the
// registers of fragment f for a half of a tile, `multiply` multiplies them with a chunk of activations.
#pragma once

#include "activations.cuh"

namespace nybble {
namespace cuda {

// Group scales, in `Parts` vectors of a lane's stage from vector First on, one per part of the step.
template <int First, int Parts, int Tiles>
struct Scales {
  static constexpr bool kGrouped = true;
  static constexpr int kParts = Parts, kTiles = Tiles, kScale = First;

  // Offsets, in elements, of a part's scales and zero points for the lane's eight rows.
  struct Groups {
    uint32_t row, n_padded, blocks;
    int shift;
    __device__ __forceinline__ Groups(const NybbleCudaProduct& p, int64_t tile, int lane)
        : row(static_cast<uint32_t>(tile) * kTile + 8 * group_of_lane(lane)),
          n_padded(static_cast<uint32_t>(p.n_padded)),
          blocks(static_cast<uint32_t>(p.k_padded / kTile)),
          shift(p.group_shift - 5) {}
    __device__ __forceinline__ bool has(uint32_t block) const { return Tiles == 1 || block < blocks; }
    __device__ __forceinline__ uint64_t at(uint32_t block, int part) const {
      constexpr int kHalves = 2 * Tiles / Parts;  // per part
      return static_cast<uint64_t>((2 * block + kHalves * part) >> shift) * n_padded;
    }
  };

  // Word f holds the bf16 scales of rows 2 f and 2 f + 1.
  static __device__ __forceinline__ Vector scales(const Vector* stage, int part) {
    return load_shared(stage + (First + part) * kLanes);
  }
};

// Dense weights: per half of a tile and fragment, two steps of m16n8k16, or one of m16n8k32.
struct Dense {
  static constexpr int kBlocks = 0;  // minimum blocks per multiprocessor in tiles.cuh; 0: no constraint

  struct Fragment {
    uint32_t a[2][4];
  };

  static __device__ __forceinline__ Vector right(const Vector& x) { return x; }

  template <class X>
  static __device__ __forceinline__ void multiply(const Fragment& w, int, const Vector& x, float (&sum)[4]) {
    X::mma(sum, w.a[0], x.w);
    X::mma(sum, w.a[1], x.w + 2);
  }
};

// frag4: per tile four vectors of codes, one per fragment; scales; zero points, two parts per vector, unless all are 8.
template <bool Symmetric, int Parts, int Tiles = 1>
struct Frag4 : Dense, Scales<4 * Tiles, Parts, Tiles> {
  using Groups = typename Scales<4 * Tiles, Parts, Tiles>::Groups;
  static constexpr int kZero = 4 * Tiles + Parts, kVectors = kZero + (Symmetric ? 0 : (Parts + 1) / 2);
  static constexpr bool kSymmetric = Symmetric;

  // Whether this template instance fits the weights of a product.
  static bool serves(const NybbleCudaProduct& p) {
    const bool fine = p.group_shift < 31 && 1 << p.group_shift < Tiles * kTile;  // 31: one group
    return (p.zero_point == nullptr) == Symmetric && fine == (Parts > 1);
  }

  static __device__ __forceinline__ int chunk(int half, int lane) { return frag4_chunk(half, lane); }

  struct Reader {
    const uint8_t* codes;
    const uint16_t* scale;
    const uint8_t* zero;
    Groups groups;

    __device__ __forceinline__ Reader(const NybbleCudaProduct& p, int64_t tile, int64_t block, int lane)
        : codes(p.codes + tile_offset(tile, block, p.k_padded / kTile, 4, lane)), groups(p, tile, lane) {
      scale = p.scale + groups.row;
      zero = p.zero_point + groups.row;
    }
    __device__ __forceinline__ void forward(int blocks) { codes += blocks * 4 * kLanes * 16; }
    __device__ __forceinline__ void copy(uint32_t block, Vector* stage) const {
#pragma unroll
      for (int f = 0; f < 4 * Tiles; f++) {
        Vector* to = stage + f * kLanes;
        if (Tiles == 1 || f < 4)
          copy_async(to, codes + f * kLanes * 16);
        else
          copy_async_or_zero(to, codes + f * kLanes * 16, groups.has(block + f / 4));
      }
#pragma unroll
      for (int part = 0; part < Parts; part++) {
        if (Tiles > 1 && part > 0 && !groups.has(block + part * Tiles / Parts)) break;
        const uint64_t at = groups.at(block, part);
        copy_async(stage + (4 * Tiles + part) * kLanes, scale + at);
        if (!Symmetric) copy_async_8(stage[(kZero + part / 2) * kLanes].w + 2 * (part % 2), zero + at);
      }
    }
  };

  static __device__ __forceinline__ Zeros zeros(const Vector* stage, int part) {
    if (Symmetric) return {{0, 0}};
    const Vector v = load_shared(stage + (kZero + part / 2) * kLanes);
    return {{v.w[2 * (part % 2)], v.w[2 * (part % 2) + 1]}};
  }

  // The weights of half h of tile j, minus their zero points.
  template <class X>
  static __device__ __forceinline__ void fragment(const Vector* stage, int j, int h, int f, const Zeros& zero,
                                                  Fragment& w) {
    const Vector codes = load_shared(stage + (4 * j + f) * kLanes);
    const uint32_t first = Symmetric ? X::kFirstMinusEight : X::minus_first(zero.twice(2 * f));
    const uint32_t second = Symmetric ? X::kSecondMinusEight : X::minus_second(zero.twice(2 * f + 1));
    X::nibbles(codes.w[2 * h], first, second, w.a[0]);
    X::nibbles(codes.w[2 * h + 1], first, second, w.a[1]);
  }

  // The same as bytes; 16 times as large if Symmetric.
  static __device__ __forceinline__ void fragment_s8(const Vector* stage, int j, int h, int f, const Zeros& zero,
                                                     uint32_t (&a)[4]) {
    const Vector codes = load_shared(stage + (4 * j + f) * kLanes);
    if (Symmetric)
      S8::nibbles(codes.w[2 * h], codes.w[2 * h + 1], a);
    else
      S8::nibbles(codes.w[2 * h], codes.w[2 * h + 1], zero.four_times(2 * f), zero.four_times(2 * f + 1), a);
  }
};

// Weights with one scale per row, applied in the epilogue.
struct ByRow {
  static constexpr bool kGrouped = false, kSymmetric = true;
  static constexpr int kParts = 1, kTiles = 1;
  static bool serves(const NybbleCudaProduct&) { return true; }
  static __device__ __forceinline__ Vector scales(const Vector*, int) { return {}; }
  static __device__ __forceinline__ Zeros zeros(const Vector*, int) { return {}; }
};

// rows8: 16 codes per row, for the lane's eight rows.
struct Rows8 : Dense, ByRow {
  static constexpr int kVectors = 8;

  static __device__ __forceinline__ int chunk(int half, int lane) { return rows8_chunk(half, lane); }

  struct Reader {
    const uint8_t* codes;
    int64_t k_padded;
    __device__ __forceinline__ Reader(const NybbleCudaProduct& p, int64_t tile, int64_t block, int lane)
        : codes(p.codes + rows8_offset(tile, block, p.k_padded, 0, lane)), k_padded(p.k_padded) {}
    __device__ __forceinline__ void forward(int blocks) { codes += blocks * kTile; }
    __device__ __forceinline__ void copy(uint32_t, Vector* stage) const {
#pragma unroll
      for (int v = 0; v < 8; v++) copy_async(stage + v * kLanes, codes + v * k_padded);
    }
  };

  template <class X>
  static __device__ __forceinline__ void fragment(const Vector* stage, int, int h, int f, const Zeros&, Fragment& w) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
      const Vector codes = load_shared(stage + (2 * f + row) * kLanes);
#pragma unroll
      for (int step = 0; step < 2; step++) X::bytes(codes.w[2 * h + step], w.a[step][row], w.a[step][2 + row]);
    }
  }

  static __device__ __forceinline__ void fragment_s8(const Vector* stage, int, int h, int f, const Zeros&,
                                                     uint32_t (&a)[4]) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
      const Vector codes = load_shared(stage + (2 * f + row) * kLanes);
#pragma unroll
      for (int step = 0; step < 2; step++) a[2 * step + row] = codes.w[2 * h + step];
    }
  }
};

}  // namespace cuda
}  // namespace nybble
