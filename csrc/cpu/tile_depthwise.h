// Convolutions in which each channel has its own weight: channels in the lanes, codes as floats, whose sums are exact.
// Bound by widening codes: three instructions for W products. Include after a target's tile header.
#pragma once

#include "../abi_conv.h"

namespace {

constexpr int kPositions = 4;  // that share a load of the weights

// The outputs of `n` positions and W channels from c on.
template <int n>
inline void depthwise_vector(const NybbleDepthwiseArgs& a, int64_t position, int64_t c, int64_t lanes) {
  const int8_t* x = a.x + position * a.position + c;
  VF sum[n];
#pragma GCC unroll 4
  for (int i = 0; i < n; i++) sum[i] = vf_set1(0.0f);
  for (int64_t t = 0; t < a.taps; t++) {
    const VF weight = vf_load(a.weight + t * a.stride + c);
#pragma GCC unroll 4
    for (int i = 0; i < n; i++)
      sum[i] = vf_fma_fast(vf_load_s8(x + a.offset[t] + i * a.position, lanes), weight, sum[i]);
  }
  const int64_t at = position * a.stride + c;
  if (a.sums) {
#pragma GCC unroll 4
    for (int i = 0; i < n; i++) vi_store(static_cast<int32_t*>(a.y) + at + i * a.stride, vi_round(sum[i]));
    return;
  }
  const VF zero = vf_mul(vf_of_int(vi_load(a.column_sum + c)), vf_set1(-static_cast<float>(a.act_zero)));
  const VF scale = vf_mul(vf_set1(a.act_scale), vf_load(a.scale + c));
  const int64_t bytes = a.bias_dtype == NYBBLE_F32 ? 4 : 2;
  const VF bias =
      a.bias ? vf_load_as(static_cast<const uint8_t*>(a.bias) + c * bytes, a.bias_dtype, lanes) : vf_set1(0.0f);
#pragma GCC unroll 4
  for (int i = 0; i < n; i++)
    vf_store(static_cast<float*>(a.y) + at + i * a.stride, vf_fma(vf_add(sum[i], zero), scale, bias));
}

inline NybbleStatus depthwise(const NybbleDepthwiseArgs* a) {
  if (a->taps > NYBBLE_MOST_TAPS || a->stride % 16) return NYBBLE_UNSUPPORTED;
  for (int64_t c = 0; c < a->channels; c += W) {
    const int64_t lanes = a->channels - c < W ? a->channels - c : W;
    int64_t p = 0;
    for (; p + kPositions <= a->positions; p += kPositions) depthwise_vector<kPositions>(*a, p, c, lanes);
    for (; p < a->positions; p++) depthwise_vector<1>(*a, p, c, lanes);
  }
  return NYBBLE_OK;
}

}  // namespace
