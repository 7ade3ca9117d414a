// Sums of convolutions in which each channel has its own weight, from an image of codes: 64 channels in the lanes. The
// bytes of four taps are interleaved, so that one dot_u8s8 multiplies all four with a line of the weight's layout,
// which holds just those of 16 channels. Bound by the interleaving: 8 shuffles for 4 multiplies. AVX-512 only. Included
// by tile_direct.h.
#pragma once

#include "../abi_conv.h"
#include "tile_inline.h"

namespace {

constexpr int kLanes = 4;  // of 16 channels
constexpr int64_t kChannels = kLanes * NYBBLE_TILE_N;
constexpr int64_t kMostQuads = NYBBLE_DIRECT_TAPS / 4;

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

// The products of a quad of taps: acc[i] has, in lane j, channels 4 i .. 4 i + 3 of the j-th 16.
NYBBLE_INLINE void add_quad(VI (&acc)[kLanes], const uint8_t* x, const int64_t* offset, const VI (&weight)[kLanes]) {
  const VI a = vi_load(x + offset[0]), b = vi_load(x + offset[1]);
  const VI c = vi_load(x + offset[2]), d = vi_load(x + offset[3]);
  const VI ab = _mm512_unpacklo_epi8(a, b), ab2 = _mm512_unpackhi_epi8(a, b);
  const VI cd = _mm512_unpacklo_epi8(c, d), cd2 = _mm512_unpackhi_epi8(c, d);
  dot_u8s8(acc[0], _mm512_unpacklo_epi16(ab, cd), weight[0]);
  dot_u8s8(acc[1], _mm512_unpackhi_epi16(ab, cd), weight[1]);
  dot_u8s8(acc[2], _mm512_unpacklo_epi16(ab2, cd2), weight[2]);
  dot_u8s8(acc[3], _mm512_unpackhi_epi16(ab2, cd2), weight[3]);
}

// The weights and places of the taps of 64 channels; those that fill up the last quad have the weight 0.
struct Taps {
  int64_t quads;
  int64_t offset[kMostQuads * 4];
  VI weight[kMostQuads][kLanes];
  VI column_sum[kLanes];

  Taps(const NybbleDirectArgs& a, int64_t column) : quads((a.runs + 3) / 4) {
    for (int64_t t = 0; t < quads * 4; t++) offset[t] = a.offset[t < a.runs ? t : 0] + column;
    for (int64_t j = 0; j < kLanes; j++) {
      const int64_t at = column + j * NYBBLE_TILE_N;
      const bool held = at < a.n;
      column_sum[j] = held ? vi_load(a.column_sum + at) : vi_set1(0);
      for (int64_t q = 0; q < quads; q++)
        weight[q][j] = held ? vi_load(a.codes + at * a.k_padded + q * 64) : vi_set1(0);
    }
    for (int64_t q = 0; q < quads; q++) exchange_lanes(weight[q]);
  }
};

// sums[pixel][64] of a segment.
inline void channel_sums(const NybbleDirectArgs& a, const NybbleSegment& segment, const Taps& taps, int32_t* sums) {
  const VI zero = vi_set1(a.y_dtype == NYBBLE_S32 ? -128 : -segment.zero);
  VI start[kLanes];
#pragma GCC unroll 4
  for (int j = 0; j < kLanes; j++) start[j] = vi_mul(taps.column_sum[j], zero);
  for (int64_t i = segment.skip; i < a.pixels; i++) {
    const uint8_t* x = segment.x + i * a.position;
    VI acc[kLanes] = {vi_set1(0), vi_set1(0), vi_set1(0), vi_set1(0)};
    for (int64_t q = 0; q < taps.quads; q++) add_quad(acc, x, taps.offset + q * 4, taps.weight[q]);
    exchange_lanes(acc);
#pragma GCC unroll 4
    for (int j = 0; j < kLanes; j++) vi_store(sums + i * kChannels + j * W, vi_add(acc[j], start[j]));
  }
}

}  // namespace
