// Convolutions as products of patches that are read where they lie in an image of codes, on AMX: a tile of activations
// is the 64 bytes from the same place of the patches of a segment's outputs, which the stride of a tile load steps
// over, whatever the convolution's own stride is. Up to two segments of 16 outputs by 32 columns: four multiplies of
// unsigned by signed bytes for four tile loads. The sums start at the correction of the zero point, and are finished
// from memory. Bound by the multiply, and by finishing where a patch has up to 128 bytes. Include after tile_direct.h.
#pragma once

#include "tile_amx.h"

namespace {

#ifdef NYBBLE_EMULATE_AMX
template <int acc, int a, int b>
inline void tile_dot_u8s8() {
  emulated::tdpbusd(acc, a, b);
}
#else
template <int acc, int a, int b>
NYBBLE_INLINE void tile_dot_u8s8() {
  __asm__ volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(acc), "i"(a), "i"(b));
}
#endif

// Bytes of weights, in the L2 cache, that are multiplied with all segments before the next ones.
constexpr int64_t kDirectWeights = 1 << 18;

// The sums [pixel][V * W] of a segment.
template <int V>
using SegmentSums = int32_t[NYBBLE_TILE_PIXELS * V * W];

// The configuration of the tiles: those of two segments of `pixels` outputs, and steps of `bytes` bytes.
class DirectTiles {
 public:
  // Loaded only if it changes.
  void set(int64_t pixels, int64_t bytes) {
    if (bytes == bytes_) return;
    bytes_ = bytes;
    TileConfig config;
    for (int tile = 0; tile < 4; tile++) config.set(tile, pixels, W * 4);
    for (int tile = 4; tile < 6; tile++) config.set(tile, pixels, bytes);
    for (int tile = 6; tile < 8; tile++) config.set(tile, bytes / 4, W * 4);
    tile_configure(config);
  }

 private:
  TileConfigKept kept_;
  int64_t bytes_ = 0;
};

// Bytes of a step: the runs of a patch are as few steps as they can be.
inline int64_t step_of(const NybbleDirectArgs& a) {
  const int64_t steps = (a.run + NYBBLE_LINE_K - 1) / NYBBLE_LINE_K;
  return a.run / steps;
}

inline bool is_whole(const NybbleDirectArgs& a) {
  const int64_t steps = (a.run + NYBBLE_LINE_K - 1) / NYBBLE_LINE_K;
  return a.run > 0 && a.run % (4 * steps) == 0;
}

// Memory that is fetched into the L2 cache, a few lines at a time.
class Ahead {
 public:
  Ahead() = default;
  Ahead(const uint8_t* from, int64_t bytes) : at_(from), end_(from + bytes) {}
  // Its shares from one on to another, of so many.
  Ahead shares(int64_t from, int64_t to, int64_t of) const {
    const int64_t bytes = end_ - at_;
    return {at_ + bytes * from / of, bytes * to / of - bytes * from / of};
  }
  NYBBLE_INLINE void step(Ahead& to) {
    if (to.at_ >= to.end_) return;
#pragma GCC unroll 8
    for (int i = 0; i < kLines; i++) __builtin_prefetch(to.at_ + i * kLine, 0, 2);
    to.at_ += kLines * kLine;
  }

 private:
  static constexpr int kLines = 8;
  const uint8_t *at_ = nullptr, *end_ = nullptr;
};

// Adds the products of a patch's runs. Tile 2 s + v has the sums of segment s and the v-th 16 columns.
template <int S, int V>
__attribute__((noinline)) static void multiply_runs(const NybbleDirectArgs& a, const NybbleSegment* segment,
                                                    int64_t column, Ahead& ahead) {
  const int64_t step = step_of(a), steps = a.run / step, position = a.position;
  const uint8_t *w0 = a.codes + column * a.k_padded, *w1 = w0 + (V - 1) * NYBBLE_TILE_N * a.k_padded;
  Ahead fetched = ahead;  // in registers
  for (int64_t run = 0; run < a.runs; run++) {
    const uint8_t *x0 = segment[0].x + a.offset[run], *x1 = segment[S - 1].x + a.offset[run];
    for (int64_t i = 0; i < steps; i++) {
      tile_load<6>(w0, NYBBLE_TILE_N * 4);
      tile_load<4>(x0, position);
      tile_dot_u8s8<0, 4, 6>();
      if constexpr (V > 1) {
        tile_load<7>(w1, NYBBLE_TILE_N * 4);
        tile_dot_u8s8<1, 4, 7>();
      }
      if constexpr (S > 1) {
        tile_load<5>(x1, position);
        tile_dot_u8s8<2, 5, 6>();
        if constexpr (V > 1) tile_dot_u8s8<3, 5, 7>();
      }
      Ahead::step(fetched);
      x0 += step;
      x1 += step;
      w0 += NYBBLE_TILE_N * step;
      w1 += NYBBLE_TILE_N * step;
    }
  }
  ahead = fetched;
}

// The sums of S segments and V * W columns, which begin at start[V * W] for every output.
template <int S, int V>
NYBBLE_INLINE void segment_sums(const NybbleDirectArgs& a, const NybbleSegment* segment, int64_t column,
                                const int32_t* start, DirectTiles& tiles, Ahead& ahead, SegmentSums<V>* to) {
  constexpr int64_t stride = V * W * 4;
  tiles.set(a.pixels, step_of(a));
  tile_load<0>(start, 0);
  if constexpr (V > 1) tile_load<1>(start + W, 0);
  if constexpr (S > 1) tile_load<2>(start, 0);
  if constexpr (S > 1 && V > 1) tile_load<3>(start + W, 0);
  multiply_runs<S, V>(a, segment, column, ahead);
  tile_store<0>(to[0], stride);
  if constexpr (V > 1) tile_store<1>(to[0] + W, stride);
  if constexpr (S > 1) tile_store<2>(to[S - 1], stride);
  if constexpr (S > 1 && V > 1) tile_store<3>(to[S - 1] + W, stride);
}

// Columns [from, to) of the weights, and what the outputs of segments with one scale and zero point need of each.
template <int kAdd>
class TileColumns {
 public:
  static constexpr int64_t kMost = 512;
  const int64_t from, to;

  TileColumns(const NybbleDirectArgs& a, const Codes& how, int64_t begin, int64_t end)
      : from(begin), to(end), a_(a), how_(how) {}

  // For such segments; `other` is of a.more.
  void prepare(const NybbleSegment& segment, const NybbleSegment* other) {
    if (ready_ && alike(segment, of_) && (kAdd != kProduct || alike(*other, other_))) return;
    ready_ = true;
    of_ = segment;
    starts(a_, segment, start_);
    if (kAdd == kProduct) {
      other_ = *other;
      starts(*a_.more, *other, other_start_);
    }
    poison_ = vf_set1(0.0f);
    if (kAdd == kNever) return;
    for (int64_t column = from; column + 2 * W <= to && column + 2 * W <= a_.n; column += 2 * W) {
      write_factors<2, kAdd>(factors_ + 2 * (column - from), a_, how_, segment, column, poison_);
      if (kAdd != kProduct) continue;
      for (int v = 0; v < 2; v++) {
        const VF scale = scale_of(*a_.more, how_, *other, column + v * W);
        poison_ = vf_fma(vf_mul(scale, vf_set1(0x1p31f)), vf_set1(0.0f), poison_);
        vf_store(other_scale_ + column - from + v * W, scale);
      }
    }
  }

  const int32_t* start(int64_t column) const { return start_ + column - from; }
  const int32_t* other_start(int64_t column) const { return other_start_ + column - from; }
  VF poison() const { return poison_; }

  // Finishes two vectors of columns of a segment as codes, two pixels at a time.
  void write(const NybbleSegment& segment, int64_t column, const int32_t* sums, const int32_t* more) const {
    constexpr int V = 2;
    const NybbleDirectArgs& a = a_;
    const Codes how = how_;
    VF scale[V], bias[V], other_scale[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) {
      scale[v] = vf_load(factors_ + 2 * (column - from) + v * W);
      bias[v] = vf_load(factors_ + 2 * (column - from) + (V + v) * W);
      if (kAdd == kProduct) other_scale[v] = vf_load(other_scale_ + column - from + v * W);
    }
    uint8_t* y = static_cast<uint8_t*>(a.y) + segment.y + column;
    const uint8_t* added = static_cast<const uint8_t*>(a.residual);
    if (kAdd == kCodes) added += segment.residual + column;
    for (int64_t i = segment.skip; i < a.pixels; i += 2) {
      const int64_t pixel[] = {i, i + 1 < a.pixels ? i + 1 : i};  // the last one may be written twice
      VI codes[2 * V];
#pragma GCC unroll 2
      for (int p = 0; p < 2; p++)
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) {
          const int64_t at = pixel[p] * V * W + v * W;
          VF value = vf_fma(vf_of_int(vi_load(sums + at)), scale[v], bias[v]);
          if (kAdd == kCodes) value = vf_fma(vf_of_int(vi_load_u8(added + pixel[p] * a.n + v * W)), how.factor, value);
          if (kAdd == kProduct) value = vf_add(value, vf_mul(vf_of_int(vi_load(more + at)), other_scale[v]));
          codes[p * V + v] = vi_round(vf_min(vf_max(value, how.lowest), how.highest));
        }
      const VI bytes = bytes_of(codes);
      _mm512_mask_storeu_epi32(y + pixel[0] * a.n, 0x00ff, bytes);
      _mm512_mask_storeu_epi32(y + pixel[1] * a.n - V * W, 0xff00, bytes);
    }
  }

 private:
  static bool alike(const NybbleSegment& a, const NybbleSegment& b) {
    return a.sample == b.sample || (a.act_scale == b.act_scale && a.zero == b.zero);
  }

  void starts(const NybbleDirectArgs& a, const NybbleSegment& segment, int32_t* sums) const {
    const int32_t zero = a.y_dtype == NYBBLE_S32 ? 128 : segment.zero;
    for (int64_t column = from; column < to; column += W)
      vi_store(sums + column - from, vi_mul(vi_load(a.column_sum + column), vi_set1(-zero)));
  }

  const NybbleDirectArgs& a_;
  const Codes& how_;
  bool ready_ = false;
  NybbleSegment of_{}, other_{};
  VF poison_ = vf_set1(0.0f);
  alignas(64) int32_t start_[kMost];
  alignas(64) int32_t other_start_[kAdd == kProduct ? kMost : W];
  alignas(64) float factors_[kAdd == kNever ? W : 2 * kMost];
  alignas(64) float other_scale_[kAdd == kProduct ? kMost : W];
};

// S segments of one scale and zero point: 2 * W columns at a time, then W.
template <int S, int kAdd>
inline void run_segments(const NybbleDirectArgs& a, const NybbleSegment* segment, TileColumns<kAdd>& columns,
                         DirectTiles& tiles, Ahead ahead, Finisher& finish) {
  alignas(64) SegmentSums<2> sums[S], more[S];
  const NybbleSegment* other = kAdd == kProduct ? a.more->segment + (segment - a.segment) : nullptr;
  columns.prepare(*segment, other);
  if (kAdd != kNever)
    for (int s = 0; s < S; s++) {
      VF& poison = finish.poison_of(segment[s]);
      poison = vf_add(poison, columns.poison());
    }
  int64_t column = columns.from;
  for (; column + 2 * W <= columns.to; column += 2 * W) {
    if (kAdd == kProduct) segment_sums<S, 2>(*a.more, other, column, columns.other_start(column), tiles, ahead, more);
    segment_sums<S, 2>(a, segment, column, columns.start(column), tiles, ahead, sums);
    for (int s = 0; s < S; s++) {
      if (kAdd != kNever && column + 2 * W <= a.n)
        columns.write(segment[s], column, sums[s], more[s]);
      else
        finish(segment[s], column, 2, sums[s]);
    }
  }
  if (column >= columns.to) return;
  alignas(64) SegmentSums<1> last[S];
  segment_sums<S, 1>(a, segment, column, columns.start(column), tiles, ahead, last);
  for (int s = 0; s < S; s++) finish(segment[s], column, 1, last[s]);
}

// Columns that are multiplied with all segments before the next ones: at least so many that two column tiles after the
// first two find the patches in the L1 cache.
inline int64_t tile_columns_at_a_time(const NybbleDirectArgs& a, int64_t most) {
  const int64_t k = a.k_padded + (a.more ? a.more->k_padded : 0), columns = kDirectWeights / k / (2 * W) * (2 * W);
  return columns < 4 * W ? 4 * W : columns < most ? columns : most;
}

// All segments and columns. Segments of two samples have no scale in common.
template <int kAdd>
inline void tile_all(const NybbleDirectArgs& a, Finisher& finish) {
  const int64_t end = a.tile_end * NYBBLE_TILE_N, step = tile_columns_at_a_time(a, TileColumns<kAdd>::kMost);
  DirectTiles tiles;
  for (int64_t from = a.tile_begin * NYBBLE_TILE_N; from < end; from += step) {
    const int64_t to = from + step < end ? from + step : end, next = to + step < end ? step : end - to;
    const Ahead ahead(a.codes + to * a.k_padded, next * a.k_padded);
    TileColumns<kAdd> columns(a, finish.codes(), from, to);
    for (int64_t i = 0, count = 0; i < a.segments; i += count) {
      const NybbleSegment* segment = a.segment + i;
      count = i + 1 < a.segments && segment[0].sample == segment[1].sample ? 2 : 1;
      // The first ones read the weights themselves.
      const Ahead share = i < 2 ? Ahead() : ahead.shares(i - 2, i - 2 + count, a.segments - 2);
      if (count == 2)
        run_segments<2, kAdd>(a, segment, columns, tiles, share, finish);
      else
        run_segments<1, kAdd>(a, segment, columns, tiles, share, finish);
    }
  }
}

inline NybbleStatus direct_tiles(const NybbleDirectArgs* a) {
  Finisher finish(*a);
  if (!finish.able()) return NYBBLE_UNSUPPORTED;
  if (a->each_channel) return direct_all_channels(*a, finish);
  if (a->pixels > NYBBLE_TILE_PIXELS || !is_whole(*a) || (a->more && !is_whole(*a->more))) return NYBBLE_UNSUPPORTED;
  if (!finish.codes().serves)
    tile_all<kNever>(*a, finish);
  else if (a->more)
    tile_all<kProduct>(*a, finish);
  else if (a->residual)
    tile_all<kCodes>(*a, finish);
  else
    tile_all<kNothing>(*a, finish);
  return NYBBLE_OK;
}

}  // namespace
