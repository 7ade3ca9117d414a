// Vectors of 4 lanes with the Advanced SIMD (Neon) instructions that every AArch64 CPU has. The same functions as
// tile_scalar.h.
#pragma once

#include <arm_neon.h>
#include <string.h>

#include "../abi.h"

namespace {

constexpr int W = 4;
constexpr int kRegisters = 32;
constexpr bool kMakesPairs = true;  // panels that smmla multiplies (NYBBLE_PANEL_S8_PAIRS)

using VF = float32x4_t;
using VI = int32x4_t;

inline VF vf_set1(float f) { return vdupq_n_f32(f); }
inline VF vf_load(const float* p) { return vld1q_f32(p); }
inline void vf_store(float* p, VF a) { vst1q_f32(p, a); }
inline VF vf_mul(VF a, VF b) { return vmulq_f32(a, b); }
inline VF vf_add(VF a, VF b) { return vaddq_f32(a, b); }
inline VF vf_neg(VF a) { return vnegq_f32(a); }
inline VF vf_sub(VF a, VF b) { return vsubq_f32(a, b); }
inline VF vf_div(VF a, VF b) { return vdivq_f32(a, b); }
inline VF vf_fma(VF a, VF b, VF c) { return vfmaq_f32(c, a, b); }
inline VF vf_fma_fast(VF a, VF b, VF c) { return vfmaq_f32(c, a, b); }

inline VI vi_set1(int32_t a) { return vdupq_n_s32(a); }
// Loads and stores bytes, at any address.
inline VI vi_load(const void* p) { return vreinterpretq_s32_u8(vld1q_u8(static_cast<const uint8_t*>(p))); }
inline void vi_store(void* p, VI a) { vst1q_u8(static_cast<uint8_t*>(p), vreinterpretq_u8_s32(a)); }
inline VF vf_swap_pairs(VF a) { return vrev64q_f32(a); }
inline VI vi_add(VI a, VI b) { return vaddq_s32(a, b); }
inline VI vi_sub(VI a, VI b) { return vsubq_s32(a, b); }
inline VI vi_mul(VI a, VI b) { return vmulq_s32(a, b); }
inline VI vi_and(VI a, VI b) { return vandq_s32(a, b); }
inline VI vi_or(VI a, VI b) { return vorrq_s32(a, b); }
// The bits of a where those of mask are set, else of b.
inline VI vi_pick(VI mask, VI a, VI b) { return vbslq_s32(vreinterpretq_u32_s32(mask), a, b); }
template <int kBits>
inline VI vi_shift_right_32(VI a) {
  return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a), kBits));
}
template <int kBits>
inline VI vi_shift_left_32(VI a) {
  return vshlq_n_s32(a, kBits);
}
inline VI vi_min(VI a, VI b) { return vminq_s32(a, b); }
// The second where they are not ordered or equal, as the other targets: fmin and fmax would choose a NaN, and a sign.
inline VF vf_min(VF a, VF b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
inline VF vf_max(VF a, VF b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
template <int kShift, int kBits>
inline VI vi_field_u(VI a) {
  if constexpr (kShift > 0) a = vi_shift_right_32<kShift>(a);
  return kShift + kBits < 32 ? vi_and(a, vi_set1(static_cast<int32_t>((1u << kBits) - 1))) : a;
}
inline VI vi_of_bits(VF a) { return vreinterpretq_s32_f32(a); }
inline VF vf_of_bits(VI a) { return vreinterpretq_f32_s32(a); }
inline VF vf_where_less(VI a, VI b, VF x, VF y) { return vbslq_f32(vcltq_s32(a, b), x, y); }
inline bool vf_any_unlike(VF a, VF b) { return vminvq_u32(vceqq_f32(a, b)) == 0; }
inline VF vf_sum_each(VF (&of)[W]) { return vpaddq_f32(vpaddq_f32(of[0], of[1]), vpaddq_f32(of[2], of[3])); }
inline void vf_transpose(VF (&rows)[W]) {
  const float64x2_t a = vreinterpretq_f64_f32(vtrn1q_f32(rows[0], rows[1]));
  const float64x2_t b = vreinterpretq_f64_f32(vtrn2q_f32(rows[0], rows[1]));
  const float64x2_t c = vreinterpretq_f64_f32(vtrn1q_f32(rows[2], rows[3]));
  const float64x2_t d = vreinterpretq_f64_f32(vtrn2q_f32(rows[2], rows[3]));
  rows[0] = vreinterpretq_f32_f64(vtrn1q_f64(a, c));
  rows[1] = vreinterpretq_f32_f64(vtrn1q_f64(b, d));
  rows[2] = vreinterpretq_f32_f64(vtrn2q_f64(a, c));
  rows[3] = vreinterpretq_f32_f64(vtrn2q_f64(b, d));
}
template <int kByte>
inline VI vi_byte_s(VI a) {
  return vshrq_n_s32(vshlq_n_s32(a, 24 - 8 * kByte), 24);
}
inline VF vf_of_int(VI a) { return vcvtq_f32_s32(a); }
// Tables of 16 floats, as bytes; looks up bits kShift .. kShift + 3 of each lane.
using Table16 = uint8x16x4_t;
inline Table16 table16(const float* values) {
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(values);
  return {{vld1q_u8(bytes), vld1q_u8(bytes + 16), vld1q_u8(bytes + 32), vld1q_u8(bytes + 48)}};
}
template <int kShift>
inline VF vf_lookup(Table16 table, VI a) {
  const uint32x4_t field = vreinterpretq_u32_s32(vi_field_u<kShift, 4>(a));
  const uint32x4_t bytes = vmlaq_n_u32(vdupq_n_u32(0x03020100), field, 0x04040404);
  return vreinterpretq_f32_u8(vqtbl4q_u8(table, vreinterpretq_u8_u32(bytes)));
}
inline VI vi_round(VF a) { return vcvtnq_s32_f32(a); }

inline VI vi_load_u8(const uint8_t* p) {
  uint32_t word;
  memcpy(&word, p, 4);
  const uint8x8_t bytes = vreinterpret_u8_u32(vdup_n_u32(word));
  return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(bytes))));
}

inline float vf_least(VF a) { return vminvq_f32(a); }
inline float vf_most(VF a) { return vmaxvq_f32(a); }
inline bool vf_has_nan(VF a) { return vf_any_unlike(a, a); }
inline float vf_sum(VF a) { return vaddvq_f32(a); }
inline int32_t vi_sum(VI a) { return vaddvq_s32(a); }

inline VI vi_first(VI a, int64_t count) {
  const int32x4_t lanes = {0, 1, 2, 3};
  return vi_and(a, vreinterpretq_s32_u32(vcltq_s32(lanes, vi_set1(static_cast<int32_t>(count)))));
}

template <int kCount>  // loads kCount lanes, the others are 0
inline VI vi_load_first(const void* p) {
  if constexpr (kCount == W) return vi_load(p);
  const uint8_t* bytes = static_cast<const uint8_t*>(p);
  VI lanes = vi_set1(0);
  if constexpr (kCount >= 2) lanes = vcombine_s32(vreinterpret_s32_u8(vld1_u8(bytes)), vdup_n_s32(0));
  if constexpr (kCount % 2 == 1) {
    int32_t last;
    memcpy(&last, bytes + 4 * (kCount - 1), 4);
    lanes = vsetq_lane_s32(last, lanes, kCount - 1);
  }
  return lanes;
}

// The first bytes of 8 at p: all, or those of `count` lanes; the others are 0.
inline uint8x8_t load_halves(const void* p, int64_t count) {
  if (count >= W) return vld1_u8(static_cast<const uint8_t*>(p));
  uint8_t bytes[8] = {};
  memcpy(bytes, p, static_cast<size_t>(count) * 2);
  return vld1_u8(bytes);
}

inline VF vf_load_as(const void* p, int dtype, int64_t count) {
  if (dtype == NYBBLE_F32) {
    if (count >= W) return vf_load(static_cast<const float*>(p));
    VF lanes = vf_set1(0.0f);
    memcpy(&lanes, p, static_cast<size_t>(count) * 4);
    return lanes;
  }
  const uint8x8_t half = load_halves(p, count);
  if (dtype == NYBBLE_BF16) return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(half), 16));
  return vcvt_f32_f16(vreinterpret_f16_u8(half));
}

inline VF vf_load_s8(const void* p, int64_t count) {
  uint32_t word = 0;
  memcpy(&word, p, static_cast<size_t>(count < W ? count : W));
  const int8x8_t codes = vreinterpret_s8_u32(vdup_n_u32(word));
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(codes))));
}

inline uint16x4_t bf16_of_vf(VF a) {
  const uint32x4_t bits = vreinterpretq_u32_f32(a), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
  return vshrn_n_u32(vbslq_u32(vceqq_f32(a, a), rounded, quiet), 16);
}

inline void vf_store_as(void* p, int dtype, VF a, int64_t count) {
  const size_t lanes = static_cast<size_t>(count < W ? count : W);
  if (dtype == NYBBLE_F32) {
    if (lanes == W)
      vf_store(static_cast<float*>(p), a);
    else
      memcpy(p, &a, lanes * 4);
    return;
  }
  const uint16x4_t half = dtype == NYBBLE_BF16 ? bf16_of_vf(a) : vreinterpret_u16_f16(vcvt_f16_f32(a));
  if (lanes == W)
    vst1_u8(static_cast<uint8_t*>(p), vreinterpret_u8_u16(half));
  else
    memcpy(p, &half, lanes * 2);
}

inline void vi_store_as_s32(int32_t* p, VI a, int64_t count) {
  memcpy(p, &a, static_cast<size_t>(count < W ? count : W) * 4);
}

template <int kFormat>
inline void store_codes(uint8_t* to, VI codes) {
  const int16x4_t wide = vmovn_s32(codes);
  if (kFormat == NYBBLE_PANEL_S16) {
    vst1_u8(to, vreinterpret_u8_s16(wide));
    return;
  }
  uint8x8_t bytes = vreinterpret_u8_s8(vmovn_s16(vcombine_s16(wide, wide)));
  if (kFormat == NYBBLE_PANEL_U8) bytes = veor_u8(bytes, vdup_n_u8(128));
  if (kFormat == NYBBLE_PANEL_U7) bytes = vadd_u8(bytes, vdup_n_u8(64));
  memcpy(to, &bytes, 4);
}

}  // namespace
