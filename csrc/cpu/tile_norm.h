// Norms of rows, with the residual before. With s = x + residual, rounded to the dtype, and sums in fp32:
//   layer: y = (s - mean) / sqrt(mean of (s - mean)^2 + eps) * weight + bias, rounded once
//   rms:   y = s / sqrt(mean of s^2 + eps), rounded to the dtype, * weight; or (weight + offset), see rms_scaled
//   none:  y = s
// Each row is read up to three times, from the L1 cache after the first. Bound by reading and writing rows that no
// cache holds, else for short rows by the latency of the two sums: on Zen 5 with AVX-512 a layer norm of 384 floats
// takes 235 cycles, of which its loads and stores need 70. Include after a target's tile header.
#pragma once

#include "tile_rows.h"

namespace {

// The values of a row before its norm.
template <int kDtype, bool kAdds>
struct Summed {
  const uint8_t *x, *residual;
  inline VF operator()(int64_t c, int64_t lanes) const {
    const VF v = load_at<kDtype>(x, c, lanes);
    return kAdds ? round_to<kDtype>(vf_add(v, load_at<kDtype>(residual, c, lanes))) : v;
  }
};

template <int kDtype, class Value>
inline void copy_row(int64_t columns, const Value& value, uint8_t* y) {
  each_vector(columns, [&](int, int64_t c, int64_t lanes)
                           __attribute__((always_inline)) { store_at<kDtype>(y, c, value(c, lanes), lanes); });
}

template <int kDtype, class Value>
inline void layer_row(const NybbleNormArgs& a, const Value& value, uint8_t* y) {
  const NybbleScale& s = a.scale;
  const float n = static_cast<float>(a.columns);
  const VF mean = vf_set1(sum_of(a.columns, value) / n);
  const float squares = sum_of(a.columns, [&](int64_t c, int64_t lanes) __attribute__((always_inline)) {
    const VF d = vf_sub(value(c, lanes), mean), kept = lanes < W ? first_lanes(d, lanes) : d;
    return vf_mul(kept, kept);
  });
  const VF inverse = vf_set1(1.0f / sqrtf(squares / n + s.eps));
  each_vector(a.columns, [&](int, int64_t c, int64_t lanes) __attribute__((always_inline)) {
    VF v = vf_mul(vf_sub(value(c, lanes), mean), inverse);
    if (s.weight) v = vf_mul(v, load_any(s.weight, s.weight_dtype, c, lanes));
    if (s.bias) v = vf_add(v, load_any(s.bias, s.bias_dtype, c, lanes));
    store_at<kDtype>(y, c, v, lanes);
  });
}

template <int kDtype, class Value>
inline void rms_row(const NybbleNormArgs& a, const Value& value, uint8_t* y) {
  const float inverse = inverse_rms(a.columns, a.scale.eps, value);
  each_vector(a.columns, [&](int, int64_t c, int64_t lanes) __attribute__((always_inline)) {
    store_at<kDtype>(y, c, rms_scaled<kDtype>(value(c, lanes), inverse, a.scale, c, lanes), lanes);
  });
}

template <int kDtype, class Value>
inline void norm_row(const NybbleNormArgs& a, const Value& value, uint8_t* y) {
  if (!y) return;
  if (a.kind == NYBBLE_NORM_LAYER) return layer_row<kDtype>(a, value, y);
  if (a.kind == NYBBLE_NORM_RMS) return rms_row<kDtype>(a, value, y);
  copy_row<kDtype>(a.columns, value, y);
}

template <int kDtype>
inline NybbleStatus norm_rows(const NybbleNormArgs& a) {
  for (int64_t r = 0; r < a.rows; r++) {
    uint8_t *x = row_at<kDtype>(a.x, r), *residual = row_at<kDtype>(a.residual, r), *y = row_at<kDtype>(a.y, r);
    if (uint8_t* sum = row_at<kDtype>(a.sum, r)) {
      if (residual)
        copy_row<kDtype>(a.columns, Summed<kDtype, true>{x, residual}, sum);
      else
        copy_row<kDtype>(a.columns, Summed<kDtype, false>{x, nullptr}, sum);
      norm_row<kDtype>(a, Summed<kDtype, false>{sum, nullptr}, y);
    } else if (residual) {
      norm_row<kDtype>(a, Summed<kDtype, true>{x, residual}, y);
    } else {
      norm_row<kDtype>(a, Summed<kDtype, false>{x, nullptr}, y);
    }
  }
  return NYBBLE_OK;
}

inline NybbleStatus norm(const NybbleNormArgs* a) {
  if (a->kind < NYBBLE_NORM_NONE || a->kind > NYBBLE_NORM_RMS) return NYBBLE_UNSUPPORTED;
  switch (a->dtype) {
    case NYBBLE_F32:
      return norm_rows<NYBBLE_F32>(*a);
    case NYBBLE_BF16:
      return norm_rows<NYBBLE_BF16>(*a);
    case NYBBLE_F16:
      return norm_rows<NYBBLE_F16>(*a);
    default:
      return NYBBLE_UNSUPPORTED;
  }
}

}  // namespace
