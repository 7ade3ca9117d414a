// Outputs of convolutions in place as codes. Of whole tiles:
//   code + 128 = round(min(max(sum * scale + bias + residual * factor, lowest), highest))
// with the scale of y, its zero point and all of the residual's offset in the factors, so the activation is a bound:
// ten instructions for W outputs, which run beside the multiplies of the next tile. Else value by value, as convert of
// tile_prepare.h does with a given scale. Included by tile_direct.h.
#pragma once

#include "../abi_conv.h"
#include "tile_inline.h"

namespace {

constexpr int kPixels = NYBBLE_PIXELS;

constexpr int64_t dtype_bytes(int dtype) {
  return dtype == NYBBLE_U8 ? 1 : dtype == NYBBLE_F32 || dtype == NYBBLE_S32 ? 4 : 2;
}

// What is added to the product: floats, codes, or another product. kNever: of tiles whose outputs do not wait.
enum { kNothing = 0, kFloats = 1, kCodes = 2, kProduct = 3, kNever = 4 };

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

// How sums become codes a vector at a time, without a branch.
struct Codes {
  bool serves, saturates;  // saturates: the bounds are those of a byte, or lower
  float inverse, shift;
  VF lowest, highest, factor;
  explicit Codes(const NybbleDirectArgs& a)
      : serves(a.y_dtype == NYBBLE_U8 && (a.act == NYBBLE_ACT_IDENTITY || a.act == NYBBLE_ACT_RELU) &&
               (!a.residual || a.residual_dtype == NYBBLE_U8)),
        inverse(a.how.inverse),
        shift(128.0f + static_cast<float>(a.how.zero)) {
    const float most = a.most * inverse + shift, step = a.residual_scale * inverse;
    lowest = vf_set1(a.act == NYBBLE_ACT_RELU ? shift : 0.0f);
    highest = vf_set1(most < 255.0f ? most : 255.0f);
    factor = vf_set1(step);
    saturates = a.act == NYBBLE_ACT_IDENTITY || shift == 0.0f;
    if (a.residual) shift -= (128.0f + static_cast<float>(a.residual_zero)) * step;
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

// Four vectors, one after the other, bounded by 0 and 255, as bytes.
NYBBLE_INLINE VI bytes_of(const VI (&a)[4]) {
  static const int32_t kOrder[] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
  const VI bytes = _mm512_packus_epi16(_mm512_packs_epi32(a[0], a[1]), _mm512_packs_epi32(a[2], a[3]));
  return vi_of_bits(_mm512_permutexvar_ps(vi_load(kOrder), vf_of_bits(bytes)));
}

// The codes of V * W columns of a pixel.
template <int V, int kAdd, class Sum>
NYBBLE_INLINE void write_pixel(const Codes& how, const Sum& sum, const VF (&scale)[V], const float* bias,
                               const void* added, uint8_t* y) {
  VI codes[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; v++) {
    VF value = vf_fma(vf_of_int(sum(v)), scale[v], vf_load(bias + v * W));
    if (kAdd == kCodes)
      value = vf_fma(vf_of_int(vi_load_u8(static_cast<const uint8_t*>(added) + v * W)), how.factor, value);
    if (kAdd == kProduct) value = vf_add(value, vf_load(static_cast<const float*>(added) + v * W));
    if (V < 4) value = vf_max(value, how.lowest);
    codes[v] = vi_round(vf_min(value, how.highest));
    if (V < 4) vi_store_u8(y + v * W, codes[v]);
  }
  if constexpr (V == 4) vi_store(y, bytes_of(codes));
}

// The scales, then the biases, of V * W columns of a segment, in codes of y; those that make values that are NaN or Inf
// are noted in `poison`.
template <int V, int kAdd>
NYBBLE_INLINE void write_factors(float* factors, const NybbleDirectArgs& a, const Codes& how,
                                 const NybbleSegment& segment, int64_t column, VF& poison) {
  const VF none = vf_set1(0.0f), largest = vf_set1(0x1p31f);
#pragma GCC unroll 4
  for (int v = 0; v < V; v++) {
    const int64_t at = column + v * W;
    const VF scale = scale_of(a, how, segment, at);
    VF bias = add_bias(a, how, at, vf_set1(how.shift));
    if (kAdd == kProduct) bias = add_bias(*a.more, how, at, bias);
    poison = vf_fma(vf_fma(scale, largest, bias), none, poison);
    vf_store(factors + v * W, scale);
    vf_store(factors + (V + v) * W, bias);
  }
}

// The outputs of a tile that wait: they are written, a pixel at a time, while the next tile is multiplied, whose
// multiplies leave room for that.
template <int S, int V>
struct Waiting {
  static constexpr int kSegments = S, kVectors = V, kMost = S * kPixels;
  struct Pixel {
    const int32_t* sums;   // [V * W]
    const float* factors;  // scale, then bias, [V * W] each
    uint8_t* y;
    const void* added;  // codes, or the other product, float [V * W]
  };
  alignas(64) int32_t sums[kMost * V * W];
  alignas(64) float factors[S * 2 * V * W];
  alignas(64) float product[kMost * V * W];
  Pixel pixel[kMost];
  int64_t next = 0, count = 0;

  template <int kAdd>
  NYBBLE_INLINE void write(Waiting& to, const Codes& how) {
    const Pixel& p = to.pixel[to.next++];
    VF scale[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) scale[v] = vf_load(p.factors + v * W);
    write_pixel<V, kAdd>(
        how, [&](int v) __attribute__((always_inline)) { return vi_load(p.sums + v * W); }, scale, p.factors + V * W,
        p.added, p.y);
  }

  // Writes the outputs of a segment at once.
  template <int kAdd>
  NYBBLE_INLINE void finish(Waiting& to, const NybbleDirectArgs& a, const Codes& how, const NybbleSegment& segment,
                            int64_t column, const VI (&acc)[kPixels][V], VF& poison) {
    write_factors<V, kAdd>(to.factors, a, how, segment, column, poison);
    VF scale[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) scale[v] = vf_load(to.factors + v * W);
    uint8_t* y = static_cast<uint8_t*>(a.y) + segment.y + column;
    const uint8_t* added = static_cast<const uint8_t*>(a.residual);
    if (kAdd == kCodes) added += segment.residual + column;
#pragma GCC unroll 8
    for (int i = 0; i < kPixels; i++, y += a.n, added += a.n) {
      if (i < segment.skip) continue;
      write_pixel<V, kAdd>(
          how, [&](int v) __attribute__((always_inline)) { return acc[i][v]; }, scale, to.factors + V * W,
          kAdd == kProduct ? static_cast<const void*>(to.product + i * V * W) : added, y);
    }
  }

  // Notes the outputs of segment s of a tile, and the sums of its pixels.
  template <int kAdd>
  NYBBLE_INLINE void put(Waiting& to, int s, const NybbleDirectArgs& a, const Codes& how, const NybbleSegment& segment,
                         int64_t column, const VI (&acc)[kPixels][V], VF& poison) {
    float* factors = to.factors + s * 2 * V * W;
    write_factors<V, kAdd>(factors, a, how, segment, column, poison);
#pragma GCC unroll 4
    for (int v = 0; v < V; v++)
#pragma GCC unroll 8
      for (int i = 0; i < kPixels; i++) vi_store(to.sums + ((s * kPixels + i) * V + v) * W, acc[i][v]);
    uint8_t* y = static_cast<uint8_t*>(a.y) + segment.y + column;
    const uint8_t* added = static_cast<const uint8_t*>(a.residual);
    if (kAdd == kCodes) added += segment.residual + column;
    for (int64_t i = segment.skip; i < kPixels; i++) {
      const int64_t at = (s * kPixels + i) * V * W;
      to.pixel[to.count++] = {to.sums + at, factors, y + i * a.n,
                              kAdd == kProduct ? static_cast<const void*>(to.product + at) : added + i * a.n};
    }
  }

  // The sums of segment s of another product, in codes of y.
  NYBBLE_INLINE void put_product(Waiting& to, int s, const NybbleDirectArgs& a, const Codes& how,
                                 const NybbleSegment& segment, int64_t column, const VI (&acc)[kPixels][V],
                                 VF& poison) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      const VF scale = scale_of(a, how, segment, column + v * W);
      poison = vf_fma(vf_mul(scale, vf_set1(0x1p31f)), vf_set1(0.0f), poison);
#pragma GCC unroll 8
      for (int i = 0; i < kPixels; i++)
        vf_store(to.product + ((s * kPixels + i) * V + v) * W, vf_mul(vf_of_int(acc[i][v]), scale));
    }
  }
};

}  // namespace
