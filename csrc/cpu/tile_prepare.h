// Activations to panels, for every target. A row's range [low, high] always includes 0, so that 0 has a code:
//   scale = (high - low) / 255, zero = round(-low * (255 / (high - low))) - 128
//   q = min(round(x * (255 / (high - low))) + zero, 127), rounding half to even
// A NaN or an Inf shows in the largest absolute bits, compared as integers. Include after a target's tile header.
#pragma once

#include "../abi.h"

namespace {

constexpr int32_t kInfBits = 0x7f800000;
// Rows whose range would make 255 / range or the range itself overflow are scaled by an exact power of two first.
constexpr float kTiny = 0x1p-100f, kTinyFactor = 0x1p100f;
constexpr float kHuge = 0x1p126f, kHugeFactor = 0x1p-4f;

struct Range {
  float low, high;
  int32_t bits;  // the largest magnitude
};

// Widens a row into scratch, zero to a multiple of W beyond k_padded.
template <int kDtype>
inline Range widen_row(const NybblePrepareArgs* a, const uint8_t* x) {
  constexpr int64_t bytes = kDtype == NYBBLE_F32 ? 4 : 2;
  VI bits = vi_set1(0);
  VF low = vf_set1(0.0f), high = vf_set1(0.0f);
  int64_t k = 0;
  for (; k < a->k; k += W) {
    const VF v = k + W <= a->k ? vf_load_as(x + k * bytes, kDtype, W) : vf_load_as(x + k * bytes, kDtype, a->k - k);
    vf_store(a->scratch + k, v);
    bits = vi_max(bits, vi_abs_bits(v));
    low = vf_min(low, v);
    high = vf_max(high, v);
  }
  for (; k < a->k_padded; k += W) vf_store(a->scratch + k, vf_set1(0.0f));
  int32_t bits_lane[W];
  float low_lane[W], high_lane[W];
  vi_store(bits_lane, bits);
  vf_store(low_lane, low);
  vf_store(high_lane, high);
  Range range{0.0f, 0.0f, 0};
  for (int i = 0; i < W; i++) {
    range.bits = bits_lane[i] > range.bits ? bits_lane[i] : range.bits;
    range.low = low_lane[i] < range.low ? low_lane[i] : range.low;
    range.high = high_lane[i] > range.high ? high_lane[i] : range.high;
  }
  return range;
}

struct RowScale {
  float scale;    // x = (q - zero) * scale
  float inverse;  // that the widened row is multiplied by
  int32_t zero;
};

inline void scale_scratch(const NybblePrepareArgs* a, float factor) {
  for (int64_t k = 0; k < a->k_padded; k += W)
    vf_store(a->scratch + k, vf_mul(vf_load(a->scratch + k), vf_set1(factor)));
}

// The scale of a row; a row that is too small or too large for float arithmetic, or not finite, is changed in scratch.
inline RowScale row_scale(const NybblePrepareArgs* a, Range range) {
  if (range.bits >= kInfBits) {
    for (int64_t k = 0; k < a->k_padded; k += W) vf_store(a->scratch + k, vf_set1(0.0f));
    const int32_t nan_bits = 0x7fc00000;
    float quiet_nan;
    memcpy(&quiet_nan, &nan_bits, 4);
    return {quiet_nan, 0.0f, 0};
  }
  if (range.bits == 0) return {0.0f, 0.0f, 0};
  const float magnitude = range.high > -range.low ? range.high : -range.low;
  const float factor = magnitude < kTiny ? kTinyFactor : magnitude > kHuge ? kHugeFactor : 1.0f;
  if (factor != 1.0f) scale_scratch(a, factor);
  const float low = range.low * factor, width = range.high * factor - low, inverse = 255.0f / width;
  int32_t zero[W];
  vi_store(zero, vi_round(vf_set1(-low * inverse)));
  return {width / 255.0f / factor, inverse, zero[0] - 128};
}

// Codes of W values of the widened row; those beyond k are 0.
inline VI codes_at(const NybblePrepareArgs* a, int64_t k, VF inverse, VI zero) {
  const VI codes = vi_min(vi_add(vi_round(vf_mul(vf_load(a->scratch + k), inverse)), zero), vi_set1(127));
  return k + W <= a->k ? codes : vi_first(codes, k < a->k ? a->k - k : 0);
}

// Codes of the widened row to the panel, and their sums by group where they are wanted.
template <int kFormat>
inline void write_codes(const NybblePrepareArgs* a, RowScale scale, uint8_t* to, int64_t stride, int32_t* sums) {
  const VF inverse = vf_set1(scale.inverse);
  const VI zero = vi_set1(scale.zero);
  for (int64_t g = 0; g < a->groups; g++) {
    VI sum = vi_set1(0);
    for (int64_t k = g * a->group; k < (g + 1) * a->group; k += W) {
      const VI codes = codes_at(a, k, inverse, zero);
      sum = vi_add(sum, codes);
      scatter<kFormat>(to + k / 4 * stride, stride, codes, (a->k_padded - k) / 4);
    }
    if (!sums) continue;
    int32_t lane[W], total = 0;
    vi_store(lane, sum);
    for (int i = 0; i < W; i++) total += lane[i];
    sums[g] = total;
  }
}

inline void write_floats(const NybblePrepareArgs* a, uint8_t* to, int64_t stride) {
  for (int64_t k = 0; k < a->k_padded; k += W)
    scatter_f32(to + k / 4 * stride, stride, vf_load(a->scratch + k), (a->k_padded - k) / 4);
}

template <int kFormat, int kDtype>
inline NybbleStatus prepare_blocks(const NybblePrepareArgs* a) {
  constexpr int64_t code_bytes = kFormat == NYBBLE_PANEL_F32 ? 4 : kFormat == NYBBLE_PANEL_S16 ? 2 : 1;
  constexpr int64_t x_bytes = kDtype == NYBBLE_F32 ? 4 : 2;
  for (int64_t block = a->block_begin; block < a->block_end; block++) {
    const int64_t row0 = block * a->block_rows;
    const int64_t r = a->rows - row0 < a->block_rows ? a->rows - row0 : a->block_rows;
    uint8_t* panel = static_cast<uint8_t*>(a->panel) + row0 * a->k_padded * code_bytes;
    for (int64_t i = 0; i < r; i++) {
      uint8_t* to = panel + i * 4 * code_bytes;
      const int64_t stride = r * 4 * code_bytes, row = row0 + i;
      const Range range = widen_row<kDtype>(a, static_cast<const uint8_t*>(a->x) + row * a->ldx * x_bytes);
      if constexpr (kFormat == NYBBLE_PANEL_F32) {
        write_floats(a, to, stride);
      } else {
        const RowScale scale = row_scale(a, range);
        a->act_scale[row] = scale.scale;
        a->act_zero[row] = scale.zero;
        write_codes<kFormat>(a, scale, to, stride, a->act_sum ? a->act_sum + row * a->groups : nullptr);
      }
    }
  }
  return NYBBLE_OK;
}

template <int kFormat>
inline NybbleStatus prepare_dtype(const NybblePrepareArgs* a) {
  switch (a->x_dtype) {
    case NYBBLE_F32:
      return prepare_blocks<kFormat, NYBBLE_F32>(a);
    case NYBBLE_BF16:
      return prepare_blocks<kFormat, NYBBLE_BF16>(a);
    case NYBBLE_F16:
      return prepare_blocks<kFormat, NYBBLE_F16>(a);
    default:
      return NYBBLE_UNSUPPORTED;
  }
}

inline NybbleStatus prepare(const NybblePrepareArgs* a) {
  switch (a->panel_format) {
    case NYBBLE_PANEL_F32:
      return prepare_dtype<NYBBLE_PANEL_F32>(a);
    case NYBBLE_PANEL_S8:
      return prepare_dtype<NYBBLE_PANEL_S8>(a);
    case NYBBLE_PANEL_S16:
      return prepare_dtype<NYBBLE_PANEL_S16>(a);
    case NYBBLE_PANEL_U8:
      return prepare_dtype<NYBBLE_PANEL_U8>(a);
    default:
      return NYBBLE_UNSUPPORTED;
  }
}

}  // namespace
