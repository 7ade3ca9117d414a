// Activations of rows: y = act(x) * other + residual, in fp32, rounded once, and what limits x and other; see
// tile_math.h for the functions. Bound by reading and writing rows that no cache holds, else by the polynomials: on
// Zen 5, in the L1 cache, gelu takes 10.5 cycles for 16 floats with AVX-512, of which its 17 multiplies need 8.5.
// Include after a target's tile header.
#pragma once

#include "tile_math.h"
#include "tile_rows.h"

namespace {

template <int kDtype, int kAct, bool kLimited>
inline NybbleStatus activate_rows(const NybbleActivateArgs& a) {
  const VF limit = vf_set1(a.limit), least = vf_set1(-a.limit), offset = vf_set1(a.other_offset);
  for (int64_t r = 0; r < a.rows; r++) {
    const uint8_t *x = row_at<kDtype>(a.x, r), *other = row_at<kDtype>(a.other, r);
    const uint8_t* residual = row_at<kDtype>(a.residual, r);
    uint8_t* y = row_at<kDtype>(a.y, r);
    each_vector(a.columns, [&](int, int64_t c, int64_t lanes) __attribute__((always_inline)) {
      VF v = load_at<kDtype>(x, c, lanes);
      v = vf_act<kAct>(kLimited ? vf_min(limit, v) : v);
      if (other) {
        VF factor = load_at<kDtype>(other, c, lanes);
        if (kLimited) factor = vf_add(vf_max(least, vf_min(limit, factor)), offset);
        v = vf_mul(v, factor);
      }
      if (residual) v = vf_add(v, load_at<kDtype>(residual, c, lanes));
      store_at<kDtype>(y, c, v, lanes);
    });
  }
  return NYBBLE_OK;
}

template <int kDtype, int kAct>
inline NybbleStatus activate_act(const NybbleActivateArgs& a) {
  return a.limit != 0.0f ? activate_rows<kDtype, kAct, true>(a) : activate_rows<kDtype, kAct, false>(a);
}

template <int kDtype>
inline NybbleStatus activate_dtype(const NybbleActivateArgs& a) {
  switch (a.act) {
    case NYBBLE_ACT_IDENTITY:
      return activate_act<kDtype, NYBBLE_ACT_IDENTITY>(a);
    case NYBBLE_ACT_GELU:
      return activate_act<kDtype, NYBBLE_ACT_GELU>(a);
    case NYBBLE_ACT_GELU_TANH:
      return activate_act<kDtype, NYBBLE_ACT_GELU_TANH>(a);
    case NYBBLE_ACT_QUICK_GELU:
      return activate_act<kDtype, NYBBLE_ACT_QUICK_GELU>(a);
    case NYBBLE_ACT_SILU:
      return activate_act<kDtype, NYBBLE_ACT_SILU>(a);
    case NYBBLE_ACT_RELU:
      return activate_act<kDtype, NYBBLE_ACT_RELU>(a);
    case NYBBLE_ACT_TANH:
      return activate_act<kDtype, NYBBLE_ACT_TANH>(a);
    default:
      return NYBBLE_UNSUPPORTED;
  }
}

inline NybbleStatus activate(const NybbleActivateArgs* a) {
  switch (a->dtype) {
    case NYBBLE_F32:
      return activate_dtype<NYBBLE_F32>(*a);
    case NYBBLE_BF16:
      return activate_dtype<NYBBLE_BF16>(*a);
    case NYBBLE_F16:
      return activate_dtype<NYBBLE_F16>(*a);
    default:
      return NYBBLE_UNSUPPORTED;
  }
}

}  // namespace
