// Codes of packed weights as pairs of bfloat16, which hold them exactly. Include after tile_avx512bf16.h.
#pragma once

#include "tile_float_ends.h"
#include "tile_last_bf16.h"

namespace {

// Codes k and k + 2 of each lane of an n16k4 line: the upper halves of their float32 values, whose lower are 0.
template <int k>
NYBBLE_INLINE VI bf16_pair(VI codes) {
  const __m512i even = _mm512_castps_si512(vf_of_int(vi_byte_s<k>(codes)));
  const __m512i odd = _mm512_castps_si512(vf_of_int(vi_byte_s<k + 2>(codes)));
  return _mm512_or_si512(_mm512_srli_epi32(even, 16), odd);
}

// Codes of packed lines, as the tile of tile_bf16_nibbles.h takes them:
//   kWords                              words of four k in a line
//   kOrigin                             whether they have zero points or a minimum
//   table(a)                            made once
//   origin(a, column, g)                made once for W columns in a group; last_origin, for one
//   pair<j>(codes, origin, entries)     the j-th 2 * kWords pairs of a line, of k and k + 2 in a word: k is 0 of each
//                                       word, then 1
//   last(word, i, origin, entries)      the two pairs of the word i of a line, in turns, of a word in every lane

// `last` of nibbles.
template <class Codes>
NYBBLE_INLINE VI last_nibbles(VI word, int i, VI origin, VI entries) {
  const VI codes = vi_mul(word, vi_pairs(1 << 8, 1));
  return i % 2 ? Codes::template pair<3>(codes, origin, entries) : Codes::template pair<2>(codes, origin, entries);
}

// Nibbles of n16k8 lines minus their zero points. kSymmetric: all zero points are 8.
template <bool kSymmetric>
struct Bf16Nibbles {
  static constexpr int kWords = 2;
  static constexpr bool kOrigin = !kSymmetric;

  // Entry i is i - 16, or i % 16 - 8 if all zero points are 8 (of 3 bits, 4).
  static inline VI table(const NybbleLinearArgs*) {
    return bf16_table([](int i) { return kSymmetric ? i % 16 - kMiddle : i - 16; });
  }

  // 16 - zero_point in each 16-bit lane, for W columns in a group.
  NYBBLE_INLINE VI origin(const NybbleLinearArgs* a, int64_t column, int64_t g) {
    if (kSymmetric) return vi_set1(0);
    if (a->minimum) return vi_set1(0x00100010);  // zero points of 0
    const VI start = vi_sub(vi_set1(16), vi_load_u8(a->zero_point + group_at(a, column, g)));
    return vi_mul(start, vi_set1(0x00010001));
  }

  // The same for one column, in all lanes.
  NYBBLE_INLINE VI last_origin(const NybbleLinearArgs* a, int64_t column, int64_t g) {
    const int zero = a->zero_point ? a->zero_point[group_at(a, column, g)] : 0;
    return vi_set1(kSymmetric ? 0 : 0x00010001 * (16 - zero));
  }

  // Nibble j of each 16-bit lane: k = 0 and 2 for j = 0, then 4 and 6, 1 and 3, 5 and 7.
  template <int j>
  NYBBLE_INLINE VI pair(VI codes, VI origin, VI entries) {
    const VI shifted = vi_shift_right<4 * j>(codes);
    if (kSymmetric) return vi_lookup16(entries, shifted);
    return vi_lookup16(entries, vi_add16(vi_and(shifted, vi_set1(0x000f000f)), origin));
  }
  NYBBLE_INLINE VI last(VI word, int i, VI origin, VI entries) {
    return last_nibbles<Bf16Nibbles>(word, i, origin, entries);
  }
};

// Bytes of n16k4g lines minus their zero points. A code is the last bits of 2^23 + code as a float, and the origin is
// 2^23 + zero_point.
struct Bf16Bytes {
  static constexpr int kWords = 1;
  static constexpr bool kOrigin = true;
  static constexpr int32_t kTwo23 = 0x4b000000;

  static inline VI table(const NybbleLinearArgs*) { return vi_set1(0); }
  NYBBLE_INLINE VI origin(const NybbleLinearArgs* a, int64_t column, int64_t g) {
    const VI zero = a->zero_point ? vi_load_u8(a->zero_point + group_at(a, column, g)) : vi_set1(128);
    return vi_add(zero, vi_set1(kTwo23));
  }
  NYBBLE_INLINE VI last_origin(const NybbleLinearArgs* a, int64_t column, int64_t g) {
    return vi_set1(kTwo23 + (a->zero_point ? a->zero_point[group_at(a, column, g)] : 128));
  }

  // The byte b of each lane less its zero point, as float32: a bfloat16 in its upper half.
  template <int b>
  NYBBLE_INLINE VI step(VI codes, VI origin) {
    const VI shifted = b ? vi_shift_right_32<8 * b>(codes) : codes,
             byte = b < 3 ? vi_and(shifted, vi_set1(255)) : shifted;
    return vi_of_bits(vf_sub(vf_of_bits(_mm512_or_si512(byte, vi_set1(kTwo23))), vf_of_bits(origin)));
  }
  template <int j>
  NYBBLE_INLINE VI pair(VI codes, VI origin, VI) {
    return _mm512_or_si512(vi_shift_right_32<16>(step<j>(codes, origin)), step<j + 2>(codes, origin));
  }
  NYBBLE_INLINE VI last(VI word, int, VI origin, VI) {
    const VI even = vi_mul(word, vi_pairs(1 << 24, 1 << 16)), odd = vi_mul(word, vi_pairs(1 << 8, 1));
    return _mm512_or_si512(vi_shift_right_32<16>(step<3>(even, origin)), step<3>(odd, origin));
  }
};

// Nibbles of n16k8 lines that pick a value of the book, rounded to bfloat16.
struct Bf16Book {
  static constexpr int kWords = 2;
  static constexpr bool kOrigin = false;

  static inline VI table(const NybbleLinearArgs* a) {
    alignas(64) uint16_t entries[32];
    for (int i = 0; i < 2; i++) vf_store_as(entries + i * W, NYBBLE_BF16, vf_load(a->book), W);
    return vi_load(entries);
  }
  NYBBLE_INLINE VI origin(const NybbleLinearArgs*, int64_t, int64_t) { return vi_set1(0); }
  NYBBLE_INLINE VI last_origin(const NybbleLinearArgs*, int64_t, int64_t) { return vi_set1(0); }
  template <int j>
  NYBBLE_INLINE VI pair(VI codes, VI, VI entries) {
    return vi_lookup16(entries, vi_shift_right<4 * j>(codes));
  }
  NYBBLE_INLINE VI last(VI word, int i, VI origin, VI entries) {
    return last_nibbles<Bf16Book>(word, i, origin, entries);
  }
};

}  // namespace
