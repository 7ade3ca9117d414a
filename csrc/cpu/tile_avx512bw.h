// Vectors of 16 lanes with AVX-512 F, BW, DQ and VL. The same functions as tile_scalar.h.
// NYBBLE_EMULATE compiles the same source in plain C++, to test it on a machine without AVX-512.
#pragma once

#ifdef NYBBLE_EMULATE
#include "emulate_avx512.h"
#else
#include <immintrin.h>
#endif
#include <string.h>

#include "../abi.h"

namespace {

constexpr int W = 16;
constexpr int kRegisters = 32;
constexpr bool kMakesPairs = false;  // panels that smmla multiplies (NYBBLE_PANEL_S8_PAIRS)

using VF = __m512;
using VI = __m512i;

inline VF vf_set1(float f) { return _mm512_set1_ps(f); }
inline VF vf_load(const float* p) { return _mm512_loadu_ps(p); }
inline void vf_store(float* p, VF a) { _mm512_storeu_ps(p, a); }
inline VF vf_mul(VF a, VF b) { return _mm512_mul_ps(a, b); }
inline VF vf_add(VF a, VF b) { return _mm512_add_ps(a, b); }
inline VF vf_neg(VF a) {
  return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(a), _mm512_set1_epi32(INT32_MIN)));
}
inline VF vf_sub(VF a, VF b) { return _mm512_sub_ps(a, b); }
inline VF vf_div(VF a, VF b) { return _mm512_div_ps(a, b); }
inline VF vf_fma(VF a, VF b, VF c) { return _mm512_fmadd_ps(a, b, c); }
inline VF vf_fma_fast(VF a, VF b, VF c) { return _mm512_fmadd_ps(a, b, c); }

inline VI vi_set1(int32_t a) { return _mm512_set1_epi32(a); }
inline VI vi_load(const void* p) { return _mm512_loadu_si512(p); }
inline void vi_store(void* p, VI a) { _mm512_storeu_si512(p, a); }
inline VF vf_swap_pairs(VF a) { return _mm512_permute_ps(a, 0xb1); }
inline VI vi_add(VI a, VI b) { return _mm512_add_epi32(a, b); }
inline VI vi_add_s16(VI a, VI b) { return _mm512_add_epi16(a, b); }
inline VI vi_madd_s16(VI a, VI b) { return _mm512_madd_epi16(a, b); }
inline VI vi_madd_u8s8(VI u, VI s) { return _mm512_maddubs_epi16(u, s); }
inline VI vi_sub(VI a, VI b) { return _mm512_sub_epi32(a, b); }
inline VI vi_mul(VI a, VI b) { return _mm512_mullo_epi32(a, b); }
inline VI vi_or(VI a, VI b) { return _mm512_or_si512(a, b); }
inline VI vi_and(VI a, VI b) { return _mm512_and_si512(a, b); }
template <int kBits>  // shifts 16-bit lanes
inline VI vi_shift_right(VI a) {
  return _mm512_srli_epi16(a, kBits);
}
template <int kBits>
inline VI vi_shift_right_32(VI a) {
  return _mm512_srli_epi32(a, kBits);
}
template <int kBits>
inline VI vi_shift_right_s32(VI a) {
  return _mm512_srai_epi32(a, kBits);
}
// The bits of a where the mask has ones, those of b elsewhere.
inline VI vi_pick(VI mask, VI a, VI b) { return _mm512_ternarylogic_epi32(mask, a, b, 0xca); }
// Even and odd bytes, sign-extended to 16-bit lanes; pairs of 16-bit lanes summed to 32 bits.
inline VI vi_even_s8(VI a) { return _mm512_srai_epi16(_mm512_slli_epi16(a, 8), 8); }
inline VI vi_odd_s8(VI a) { return _mm512_srai_epi16(a, 8); }
inline VI vi_sum_pairs_s16(VI a) { return vi_madd_s16(a, vi_set1(0x10001)); }
inline VI vi_min(VI a, VI b) { return _mm512_min_epi32(a, b); }
inline VF vf_min(VF a, VF b) { return _mm512_min_ps(a, b); }
inline VF vf_max(VF a, VF b) { return _mm512_max_ps(a, b); }
inline VI vi_abs_bits(VF a) { return _mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x7fffffff)); }
template <int kShift, int kBits>
inline VI vi_field_u(VI a) {
  return _mm512_and_si512(_mm512_srli_epi32(a, kShift), _mm512_set1_epi32((1 << kBits) - 1));
}
template <int kBits>
inline VI vi_shift_left_32(VI a) {
  return _mm512_slli_epi32(a, kBits);
}
inline VI vi_of_bits(VF a) { return _mm512_castps_si512(a); }
inline VF vf_of_bits(VI a) { return _mm512_castsi512_ps(a); }
inline VF vf_where_less(VI a, VI b, VF x, VF y) { return _mm512_mask_mov_ps(y, _mm512_cmpgt_epi32_mask(b, a), x); }
inline bool vf_any_unlike(VF a, VF b) { return _mm512_cmp_ps_mask(a, b, _CMP_NEQ_UQ) != 0; }
inline VF vf_sum_each(VF (&of)[W]) {
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++)
    of[i] = _mm512_add_ps(_mm512_unpacklo_ps(of[2 * i], of[2 * i + 1]), _mm512_unpackhi_ps(of[2 * i], of[2 * i + 1]));
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++)
    of[i] = _mm512_add_ps(_mm512_shuffle_ps(of[2 * i], of[2 * i + 1], 0x44),
                          _mm512_shuffle_ps(of[2 * i], of[2 * i + 1], 0xee));
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++)  // blocks of 4 lanes
    of[i] = _mm512_add_ps(_mm512_shuffle_f32x4(of[2 * i], of[2 * i + 1], 0x88),
                          _mm512_shuffle_f32x4(of[2 * i], of[2 * i + 1], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(of[0], of[1], 0x88), _mm512_shuffle_f32x4(of[0], of[1], 0xdd));
}
inline void vf_transpose(VF (&rows)[W]) {
  VF pairs[W];
#pragma GCC unroll 8
  for (int i = 0; i < W; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < W; i += 4) {
    rows[i] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    rows[i + 1] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    rows[i + 2] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    rows[i + 3] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {  // 4 x 4 blocks of 4 lanes
    const VF even = _mm512_shuffle_f32x4(rows[i], rows[i + 4], 0x88),
             odd = _mm512_shuffle_f32x4(rows[i], rows[i + 4], 0xdd);
    const VF even2 = _mm512_shuffle_f32x4(rows[i + 8], rows[i + 12], 0x88);
    const VF odd2 = _mm512_shuffle_f32x4(rows[i + 8], rows[i + 12], 0xdd);
    rows[i] = _mm512_shuffle_f32x4(even, even2, 0x88);
    rows[i + 4] = _mm512_shuffle_f32x4(odd, odd2, 0x88);
    rows[i + 8] = _mm512_shuffle_f32x4(even, even2, 0xdd);
    rows[i + 12] = _mm512_shuffle_f32x4(odd, odd2, 0xdd);
  }
}
template <int kByte>
inline VI vi_byte_s(VI a) {
  return _mm512_srai_epi32(_mm512_slli_epi32(a, 24 - 8 * kByte), 24);
}
inline VF vf_of_int(VI a) { return _mm512_cvtepi32_ps(a); }
// Tables of 16 floats; looks up bits kShift .. kShift + 3 of each lane.
using Table16 = VF;
inline Table16 table16(const float* values) { return vf_load(values); }
template <int kShift>
inline VF vf_lookup(Table16 table, VI a) {
  return _mm512_permutexvar_ps(_mm512_srli_epi32(a, kShift), table);
}
inline VI vi_round(VF a) { return _mm512_cvtps_epi32(a); }

inline VF vf_of_bf16(__m256i half) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)); }
inline VI vi_load_u8(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
// Of numbers from 0 to 255.
inline void vi_store_u8(uint8_t* p, VI a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a)); }

inline __mmask16 lane_mask(int64_t count) {
  return count >= W ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << count) - 1);
}

template <int kCount>  // loads kCount lanes, the others are 0
inline VI vi_load_first(const void* p) {
  return _mm512_castps_si512(_mm512_maskz_loadu_ps(lane_mask(kCount), p));
}

inline float vf_least(VF a) { return _mm512_reduce_min_ps(a); }
inline float vf_most(VF a) { return _mm512_reduce_max_ps(a); }
inline bool vf_has_nan(VF a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q) != 0; }
inline float vf_sum(VF a) { return _mm512_reduce_add_ps(a); }
inline int32_t vi_sum(VI a) { return _mm512_reduce_add_epi32(a); }
inline VI vi_first(VI a, int64_t count) { return _mm512_mask_mov_epi32(vi_set1(0), lane_mask(count), a); }

inline VF vf_load_as(const void* p, int dtype, int64_t count) {
  if (dtype == NYBBLE_F32) return _mm512_maskz_loadu_ps(lane_mask(count), p);
  __m256i half = _mm256_setzero_si256();
  if (count >= W)
    half = _mm256_loadu_si256(static_cast<const __m256i*>(p));
  else
    memcpy(&half, p, static_cast<size_t>(count) * 2);
  return dtype == NYBBLE_BF16 ? vf_of_bf16(half) : _mm512_cvtph_ps(half);
}

inline VF vf_load_s8(const void* p, int64_t count) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(lane_mask(count), p)));
}

inline __m256i bf16_of_vf(VF a) {
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 nan = _mm512_cmpgt_epi32_mask(vi_abs_bits(a), _mm512_set1_epi32(0x7f800000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
}

inline void vf_store_as(void* p, int dtype, VF a, int64_t count) {
  if (dtype == NYBBLE_F32) {
    _mm512_mask_storeu_ps(p, lane_mask(count), a);
    return;
  }
  const __m256i half = dtype == NYBBLE_BF16 ? bf16_of_vf(a) : _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT);
  if (count >= W)
    _mm256_storeu_si256(static_cast<__m256i*>(p), half);
  else
    memcpy(p, &half, static_cast<size_t>(count) * 2);
}

inline void vi_store_as_s32(int32_t* p, VI a, int64_t count) { _mm512_mask_storeu_epi32(p, lane_mask(count), a); }

template <int kFormat>
inline void store_codes(uint8_t* to, VI codes) {
  if (kFormat == NYBBLE_PANEL_S16) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(codes));
    return;
  }
  __m128i bytes = _mm512_cvtepi32_epi8(codes);
  if (kFormat == NYBBLE_PANEL_U8) bytes = _mm_xor_si128(bytes, _mm_set1_epi8(-128));
  if (kFormat == NYBBLE_PANEL_U7) bytes = _mm_add_epi8(bytes, _mm_set1_epi8(64));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
}

}  // namespace

#define NYBBLE_REGISTER "v"
#include "tile_steps.h"
