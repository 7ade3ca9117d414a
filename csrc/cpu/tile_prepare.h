// Activations to panels, for every target: amax by integer comparison of the absolute bits (so a NaN or an Inf always
// wins), then q = round_half_even(x * (127 / amax)). Include after a target's tile header.
#pragma once

#include "../abi.h"

namespace {

constexpr int32_t kInfBits = 0x7f800000;
// Below this amax, 127 / amax would overflow; such rows are scaled up by an exact power of two first.
constexpr float kTinyAmax = 0x1p-100f, kTinyUp = 0x1p100f, kTinyDown = 0x1p-100f;

template <class V, class T>
inline void lanes_to(T* to, V value) {
  memcpy(to, &value, sizeof value);
}

// Widens a row into scratch, zero to a multiple of W beyond k_padded, and returns its amax as bits.
template <int kDtype>
inline int32_t widen_row(const NybblePrepareArgs* a, const uint8_t* x) {
  constexpr int64_t bytes = kDtype == NYBBLE_F32 ? 4 : 2;
  VI best = vi_set1(0);
  int64_t k = 0;
  for (; k + W <= a->k; k += W) {
    const VF v = vf_load_as(x + k * bytes, kDtype, W);
    vf_store(a->scratch + k, v);
    best = vi_max(best, vi_abs_bits(v));
  }
  for (; k < a->k_padded; k += W) {
    const VF v = k < a->k ? vf_load_as(x + k * bytes, kDtype, a->k - k) : vf_set1(0.0f);
    vf_store(a->scratch + k, v);
    best = vi_max(best, vi_abs_bits(v));
  }
  int32_t lane[W], bits = 0;
  lanes_to(lane, best);
  for (int i = 0; i < W; i++) bits = lane[i] > bits ? lane[i] : bits;
  return bits;
}

struct RowScale {
  float scale;    // of the codes
  float inverse;  // that the widened row is multiplied by
};

// The scale of a row of this amax; a row too small for it, or not finite, is changed in scratch.
inline RowScale row_scale(const NybblePrepareArgs* a, int32_t amax_bits) {
  float amax, quiet_nan;
  const int32_t nan_bits = 0x7fc00000;
  memcpy(&amax, &amax_bits, 4);
  memcpy(&quiet_nan, &nan_bits, 4);
  if (amax_bits >= kInfBits) {
    for (int64_t k = 0; k < a->k_padded; k += W) vf_store(a->scratch + k, vf_set1(0.0f));
    return {quiet_nan, 0.0f};
  }
  if (amax_bits == 0) return {0.0f, 0.0f};
  if (amax >= kTinyAmax) return {amax / 127.0f, 127.0f / amax};
  const VF up = vf_set1(kTinyUp);
  for (int64_t k = 0; k < a->k_padded; k += W) vf_store(a->scratch + k, vf_mul(vf_load(a->scratch + k), up));
  return {amax * kTinyUp / 127.0f * kTinyDown, 127.0f / (amax * kTinyUp)};
}

// Codes of the widened row to the panel, and their sums by group where they are wanted.
template <int kFormat>
inline void write_codes(const NybblePrepareArgs* a, float inverse, uint8_t* to, int64_t stride, int32_t* sums) {
  const VF factor = vf_set1(inverse);
  for (int64_t g = 0; g < a->groups; g++) {
    VI sum = vi_set1(0);
    for (int64_t k = g * a->group; k < (g + 1) * a->group; k += W) {
      const VI codes = vi_round(vf_mul(vf_load(a->scratch + k), factor));
      sum = vi_add(sum, codes);
      scatter<kFormat>(to + k / 4 * stride, stride, codes, (a->k_padded - k) / 4);
    }
    if (!sums) continue;
    int32_t lane[W], total = 0;
    lanes_to(lane, sum);
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
      const int32_t amax = widen_row<kDtype>(a, static_cast<const uint8_t*>(a->x) + row * a->ldx * x_bytes);
      if constexpr (kFormat == NYBBLE_PANEL_F32) {
        write_floats(a, to, stride);
      } else {
        const RowScale scale = row_scale(a, amax);
        a->act_scale[row] = scale.scale;
        write_codes<kFormat>(a, scale.inverse, to, stride, a->act_sum ? a->act_sum + row * a->groups : nullptr);
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
