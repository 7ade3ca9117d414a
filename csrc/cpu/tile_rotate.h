// Rotary positions. For each head of a row, RMS-normalized before if asked, and each of its pairs (a, b) of elements:
//   y[a] = x[a] cos[a] - x[b] sin[a],  y[b] = x[b] cos[b] + x[a] sin[b]
// The pairs are (i, i + rotated / 2), or (2 i, 2 i + 1) if interleaved; elements from `rotated` on stay. In fp32,
// rounded once. Bound by reading and writing the rows. Include after a target's tile header.
#pragma once

#include "tile_rows.h"

namespace {

// The elements of a head, normalized if asked.
template <int kDtype>
struct Head {
  const uint8_t* x;
  const NybbleScale& scale;
  float inverse;
  inline VF operator()(int64_t c, int64_t lanes) const {
    const VF v = load_at<kDtype>(x, c, lanes);
    return scale.weight ? round_to<kDtype>(rms_scaled<kDtype>(v, inverse, scale, c, lanes)) : v;
  }
};

// Where the cosines and sines of a row are.
struct Angles {
  const uint8_t *cos, *sin;
  Angles(const NybbleRotateArgs& a, int64_t r) {
    const int64_t sequence = (a.row0 + r) / a.length, token = (a.row0 + r) % a.length;
    cos = static_cast<const uint8_t*>(a.cos) +
          (sequence * a.cos_sequence + token * a.cos_token) * dtype_bytes(a.cos_dtype);
    sin = static_cast<const uint8_t*>(a.sin) +
          (sequence * a.sin_sequence + token * a.sin_token) * dtype_bytes(a.sin_dtype);
  }
};

template <int kDtype>
inline void rotate_halves(const NybbleRotateArgs& a, const Angles& at, const Head<kDtype>& head, uint8_t* y) {
  const int64_t half = a.rotated / 2;
  for (int64_t c = 0; c < half; c += W) {
    const int64_t lanes = half - c < W ? half - c : W, d = c + half;
    const VF first = head(c, lanes), second = head(d, lanes);
    const VF cos = load_any(at.cos, a.cos_dtype, c, lanes), sin = load_any(at.sin, a.sin_dtype, c, lanes);
    const VF cos2 = load_any(at.cos, a.cos_dtype, d, lanes), sin2 = load_any(at.sin, a.sin_dtype, d, lanes);
    store_at<kDtype>(y, c, vf_sub(vf_mul(first, cos), vf_mul(second, sin)), lanes);
    store_at<kDtype>(y, d, vf_fma_fast(first, sin2, vf_mul(second, cos2)), lanes);
  }
}

template <int kDtype>
inline void rotate_pairs(const NybbleRotateArgs& a, const Angles& at, const Head<kDtype>& head, uint8_t* y) {
  float signs[W];
  for (int i = 0; i < W; i++) signs[i] = i % 2 ? 1.0f : -1.0f;
  const VF sign = vf_load(signs);
  for (int64_t c = 0; c < a.rotated; c += W) {
    const int64_t lanes = a.rotated - c < W ? a.rotated - c : W;
    const VF v = head(c, lanes), sin = vf_mul(load_any(at.sin, a.sin_dtype, c, lanes), sign);
    const VF turned = vf_fma_fast(vf_swap_pairs(v), sin, vf_mul(v, load_any(at.cos, a.cos_dtype, c, lanes)));
    store_at<kDtype>(y, c, turned, lanes);
  }
}

template <int kDtype>
inline NybbleStatus rotate_rows(const NybbleRotateArgs& a) {
  for (int64_t r = 0; r < a.rows; r++) {
    const Angles angles(a, r);
    for (int64_t h = 0; h < a.heads; h++) {
      const int64_t at = h * a.head_dim * dtype_bytes(kDtype);
      Head<kDtype> head{row_at<kDtype>(a.x, r) + at, a.scale, 1.0f};
      uint8_t* y = row_at<kDtype>(a.y, r) + at;
      if (a.scale.weight)
        head.inverse = inverse_rms(a.head_dim, a.scale.eps,
                                   [&](int64_t c, int64_t lanes) { return load_at<kDtype>(head.x, c, lanes); });
      for (int64_t c = a.rotated; c < a.head_dim; c += W) {
        const int64_t lanes = a.head_dim - c < W ? a.head_dim - c : W;
        store_at<kDtype>(y, c, head(c, lanes), lanes);
      }
      if (a.interleaved)
        rotate_pairs<kDtype>(a, angles, head, y);
      else
        rotate_halves<kDtype>(a, angles, head, y);
    }
  }
  return NYBBLE_OK;
}

inline NybbleStatus rotate(const NybbleRotateArgs* a) {
  switch (a->dtype) {
    case NYBBLE_F32:
      return rotate_rows<NYBBLE_F32>(*a);
    case NYBBLE_BF16:
      return rotate_rows<NYBBLE_BF16>(*a);
    case NYBBLE_F16:
      return rotate_rows<NYBBLE_F16>(*a);
    default:
      return NYBBLE_UNSUPPORTED;
  }
}

}  // namespace
