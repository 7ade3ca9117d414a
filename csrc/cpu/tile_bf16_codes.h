// Codes of packed weights as pairs of bfloat16, which hold them exactly, and the epilogues of float activations.
// Include after tile_avx512bf16.h.
#pragma once

#include "tile_run.h"

namespace {

// Codes k and k + 2 of each lane of an n16k4 line: the upper halves of their float32 values, whose lower are 0.
template <int k>
NYBBLE_INLINE VI bf16_pair(VI codes) {
  const __m512i even = _mm512_castps_si512(vf_of_int(vi_byte_s<k>(codes)));
  const __m512i odd = _mm512_castps_si512(vf_of_int(vi_byte_s<k + 2>(codes)));
  return _mm512_or_si512(_mm512_srli_epi32(even, 16), odd);
}

// Nibbles of n16k8 lines minus their zero points. kSymmetric: all zero points are 8.
template <bool kSymmetric>
struct Bf16Nibbles {
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
};

// Nibbles of n16k8 lines that pick a value of the book, rounded to bfloat16.
struct Bf16Book {
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
};

// y = acc * scale + bias
template <int R, int N, int V>
NYBBLE_INLINE void finish_w8a16(const NybbleLinearArgs* a, int64_t row, int64_t column, const VF (&acc)[N][V], int v) {
  const VF scale = vf_load(static_cast<const float*>(a->scale) + column), bias = bias_at(a, column);
  store_rows<R>(a, row, column, [&](int r) __attribute__((always_inline)) { return vf_fma(acc[r][v], scale, bias); });
}

// y = sum + bias; the sum has the scales of all groups.
template <int R, int V>
NYBBLE_INLINE void finish_w4a16(const NybbleLinearArgs* a, int64_t row, int64_t column, const VF (&sum)[R][V], int v) {
  const VF bias = bias_at(a, column);
  store_rows<R>(a, row, column, [&](int r) __attribute__((always_inline)) { return vf_add(sum[r][v], bias); });
}

}  // namespace
