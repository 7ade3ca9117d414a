// Functions of vectors of floats. A NaN stays one: in the minimum and maximum of two, it is the second. Include after a
// target's tile header.
#pragma once

namespace {

// exp(x) = 2^n exp(r), with n = round(x / ln 2) and |r| <= ln(2) / 2, where a polynomial is within 2^-28 of exp. The
// exponent of 2^n appears at the bottom of a large float. exp(-87) below -87, infinity above 88.37; 2 ulp between.
inline VF vf_exp(VF x) {
  const VF large = vf_set1(0x1.8p23f + 127.0f);
  x = vf_min(vf_set1(89.0f), vf_max(vf_set1(-87.0f), x));
  const VF shifted = vf_add(vf_mul(x, vf_set1(1.44269504f)), large), n = vf_sub(shifted, large);
  const VF high = vf_fma_fast(n, vf_set1(-0.693359375f), x), r = vf_fma_fast(n, vf_set1(2.12194440e-4f), high);
  VF p = vf_set1(0.0013814464f);
  p = vf_fma_fast(p, r, vf_set1(0.00836878083f));
  p = vf_fma_fast(p, r, vf_set1(0.0416683927f));
  p = vf_fma_fast(p, r, vf_set1(0.166665196f));
  p = vf_fma_fast(p, r, vf_set1(0.49999994f));
  p = vf_fma_fast(p, vf_mul(r, r), vf_add(r, vf_set1(1.0f)));
  return vf_mul(p, vf_of_bits(vi_shift_left_32<23>(vi_of_bits(shifted))));
}

// x / (1 + exp(-z)): x times the logistic function of z.
inline VF vf_gated(VF x, VF z) { return vf_div(x, vf_add(vf_set1(1.0f), vf_exp(vf_neg(z)))); }

// max(x, 0) - a Q(a), where a = min(|x|, 5.2) and Q is the upper tail of the normal distribution: x Phi(x), within
// 2^-20. Q is a polynomial of t = a - 2.6, its even and its odd terms apart, since one chain of sums after another
// would take the time of its latency. Minus infinity gives NaN, as 0 times infinity.
inline VF vf_gelu(VF x) {
  const VF zero = vf_set1(0.0f), center = vf_set1(2.6f);
  const VF a = vf_min(vf_set1(5.2f), vf_max(vf_neg(x), x)), t = vf_sub(a, center), t2 = vf_mul(t, t);
  VF even = vf_set1(3.74618647e-09f), odd = vf_set1(1.72079186e-08f);
  even = vf_fma_fast(even, t2, vf_set1(-2.7021639e-07f));
  odd = vf_fma_fast(odd, t2, vf_set1(4.08536138e-08f));
  even = vf_fma_fast(even, t2, vf_set1(5.64403717e-06f));
  odd = vf_fma_fast(odd, t2, vf_set1(-1.36595781e-05f));
  even = vf_fma_fast(even, t2, vf_set1(-3.6743626e-05f));
  odd = vf_fma_fast(odd, t2, vf_set1(0.000240130044f));
  even = vf_fma_fast(even, t2, vf_set1(-0.000345477543f));
  odd = vf_fma_fast(odd, t2, vf_set1(-0.000925783941f));
  even = vf_fma_fast(even, t2, vf_set1(0.00553914206f));
  odd = vf_fma_fast(odd, t2, vf_set1(-0.0130377086f));
  even = vf_fma_fast(even, t2, vf_set1(0.017655734f));
  odd = vf_fma_fast(odd, t2, vf_set1(-0.0135831824f));
  even = vf_fma_fast(even, t2, vf_set1(0.00466130069f));
  const VF q = vf_fma_fast(odd, t, even);
  const VF positive = vf_max(zero, x), lost = vf_mul(vf_min(zero, x), zero);
  return vf_add(vf_sub(positive, vf_mul(a, q)), lost);
}

template <int kAct>
inline VF vf_act(VF x) {
  if (kAct == NYBBLE_ACT_GELU) return vf_gelu(x);
  if (kAct == NYBBLE_ACT_GELU_TANH) {
    const VF cubic = vf_fma_fast(vf_mul(x, x), vf_set1(0.044715f), vf_set1(1.0f));
    return vf_gated(x, vf_mul(vf_mul(x, vf_set1(1.59576912f)), cubic));  // 2 sqrt(2 / pi)
  }
  if (kAct == NYBBLE_ACT_QUICK_GELU) return vf_gated(x, vf_mul(x, vf_set1(1.702f)));
  if (kAct == NYBBLE_ACT_SILU) return vf_gated(x, x);
  if (kAct == NYBBLE_ACT_RELU) return vf_max(vf_set1(0.0f), x);
  if (kAct == NYBBLE_ACT_TANH) return vf_sub(vf_set1(1.0f), vf_gated(vf_set1(2.0f), vf_mul(x, vf_set1(-2.0f))));
  return x;
}

}  // namespace
