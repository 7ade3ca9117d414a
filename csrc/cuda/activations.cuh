// Per activation type: the multiply, and the conversion of weight codes to its left operand. n: nibble, z: zero point.
//
//   4 bits, bf16   (128 + n) - (128 + z): the nibble is or-ed into the mantissa of 128; exact
//   4 bits, f16    (1024 + n) - (1024 + z), or for a nibble four bits higher (1024 + 16 n) / 16 - (64 + z); exact
//   4 bits, s8     if all zero points are 8, 16 (n - 8): the nibble in the upper half of its byte, sign bit flipped;
//                  else n - z per byte: (128 + n - z) with the sign bit flipped
//   8 bits, bf16   (128 + low seven bits) - (128 or 256, by the sign bit); exact
//   8 bits, f16    (1024 + (code + 128)) - 1152; exact
#pragma once

#include "hardware.cuh"

namespace nybble {
namespace cuda {

__device__ __forceinline__ float float_of_bf16(uint32_t bits) { return as_float(bits << 16); }

// Zero points of a lane's eight rows, one byte each.
struct Zeros {
  uint32_t w[2];
  // The zero point of a row in both 16-bit halves of a word, and in all four bytes.
  __device__ __forceinline__ uint32_t twice(int row) const {
    return select_bytes(w[row >> 2], 0, 0x4040u | (row & 3) << 8 | (row & 3));
  }
  __device__ __forceinline__ uint32_t four_times(int row) const {
    return select_bytes(w[row >> 2], 0, 0x1111u * static_cast<uint32_t>(row & 3));
  }
};

struct Bf16 {
  static constexpr int kElementBytes = 2, kDtype = NYBBLE_BF16;
  // Added to the biased weights to subtract the zero point: constants for 8, functions for others; first and second
  // row.
  static constexpr uint32_t kFirstMinusEight = 0xC308C308u, kSecondMinusEight = 0xC308C308u;
  static __device__ __forceinline__ uint32_t minus_first(uint32_t twice) { return twice | 0xC300C300u; }
  static __device__ __forceinline__ uint32_t minus_second(uint32_t twice) { return minus_first(twice); }

  // Eight nibbles minus their rows' zero points: register i holds nibbles i and i + 4; odd i are of the second row.
  static __device__ __forceinline__ void nibbles(uint32_t word, uint32_t first, uint32_t second, uint32_t (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++)
      a[i] = add_bf16(and_or(word >> 4 * i, 0x000F000Fu, 0x43004300u), i & 1 ? second : first);
  }
  // Converts the four signed bytes of a word: the lower two, the upper two.
  static __device__ __forceinline__ void bytes(uint32_t word, uint32_t& low, uint32_t& high) {
    low = widened(select_bytes(word, 0, 0x4140));
    high = widened(select_bytes(word, 0, 0x4342));
  }
  static __device__ __forceinline__ uint32_t widened(uint32_t pair) {
    return add_bf16(and_or(pair, 0x007F007Fu, 0x43004300u), and_or(pair, 0x00800080u, 0xC300C300u));
  }
  static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
    mma_bf16(c, a, b);
  }
  template <int Selector>
  static __device__ __forceinline__ void mma_sparse(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b,
                                                    uint32_t places) {
    mma_sparse_bf16<Selector>(c, a, b, places);
  }
};

struct F16 {
  static constexpr int kElementBytes = 2, kDtype = NYBBLE_F16;
  static constexpr uint32_t kFirstMinusEight = 0xE408E408u, kSecondMinusEight = 0xD480D480u;
  static __device__ __forceinline__ uint32_t minus_first(uint32_t twice) { return twice | 0xE400E400u; }
  static __device__ __forceinline__ uint32_t minus_second(uint32_t twice) { return twice << 4 | 0xD400D400u; }

  static __device__ __forceinline__ void nibbles(uint32_t word, uint32_t first, uint32_t second, uint32_t (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const uint32_t here = word >> 4 * i;
      a[i] = add_f16(and_or(here, 0x000F000Fu, 0x64006400u), first);
      a[i + 1] = add_sixteenth_f16(and_or(here, 0x00F000F0u, 0x64006400u), second);
    }
  }
  static __device__ __forceinline__ void bytes(uint32_t word, uint32_t& low, uint32_t& high) {
    const uint32_t biased = word ^ 0x80808080u;
    low = add_f16(select_bytes(biased, 0x64646464u, 0x4140), 0xE480E480u);
    high = add_f16(select_bytes(biased, 0x64646464u, 0x4342), 0xE480E480u);
  }
  static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
    mma_f16(c, a, b);
  }
  template <int Selector>
  static __device__ __forceinline__ void mma_sparse(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b,
                                                    uint32_t places) {
    mma_sparse_f16<Selector>(c, a, b, places);
  }
};

struct S8 {
  static constexpr int kElementBytes = 1, kDtype = 8;
  // Adding an integer of less than 23 bits to kMagicBits gives the bits of the float kMagic + integer.
  static constexpr uint32_t kMagicBits = 0x4B400000u;
  static constexpr float kMagic = 12582912.0f;

  // Codes of two rows at a lane's inputs 0-3 (low nibbles) and 4-7 (high nibbles), as 16 (nibble - 8).
  static __device__ __forceinline__ void nibbles(uint32_t first, uint32_t second, uint32_t (&a)[4]) {
    a[0] = and_xor(first << 4, 0xF0F0F0F0u, 0x80808080u);
    a[1] = and_xor(first, 0xF0F0F0F0u, 0x80808080u);
    a[2] = and_xor(second << 4, 0xF0F0F0F0u, 0x80808080u);
    a[3] = and_xor(second, 0xF0F0F0F0u, 0x80808080u);
  }
  // The same as nibble - zero point; lower and upper repeat the first and second row's zero point in each byte.
  static __device__ __forceinline__ void nibbles(uint32_t first, uint32_t second, uint32_t lower, uint32_t upper,
                                                 uint32_t (&a)[4]) {
    a[0] = centred(first, lower);
    a[1] = centred(first >> 4, upper);
    a[2] = centred(second, lower);
    a[3] = centred(second >> 4, upper);
  }
  static __device__ __forceinline__ uint32_t centred(uint32_t word, uint32_t zero) {
    return (and_or(word, 0x0F0F0F0Fu, 0x80808080u) - zero) ^ 0x80808080u;
  }
};

}  // namespace cuda
}  // namespace nybble
