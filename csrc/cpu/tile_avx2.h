// Vectors of 8 lanes with AVX2, FMA and F16C. The same functions as tile_scalar.h.
#pragma once

#include <immintrin.h>
#include <string.h>

#include "../abi.h"

namespace {

constexpr int W = 8;
constexpr int kRegisters = 16;
constexpr bool kMakesPairs = false;  // panels that smmla multiplies (NYBBLE_PANEL_S8_PAIRS)

using VF = __m256;
using VI = __m256i;

inline VF vf_set1(float f) { return _mm256_set1_ps(f); }
inline VF vf_load(const float* p) { return _mm256_loadu_ps(p); }
inline void vf_store(float* p, VF a) { _mm256_storeu_ps(p, a); }
inline VF vf_mul(VF a, VF b) { return _mm256_mul_ps(a, b); }
inline VF vf_add(VF a, VF b) { return _mm256_add_ps(a, b); }
inline VF vf_neg(VF a) { return _mm256_xor_ps(a, _mm256_set1_ps(-0.0f)); }
inline VF vf_sub(VF a, VF b) { return _mm256_sub_ps(a, b); }
inline VF vf_div(VF a, VF b) { return _mm256_div_ps(a, b); }
inline VF vf_fma(VF a, VF b, VF c) { return _mm256_fmadd_ps(a, b, c); }
inline VF vf_fma_fast(VF a, VF b, VF c) { return _mm256_fmadd_ps(a, b, c); }

inline VI vi_set1(int32_t a) { return _mm256_set1_epi32(a); }
inline VI vi_load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void vi_store(void* p, VI a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
inline VF vf_swap_pairs(VF a) { return _mm256_permute_ps(a, 0xb1); }
inline VI vi_add(VI a, VI b) { return _mm256_add_epi32(a, b); }
inline VI vi_add_s16(VI a, VI b) { return _mm256_add_epi16(a, b); }
inline VI vi_madd_s16(VI a, VI b) { return _mm256_madd_epi16(a, b); }
inline VI vi_madd_u8s8(VI u, VI s) { return _mm256_maddubs_epi16(u, s); }
inline VI vi_sub(VI a, VI b) { return _mm256_sub_epi32(a, b); }
inline VI vi_mul(VI a, VI b) { return _mm256_mullo_epi32(a, b); }
inline VI vi_or(VI a, VI b) { return _mm256_or_si256(a, b); }
inline VI vi_and(VI a, VI b) { return _mm256_and_si256(a, b); }
template <int kBits>  // shifts 16-bit lanes
inline VI vi_shift_right(VI a) {
  return _mm256_srli_epi16(a, kBits);
}
template <int kBits>
inline VI vi_shift_right_32(VI a) {
  return _mm256_srli_epi32(a, kBits);
}
template <int kBits>
inline VI vi_shift_right_s32(VI a) {
  return _mm256_srai_epi32(a, kBits);
}
// The bits of a where the mask has ones, those of b elsewhere.
inline VI vi_pick(VI mask, VI a, VI b) {
  return _mm256_or_si256(_mm256_and_si256(mask, a), _mm256_andnot_si256(mask, b));
}
// Even and odd bytes, sign-extended to 16-bit lanes; pairs of 16-bit lanes summed to 32 bits.
inline VI vi_even_s8(VI a) { return _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8); }
inline VI vi_odd_s8(VI a) { return _mm256_srai_epi16(a, 8); }
inline VI vi_sum_pairs_s16(VI a) { return vi_madd_s16(a, vi_set1(0x10001)); }
inline VI vi_min(VI a, VI b) { return _mm256_min_epi32(a, b); }
inline VF vf_min(VF a, VF b) { return _mm256_min_ps(a, b); }
inline VF vf_max(VF a, VF b) { return _mm256_max_ps(a, b); }
template <int kShift, int kBits>
inline VI vi_field_u(VI a) {
  return _mm256_and_si256(_mm256_srli_epi32(a, kShift), _mm256_set1_epi32((1 << kBits) - 1));
}
template <int kBits>
inline VI vi_shift_left_32(VI a) {
  return _mm256_slli_epi32(a, kBits);
}
inline VI vi_of_bits(VF a) { return _mm256_castps_si256(a); }
inline VF vf_of_bits(VI a) { return _mm256_castsi256_ps(a); }
inline VF vf_where_less(VI a, VI b, VF x, VF y) {
  return _mm256_blendv_ps(y, x, _mm256_castsi256_ps(_mm256_cmpgt_epi32(b, a)));
}
inline bool vf_any_unlike(VF a, VF b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NEQ_UQ)) != 0; }
inline VF vf_sum_each(VF (&of)[W]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++)
    of[i] = _mm256_add_ps(_mm256_unpacklo_ps(of[2 * i], of[2 * i + 1]), _mm256_unpackhi_ps(of[2 * i], of[2 * i + 1]));
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++)
    of[i] = _mm256_add_ps(_mm256_shuffle_ps(of[2 * i], of[2 * i + 1], 0x44),
                          _mm256_shuffle_ps(of[2 * i], of[2 * i + 1], 0xee));
  return _mm256_add_ps(_mm256_permute2f128_ps(of[0], of[1], 0x20), _mm256_permute2f128_ps(of[0], of[1], 0x31));
}
inline void vf_transpose(VF (&rows)[W]) {
  VF pairs[W];
#pragma GCC unroll 4
  for (int i = 0; i < W; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < W; i += 4) {
    rows[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    rows[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    rows[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    rows[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    const VF low = rows[i], high = rows[i + 4];
    rows[i] = _mm256_permute2f128_ps(low, high, 0x20);
    rows[i + 4] = _mm256_permute2f128_ps(low, high, 0x31);
  }
}
template <int kByte>
inline VI vi_byte_s(VI a) {
  return _mm256_srai_epi32(_mm256_slli_epi32(a, 24 - 8 * kByte), 24);
}
inline VF vf_of_int(VI a) { return _mm256_cvtepi32_ps(a); }
// Tables of 16 floats; looks up bits kShift .. kShift + 3 of each lane.
struct Table16 {
  VF low, high;
};
inline Table16 table16(const float* values) { return {vf_load(values), vf_load(values + 8)}; }
template <int kShift>
inline VF vf_lookup(Table16 table, VI a) {
  const VI index = _mm256_srli_epi32(a, kShift);
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, index), _mm256_permutevar8x32_ps(table.high, index),
                          _mm256_castsi256_ps(_mm256_slli_epi32(a, 28 - kShift)));
}
inline VI vi_round(VF a) { return _mm256_cvtps_epi32(a); }

inline VF vf_of_bf16(__m128i half) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16)); }
inline VI vi_load_u8(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}

inline __m256i lane_mask(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline float vf_most(VF a) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}
inline float vf_least(VF a) { return -vf_most(vf_neg(a)); }
inline bool vf_has_nan(VF a) { return _mm256_movemask_ps(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)) != 0; }

inline float vf_sum(VF a) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

inline int32_t vi_sum(VI a) {
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, _MM_SHUFFLE(1, 0, 3, 2)));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, _MM_SHUFFLE(2, 3, 0, 1))));
}

inline VI vi_first(VI a, int64_t count) { return _mm256_and_si256(a, lane_mask(count)); }

template <int kCount>  // loads kCount lanes, the others are 0
inline VI vi_load_first(const void* p) {
  return _mm256_castps_si256(_mm256_maskload_ps(static_cast<const float*>(p), lane_mask(kCount)));
}

inline VF vf_load_as(const void* p, int dtype, int64_t count) {
  if (dtype == NYBBLE_F32) {
    const float* f = static_cast<const float*>(p);
    return count >= W ? _mm256_loadu_ps(f) : _mm256_maskload_ps(f, lane_mask(count));
  }
  __m128i half = _mm_setzero_si128();
  if (count >= W)
    half = _mm_loadu_si128(static_cast<const __m128i*>(p));
  else
    memcpy(&half, p, static_cast<size_t>(count) * 2);
  return dtype == NYBBLE_BF16 ? vf_of_bf16(half) : _mm256_cvtph_ps(half);
}

inline VF vf_load_s8(const void* p, int64_t count) {
  __m128i codes = _mm_setzero_si128();
  if (count >= W)
    codes = _mm_loadl_epi64(static_cast<const __m128i*>(p));
  else
    memcpy(&codes, p, static_cast<size_t>(count));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
}

inline __m128i bf16_of_vf(VF a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}

inline void vf_store_as(void* p, int dtype, VF a, int64_t count) {
  if (dtype == NYBBLE_F32) {
    float* f = static_cast<float*>(p);
    if (count >= W)
      _mm256_storeu_ps(f, a);
    else
      _mm256_maskstore_ps(f, lane_mask(count), a);
    return;
  }
  const __m128i half = dtype == NYBBLE_BF16 ? bf16_of_vf(a) : _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT);
  if (count >= W)
    _mm_storeu_si128(static_cast<__m128i*>(p), half);
  else
    memcpy(p, &half, static_cast<size_t>(count) * 2);
}

inline void vi_store_as_s32(int32_t* p, VI a, int64_t count) { _mm256_maskstore_epi32(p, lane_mask(count), a); }

template <int kFormat>
inline void store_codes(uint8_t* to, VI codes) {
  const __m128i wide = _mm_packs_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
  if (kFormat == NYBBLE_PANEL_S16) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), wide);
    return;
  }
  __m128i bytes = _mm_packs_epi16(wide, wide);
  if (kFormat == NYBBLE_PANEL_U8) bytes = _mm_xor_si128(bytes, _mm_set1_epi8(-128));
  if (kFormat == NYBBLE_PANEL_U7) bytes = _mm_add_epi8(bytes, _mm_set1_epi8(64));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), bytes);
}

}  // namespace

#define NYBBLE_REGISTER "x"
#include "tile_steps.h"
