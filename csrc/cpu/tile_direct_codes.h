// Outputs of convolutions in place as codes. Straight from the registers, where whole vectors of columns are written:
//   code + 128 = round(min(max(sum * scale + bias + residual * factor, lowest), highest))
// with the scale of y, its zero point and all of the residual's offset in the factors, so the activation is a bound.
// Else value by value, as convert of tile_prepare.h does with a given scale. Bound by conversions: four of ten
// instructions. Included by tile_direct.h.
#pragma once

#include "../abi_conv.h"
#include "tile_inline.h"

namespace {

constexpr int kPixels = NYBBLE_PIXELS;

constexpr int64_t dtype_bytes(int dtype) {
  return dtype == NYBBLE_U8 ? 1 : dtype == NYBBLE_F32 || dtype == NYBBLE_S32 ? 4 : 2;
}

// What is added to the product: floats, codes, or another product.
enum { kNothing = 0, kFloats = 1, kCodes = 2, kProduct = 3 };

// How codes of the residual become floats, and floats codes of y.
struct Recoding {
  VF residual_scale, residual_shift, inverse, lower, upper;
  VI zero;
  explicit Recoding(const NybbleDirectArgs& a)
      : residual_scale(vf_set1(a.residual_scale)),
        residual_shift(vf_set1(-128.0f - static_cast<float>(a.residual_zero))),
        inverse(vf_set1(a.how.inverse)),
        lower(vf_set1(static_cast<float>(lowest_code(a.how.steps) - a.how.zero))),
        upper(vf_set1(static_cast<float>(highest_code(a.how.steps) - a.how.zero))),
        zero(vi_set1(a.how.zero)) {}

  NYBBLE_INLINE VF read(const Recoding& how, const uint8_t* from, int64_t lanes) {
    uint8_t held[W] = {};
    if (lanes < W) {
      memcpy(held, from, static_cast<size_t>(lanes));
      from = held;
    }
    return vf_mul(vf_add(vf_of_int(vi_load_u8(from)), how.residual_shift), how.residual_scale);
  }

  NYBBLE_INLINE void write(const Recoding& how, VF v, uint8_t* to, int64_t lanes) {
    uint8_t held[W];
    const VF bounded = vf_min(vf_max(vf_mul(v, how.inverse), how.lower), how.upper);
    store_codes<NYBBLE_PANEL_U8>(lanes < W ? held : to, vi_add(vi_round(bounded), how.zero));
    if (lanes < W) memcpy(to, held, static_cast<size_t>(lanes));
  }
};

// The same from registers.
struct Codes {
  bool serves;
  float inverse, shift;
  VF lowest, highest, factor;
  explicit Codes(const NybbleDirectArgs& a)
      : serves(a.y_dtype == NYBBLE_U8 && a.n % W == 0 && (a.act == NYBBLE_ACT_IDENTITY || a.act == NYBBLE_ACT_RELU)),
        inverse(a.how.inverse),
        shift(128.0f + static_cast<float>(a.how.zero)) {
    const float most = a.most * inverse + shift;
    lowest = vf_set1(a.act == NYBBLE_ACT_RELU ? shift : 0.0f);
    highest = vf_set1(most < 255.0f ? most : 255.0f);
    const bool codes = a.residual && a.residual_dtype == NYBBLE_U8;
    factor = vf_set1(codes ? a.residual_scale * inverse : inverse);
    if (codes) shift -= (128.0f + static_cast<float>(a.residual_zero)) * (a.residual_scale * inverse);
  }
};

// The scale of a segment's sums in codes of y.
NYBBLE_INLINE VF scale_of(const NybbleDirectArgs& a, const Codes& how, const NybbleSegment& segment, int64_t column) {
  return vf_mul(vf_set1(segment.act_scale * how.inverse), vf_load(a.scale + column));
}

// to + the bias, in codes of y.
NYBBLE_INLINE VF add_bias(const NybbleDirectArgs& a, const Codes& how, int64_t column, VF to) {
  if (!a.bias) return to;
  const uint8_t* from = static_cast<const uint8_t*>(a.bias) + column * dtype_bytes(a.bias_dtype);
  const VF bias =
      a.bias_dtype == NYBBLE_F32 ? vf_load(reinterpret_cast<const float*>(from)) : vf_load_as(from, a.bias_dtype, W);
  return vf_fma(bias, vf_set1(how.inverse), to);
}

// The sums of a segment of another product, in codes of y.
template <int V>
NYBBLE_INLINE void scale_sums(const NybbleDirectArgs& a, const Codes& how, const NybbleSegment& segment, int64_t column,
                              const VI (&acc)[kPixels][V], float* to) {
#pragma GCC unroll 4
  for (int v = 0; v < V; v++) {
    const VF scale = scale_of(a, how, segment, column + v * W);
#pragma GCC unroll 8
    for (int i = 0; i < kPixels; i++) vf_store(to + (i * V + v) * W, vf_mul(vf_of_int(acc[i][v]), scale));
  }
}

// Writes the outputs of a segment. product: what scale_sums made. Of values that are not NaN or Inf, scales, a bias and
// floats that are added make some: they are noted in `poison`.
template <int V, int kAdd>
NYBBLE_INLINE void write_codes(const NybbleDirectArgs& a, const Codes& how, const NybbleSegment& segment,
                               int64_t column, const VI (&acc)[kPixels][V], const float* product, VF& poison) {
  const VF none = vf_set1(0.0f), largest = vf_set1(0x1p31f);
  const int64_t added_bytes = kAdd == kFloats ? dtype_bytes(a.residual_dtype) : 1;
  uint8_t* y = static_cast<uint8_t*>(a.y) + segment.y + column;
  const uint8_t* added = static_cast<const uint8_t*>(a.residual);
  if (kAdd == kFloats || kAdd == kCodes) added += (segment.residual + column) * added_bytes;
  VF scale[V], bias[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; v++) {
    const int64_t at = column + v * W;
    scale[v] = scale_of(a, how, segment, at);
    bias[v] = add_bias(a, how, at, vf_set1(how.shift));
    if (kAdd == kProduct) bias[v] = add_bias(*a.more, how, at, bias[v]);
    poison = vf_fma(vf_fma(scale[v], largest, bias[v]), none, poison);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kPixels; i++, y += a.n, added += a.n * added_bytes) {
    if (i < segment.skip) continue;
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      VF value = vf_fma(vf_of_int(acc[i][v]), scale[v], bias[v]);
      if (kAdd == kCodes) value = vf_fma(vf_of_int(vi_load_u8(added + v * W)), how.factor, value);
      if (kAdd == kFloats) {
        const VF floats = vf_load_as(added + v * W * added_bytes, a.residual_dtype, W);
        value = vf_fma(floats, how.factor, value);
        poison = vf_fma(floats, none, poison);
      }
      if (kAdd == kProduct) {
        const VF other = vf_load(product + (i * V + v) * W);
        value = vf_add(value, other);
        poison = vf_fma(other, none, poison);
      }
      vi_store_u8(y + v * W, vi_round(vf_min(vf_max(value, how.lowest), how.highest)));
    }
  }
}

}  // namespace
