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

// W values from k on, 0 beyond `count`.
template <int kDtype>
inline VF load_x(const uint8_t* x, int64_t k, int64_t count) {
  constexpr int64_t bytes = kDtype == NYBBLE_F32 ? 4 : 2;
  if (k + W <= count) return vf_load_as(x + k * bytes, kDtype, W);
  return k < count ? vf_load_as(x + k * bytes, kDtype, count - k) : vf_set1(0.0f);
}

// How a row becomes codes: min(round(x * factor * inverse) + zero, 127), for its first `count` ks.
struct RowPlan {
  float scale, factor, inverse;
  int32_t zero;
  int64_t count;
};

template <int kDtype>
inline RowPlan plan_row(const uint8_t* x, int64_t count) {
  VI bits = vi_set1(0);
  VF low = vf_set1(0.0f), high = vf_set1(0.0f);
  for (int64_t k = 0; k < count; k += W) {
    const VF v = load_x<kDtype>(x, k, count);
    bits = vi_max(bits, vi_abs_bits(v));
    low = vf_min(low, v);
    high = vf_max(high, v);
  }
  int32_t bits_lane[W], most = 0;
  float low_lane[W], high_lane[W], lowest = 0.0f, highest = 0.0f;
  vi_store(bits_lane, bits);
  vf_store(low_lane, low);
  vf_store(high_lane, high);
  for (int i = 0; i < W; i++) {
    most = bits_lane[i] > most ? bits_lane[i] : most;
    lowest = low_lane[i] < lowest ? low_lane[i] : lowest;
    highest = high_lane[i] > highest ? high_lane[i] : highest;
  }
  if (most >= kInfBits) {
    const int32_t nan_bits = 0x7fc00000;
    float quiet_nan;
    memcpy(&quiet_nan, &nan_bits, 4);
    return {quiet_nan, 1.0f, 0.0f, 0, 0};
  }
  if (most == 0) return {0.0f, 1.0f, 0.0f, 0, 0};
  const float magnitude = highest > -lowest ? highest : -lowest;
  const float factor = magnitude < kTiny ? kTinyFactor : magnitude > kHuge ? kHugeFactor : 1.0f;
  lowest *= factor;
  const float width = highest * factor - lowest, inverse = 255.0f / width;
  int32_t zero[W];
  vi_store(zero, vi_round(vf_set1(-lowest * inverse)));
  return {width / 255.0f / factor, factor, inverse, zero[0] - 128, count};
}

inline int32_t sum_lanes(VI v) {
  int32_t lane[W], total = 0;
  vi_store(lane, v);
  for (int i = 0; i < W; i++) total += lane[i];
  return total;
}

constexpr int64_t kMaxBlockRows = 16;

constexpr int64_t kStep = 64;

// ks [begin, end) of one row to the panel; returns the sum of their codes.
template <int kFormat, int kDtype>
inline int32_t write_codes(const uint8_t* x, const RowPlan plan, int64_t begin, int64_t end, int64_t k_padded,
                           uint8_t* to, int64_t stride) {
  const VF factor = vf_set1(plan.factor), inverse = vf_set1(plan.inverse);
  const VI zero = vi_set1(plan.zero), most = vi_set1(127);
  VI sum = vi_set1(0);
  for (int64_t k = begin; k < end; k += W) {
    const VF scaled = vf_mul(vf_mul(load_x<kDtype>(x, k, plan.count), factor), inverse);
    VI codes = vi_min(vi_add(vi_round(scaled), zero), most);
    if (k + W > plan.count) codes = vi_first(codes, k < plan.count ? plan.count - k : 0);
    sum = vi_add(sum, codes);
    scatter<kFormat>(to + k / 4 * stride, stride, codes, (k_padded - k) / 4);
  }
  return sum_lanes(sum);
}

// One block of r rows, a few ks of every row at a time, so that the panel is written in order.
template <int kFormat, int kDtype>
inline void prepare_block(const NybblePrepareArgs* a, int64_t row0, int64_t r) {
  constexpr int64_t bytes = kFormat == NYBBLE_PANEL_F32 ? 4 : kFormat == NYBBLE_PANEL_S16 ? 2 : 1;
  constexpr int64_t x_bytes = kDtype == NYBBLE_F32 ? 4 : 2;
  const NybblePrepareArgs args = *a;
  const uint8_t* x = static_cast<const uint8_t*>(args.x) + row0 * args.ldx * x_bytes;
  uint8_t* panel = static_cast<uint8_t*>(args.panel) + row0 * args.k_padded * bytes;
  const int64_t stride = r * 4 * bytes, row_bytes = args.ldx * x_bytes;
  RowPlan plans[kMaxBlockRows];
  for (int64_t i = 0; i < r && kFormat != NYBBLE_PANEL_F32; i++) {
    plans[i] = plan_row<kDtype>(x + i * row_bytes, args.k);
    args.act_scale[row0 + i] = plans[i].scale;
    args.act_zero[row0 + i] = plans[i].zero;
  }
  for (int64_t g = 0; g < args.groups; g++) {
    const int64_t group_end = (g + 1) * args.group;
    int32_t sums[kMaxBlockRows] = {};
    for (int64_t begin = g * args.group; begin < group_end; begin += kStep) {
      const int64_t end = begin + kStep < group_end ? begin + kStep : group_end;
      for (int64_t i = 0; i < r; i++) {
        uint8_t* to = panel + i * 4 * bytes;
        const uint8_t* row = x + i * row_bytes;
        if constexpr (kFormat == NYBBLE_PANEL_F32) {
          for (int64_t k = begin; k < end; k += W)
            scatter_f32(to + k / 4 * stride, stride, load_x<kDtype>(row, k, args.k), (args.k_padded - k) / 4);
        } else {
          sums[i] += write_codes<kFormat, kDtype>(row, plans[i], begin, end, args.k_padded, to, stride);
        }
      }
    }
    for (int64_t i = 0; i < r && args.act_sum; i++)
      args.act_sum[(row0 + i) * args.groups + g] = sums[i] * args.sum_factor;
  }
}

// One block of bfloat16 rows: each word of four ks with the inner two exchanged.
inline void permute_block(const NybblePrepareArgs* a, int64_t row0, int64_t r) {
  const uint8_t* x = static_cast<const uint8_t*>(a->x) + row0 * a->ldx * 2;
  uint8_t* to = static_cast<uint8_t*>(a->panel) + row0 * a->k_padded * 2;
  for (int64_t k = 0; k < a->k_padded; k += 4)
    for (int64_t i = 0; i < r; i++, to += 8) {
      const int64_t left = a->k - k;
      uint64_t four = 0;
      if (left >= 4)
        memcpy(&four, x + (i * a->ldx + k) * 2, 8);
      else if (left > 0)
        memcpy(&four, x + (i * a->ldx + k) * 2, static_cast<size_t>(left) * 2);
      const uint64_t exchanged =
          (four & 0xffff00000000ffffu) | (four & 0xffff0000u) << 16 | (four >> 16 & 0xffff0000u);
      memcpy(to, &exchanged, 8);
    }
}

inline NybbleStatus permute(const NybblePrepareArgs* a) {
  if (a->x_dtype != NYBBLE_BF16) return NYBBLE_UNSUPPORTED;
  for (int64_t block = a->block_begin; block < a->block_end; block++) {
    const int64_t row0 = block * a->block_rows, left = a->rows - row0;
    permute_block(a, row0, left < a->block_rows ? left : a->block_rows);
  }
  return NYBBLE_OK;
}

template <int kFormat, int kDtype>
inline NybbleStatus prepare_blocks(const NybblePrepareArgs* a) {
  if (a->block_rows > kMaxBlockRows) return NYBBLE_UNSUPPORTED;
  for (int64_t block = a->block_begin; block < a->block_end; block++) {
    const int64_t row0 = block * a->block_rows, left = a->rows - row0;
    prepare_block<kFormat, kDtype>(a, row0, left < a->block_rows ? left : a->block_rows);
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
    case NYBBLE_PANEL_BF16:
      return permute(a);
    default:
      return NYBBLE_UNSUPPORTED;
  }
}

}  // namespace
