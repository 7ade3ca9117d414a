// Convolutions in which each channel has its own weight, from an image of codes: 64 channels in the lanes. The bytes of
// four taps are interleaved, so that one dot_u8s8 multiplies all four with a vector of the weights, which holds just
// those of 16 channels. Taps of four rows of the kernel are interleaved once for each column of the image, and serve
// all outputs whose patches have it; kernels of one row, and those too large for that, take four taps in their order.
// Bound by the multiplies and by finishing. AVX-512 only. Included by tile_direct.h.
#pragma once

#include "../abi_conv.h"
#include "tile_direct_codes.h"
#include "tile_inline.h"

namespace {

constexpr int kLanes = 4;  // of 16 channels
constexpr int64_t kChannels = kLanes * NYBBLE_TILE_N;
constexpr int64_t kMostQuads = NYBBLE_DIRECT_TAPS / 2;  // of two taps at least
constexpr int64_t kMostHeld = 80;                       // quads of columns of the image that are held

template <int kControl>
NYBBLE_INLINE VI shuffle_lanes(VI a, VI b) {
  return vi_of_bits(_mm512_shuffle_f32x4(vf_of_bits(a), vf_of_bits(b), kControl));
}

// Exchanges lanes: of vector i, lane j becomes lane i of vector j.
inline void exchange_lanes(VI (&v)[kLanes]) {
  constexpr int kEven = 0x88, kOdd = 0xdd;
  const VI a = shuffle_lanes<kEven>(v[0], v[1]), b = shuffle_lanes<kOdd>(v[0], v[1]);
  const VI c = shuffle_lanes<kEven>(v[2], v[3]), d = shuffle_lanes<kOdd>(v[2], v[3]);
  v[0] = shuffle_lanes<kEven>(a, c);
  v[2] = shuffle_lanes<kOdd>(a, c);
  v[1] = shuffle_lanes<kEven>(b, d);
  v[3] = shuffle_lanes<kOdd>(b, d);
}

using Quad = VI[kLanes];  // vector i has, in lane j, channels 4 i .. 4 i + 3 of the j-th 16

// The bytes of four taps of 64 channels.
NYBBLE_INLINE void load_quad(const uint8_t* x, const int64_t* offset, Quad& to) {
  const VI a = vi_load(x + offset[0]), b = vi_load(x + offset[1]);
  const VI c = vi_load(x + offset[2]), d = vi_load(x + offset[3]);
  const VI ab = _mm512_unpacklo_epi8(a, b), ab2 = _mm512_unpackhi_epi8(a, b);
  const VI cd = _mm512_unpacklo_epi8(c, d), cd2 = _mm512_unpackhi_epi8(c, d);
  to[0] = _mm512_unpacklo_epi16(ab, cd);
  to[1] = _mm512_unpackhi_epi16(ab, cd);
  to[2] = _mm512_unpacklo_epi16(ab2, cd2);
  to[3] = _mm512_unpackhi_epi16(ab2, cd2);
}

// Byte `from` of each 32-bit lane as byte `to`, and 0 as the others.
inline VI move_byte(VI a, int64_t from, int64_t to) {
  const VI one = vi_and(a, vi_set1(static_cast<int32_t>(0xffu << (8 * from))));
  if (to >= from) return vi_mul(one, vi_set1(static_cast<int32_t>(1u << (8 * (to - from)))));
  return from - to == 1   ? vi_shift_right_32<8>(one)
         : from - to == 2 ? vi_shift_right_32<16>(one)
                          : vi_shift_right_32<24>(one);
}

inline int64_t common_divisor(int64_t a, int64_t b) { return b ? common_divisor(b, a % b) : a; }

// The weights and places of the taps of 64 channels. A quad of taps is those of four rows and a column of the kernel,
// or four taps one after the other; those that fill one up have the weight 0.
struct Taps {
  int64_t quads, width, unit;      // width: quads of the same rows, or 0; unit: bytes from a column to the next
  int64_t position, tap, most;     // columns from an output, and from a quad, to the next; most: outputs at a time
  int64_t offset[kMostQuads * 4];  // of quads of taps in their order, or of the first column's
  VI column_sum[kLanes];
  Quad weight[kMostQuads];

  Taps(const NybbleDirectArgs& a, int64_t column) : width(0), unit(1), position(0), tap(0), most(a.pixels) {
    const int64_t wide = a.each_channel, high = a.runs / wide;
    set_columns(a, wide, (high + 3) / 4);
    quads = width ? width * ((high + 3) / 4) : (a.runs + 3) / 4;
    for (int64_t j = 0; j < kLanes; j++) {
      const int64_t at = column + j * NYBBLE_TILE_N;
      column_sum[j] = at < a.n ? vi_load(a.column_sum + at) : vi_set1(0);
    }
    for (int64_t q = 0; q < quads; q++) {
      for (int64_t j = 0; j < kLanes; j++) weight[q][j] = vi_set1(0);
      for (int64_t r = 0; r < 4; r++) {
        const int64_t t = width ? (q / width * 4 + r) * width + q % width : q * 4 + r;
        offset[q * 4 + r] = a.offset[t < a.runs ? t : 0] + column;
        for (int64_t j = 0; j < kLanes && t < a.runs; j++) {
          const int64_t at = column + j * NYBBLE_TILE_N;
          if (at >= a.n) break;
          weight[q][j] = vi_add(weight[q][j], move_byte(vi_load(a.codes + at * a.k_padded + t / 4 * 64), t % 4, r));
        }
      }
      exchange_lanes(weight[q]);
    }
  }

 private:
  // Whether quads are of four rows, which must be so few that the columns of an output's patch are held.
  void set_columns(const NybbleDirectArgs& a, int64_t wide, int64_t rows) {
    if (a.runs == wide || wide * rows > kMostQuads) return;
    const int64_t step = wide > 1 ? a.offset[1] - a.offset[0] : a.position;
    unit = common_divisor(a.position, step);
    position = a.position / unit;
    tap = step / unit;
    const int64_t columns = kMostHeld / rows - 1 - (wide - 1) * tap;
    if (columns < 0) return;
    width = wide;
    most = columns / position + 1 < a.pixels ? columns / position + 1 : a.pixels;
  }
};

// Calls put(pixel, sums) for the outputs [skip, pixels) of a segment; the sums lack the correction of the zero point.
template <class Put>
NYBBLE_INLINE void each_channel_sums(const NybbleDirectArgs& a, const NybbleSegment& segment, const Taps& taps,
                                     const Put& put) {
  Quad held[kMostHeld];
  const int64_t rows = taps.width ? taps.quads / taps.width : 0;
  for (int64_t from = segment.skip; from < a.pixels; from += taps.most) {
    const int64_t end = from + taps.most < a.pixels ? from + taps.most : a.pixels;
    const uint8_t* x = segment.x + from * a.position;
    const int64_t columns = (end - from - 1) * taps.position + (taps.width - 1) * taps.tap + 1;
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = 0; c < columns; c++)
        load_quad(x + c * taps.unit, taps.offset + r * taps.width * 4, held[r * columns + c]);
    for (int64_t i = from; i < end; i++, x += a.position) {
      Quad acc = {vi_set1(0), vi_set1(0), vi_set1(0), vi_set1(0)};
      const auto add = [&](const Quad& codes, const Quad& weight) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int j = 0; j < kLanes; j++) dot_u8s8(acc[j], codes[j], weight[j]);
      };
      if (taps.width) {
        for (int64_t r = 0; r < rows; r++) {
          const Quad* codes = held + r * columns + (i - from) * taps.position;
          for (int64_t t = 0; t < taps.width; t++, codes += taps.tap) add(*codes, taps.weight[r * taps.width + t]);
        }
      } else {
        for (int64_t q = 0; q < taps.quads; q++) {
          Quad codes;
          load_quad(x, taps.offset + q * 4, codes);
          add(codes, taps.weight[q]);
        }
      }
      put(i, acc);
    }
  }
}

// The correction of the zero point of a segment's sums.
inline void start_of(const NybbleDirectArgs& a, const NybbleSegment& segment, const Taps& taps, Quad& start) {
  const VI zero = vi_set1(a.y_dtype == NYBBLE_S32 ? -128 : -segment.zero);
#pragma GCC unroll 4
  for (int j = 0; j < kLanes; j++) start[j] = vi_mul(taps.column_sum[j], zero);
}

// sums[pixel][64] of a segment.
inline void channel_sums(const NybbleDirectArgs& a, const NybbleSegment& segment, const Taps& taps, int32_t* sums) {
  Quad start;
  start_of(a, segment, taps, start);
  each_channel_sums(a, segment, taps, [&](int64_t i, Quad& acc) __attribute__((always_inline)) {
    exchange_lanes(acc);
#pragma GCC unroll 4
    for (int j = 0; j < kLanes; j++) vi_store(sums + i * kChannels + j * W, vi_add(acc[j], start[j]));
  });
}

// The codes of a segment's outputs, of which `channels` are in the image, a multiple of 16: the sums stay in the order
// of Quad, as the factors are, and packing brings back that of the channels.
inline void write_channels(const NybbleDirectArgs& a, const Codes& codes, const NybbleSegment& segment,
                           const Taps& taps, int64_t column, int64_t channels, VF& poison) {
  const Codes how = codes;
  alignas(64) float factors[2 * W];
  Quad start, scale, bias;
  start_of(a, segment, taps, start);
  exchange_lanes(start);
  for (int j = 0; j < kLanes; j++) {
    const bool held = j * NYBBLE_TILE_N < channels;
    if (held) write_factors<1, kNothing>(factors, a, how, segment, column + j * NYBBLE_TILE_N, poison);
    scale[j] = held ? vi_load(factors) : vi_set1(0);
    bias[j] = held ? vi_load(factors + W) : vi_set1(0);
  }
  exchange_lanes(scale);
  exchange_lanes(bias);
  uint8_t* y = static_cast<uint8_t*>(a.y) + segment.y + column;
  each_channel_sums(a, segment, taps, [&](int64_t i, const Quad& acc) __attribute__((always_inline)) {
    VI c[kLanes];
#pragma GCC unroll 4
    for (int j = 0; j < kLanes; j++) {
      const VF value = vf_fma(vf_of_int(vi_add(acc[j], start[j])), vf_of_bits(scale[j]), vf_of_bits(bias[j]));
      c[j] = vi_round(vf_min(vf_max(value, how.lowest), how.highest));
    }
    const VI bytes = _mm512_packus_epi16(_mm512_packs_epi32(c[0], c[1]), _mm512_packs_epi32(c[2], c[3]));
    if (channels >= kChannels)
      vi_store(y + i * a.n, bytes);
    else
      _mm512_mask_storeu_epi32(y + i * a.n, static_cast<__mmask16>((1u << (channels / 4)) - 1), bytes);
  });
}

}  // namespace
