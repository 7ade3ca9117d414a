// Convolutions as products of patches that are read where they lie in an image of codes, and finished as they leave the
// registers: nothing is packed. A segment of 7 outputs by 64 columns, or two by 32, keep 28 sums in registers; words of
// patches are broadcast from 7 places `position` bytes apart. Built on dot_u8s8. Bound by the multiply. Include after a
// target's tile header and tile_conv.h.
#pragma once

#include "../abi_conv.h"
#include "tile_codes.h"
#include "tile_direct_channels.h"
#include "tile_direct_codes.h"

namespace {

constexpr int kDirectVectors = kRegisters >= 32 ? 2 : 1;  // beside two segments
constexpr int64_t kAheadBytes = 1024;                     // of weights that are prefetched

// As dot_u8s8, of a vector in memory.
NYBBLE_INLINE void dot_u8s8_at(VI& acc, VI u, const uint8_t* s) {
#if defined(__GNUC__) && !defined(__clang__) && !defined(NYBBLE_EMULATE)
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(u), "m"(*reinterpret_cast<const uint8_t (*)[sizeof(VI)]>(s)));
#else
  dot_u8s8(acc, u, vi_load(s));
#endif
}

// Adds the products of `words` words of each patch, and after each of them calls step(). x advances by them, as w,
// whose vectors are `tile` bytes apart. Four vectors fill the registers: the last one is read where it lies.
template <int S, int V, class Step>
NYBBLE_INLINE void add_words(VI (&acc)[S][kPixels][V], const uint8_t* (&x)[S], int64_t position, int64_t words,
                             const uint8_t*& w, int64_t tile, const Step& step) {
  constexpr int kHeld = V < 4 ? V : 3;
  // Hidden from the compiler, which would keep an address for each place.
  int64_t third = 3 * position, fifth = 5 * position, last = 3 * tile;
  __asm__("" : "+r"(third), "+r"(fifth), "+r"(last));
  for (; words > 0; words--) {
    const uint8_t* from[] = {w, w + tile, w + 2 * tile, w + last};
    VI codes[kHeld];
#pragma GCC unroll 4
    for (int v = 0; v < kHeld; v++) {
      codes[v] = vi_load(from[v]);
      __builtin_prefetch(from[v] + kAheadBytes);
    }
#pragma GCC unroll 2
    for (int s = 0; s < S; s++) {
      const uint8_t* at[kPixels] = {
          x[s],         x[s] + position, x[s] + 2 * position, x[s] + third, x[s] + 4 * position,
          x[s] + fifth, x[s] + 2 * third};
#pragma GCC unroll 8
      for (int i = 0; i < kPixels; i++) {
        const VI word = word_at(at[i]);
#pragma GCC unroll 4
        for (int v = 0; v < kHeld; v++) dot_u8s8(acc[s][i][v], word, codes[v]);
        if constexpr (V > kHeld) dot_u8s8_at(acc[s][i][kHeld], word, from[kHeld]);
      }
      x[s] += 4;
    }
    if (V > kHeld) __builtin_prefetch(from[kHeld] + kAheadBytes);
    w += kLine;
    step();
  }
}

// The sums of S segments and V * W columns; writes what waits.
template <int S, int V, int kAdd, class Waits>
NYBBLE_INLINE void direct_sums(const NybbleDirectArgs& a, const NybbleSegment* segment, int64_t column,
                               VI (&acc)[S][kPixels][V], Waits& waiting, const Codes& how) {
  const uint8_t* w = a.codes + column / NYBBLE_TILE_N * NYBBLE_TILE_N * a.k_padded + column % NYBBLE_TILE_N * 4;
  // From W columns to the next ones: those of a tile lie side by side.
  const int64_t tile = W < NYBBLE_TILE_N ? W * 4 : NYBBLE_TILE_N * a.k_padded;
#pragma GCC unroll 4
  for (int v = 0; v < V; v++) {
    const int64_t at = column + v * W;
#pragma GCC unroll 2
    for (int s = 0; s < S; s++) {
      const int32_t zero = a.y_dtype == NYBBLE_S32 ? 128 : segment[s].zero;
      const VI start = vi_mul(vi_load(a.column_sum + at), vi_set1(-zero));
#pragma GCC unroll 8
      for (int i = 0; i < kPixels; i++) acc[s][i][v] = start;
    }
  }
  for (int64_t run = 0; run < a.runs; run++) {
    const uint8_t* x[S];
#pragma GCC unroll 2
    for (int s = 0; s < S; s++) x[s] = segment[s].x + a.offset[run];
    int64_t words = a.run / 4;
    if (kAdd != kNever && waiting.next < waiting.count) {
      const int64_t left = waiting.count - waiting.next, first = words < left ? words : left;
      words -= first;
      add_words<S, V>(acc, x, a.position, first, w, tile,
                      [&]() __attribute__((always_inline)) { Waits::template write<kAdd>(waiting, how); });
    }
    add_words<S, V>(acc, x, a.position, words, w, tile, []() __attribute__((always_inline)) {});
  }
  if (kAdd == kNever) return;
  while (waiting.next < waiting.count) Waits::template write<kAdd>(waiting, how);
  waiting.next = waiting.count = 0;
}

// Finishes W columns of the pixels of a segment, whose sums are `stride` apart.
template <int kDtype, int kAct, int kAdd, bool kWhole>
inline void finish_vectors(const NybbleDirectArgs& a, const Recoding& how, const NybbleSegment& segment, int64_t column,
                           const int32_t* sums, int64_t stride, Seen* seen) {
  constexpr int64_t bytes = dtype_bytes(kDtype);
  const int64_t lanes = kWhole ? W : a.n - column, first = segment.skip;
  const int64_t added_bytes = kAdd == kCodes ? 1 : dtype_bytes(a.residual_dtype);
  const VF scale = vf_mul(vf_set1(segment.act_scale), vf_load(a.scale + column));
  const VF most = vf_set1(a.most);
  VF bias = vf_set1(0.0f), poison = bias;
  if (a.bias)
    bias = vf_load_as(static_cast<const uint8_t*>(a.bias) + column * dtype_bytes(a.bias_dtype), a.bias_dtype, lanes);
  uint8_t* y = static_cast<uint8_t*>(a.y) + (segment.y + first * a.n + column) * bytes;
  const uint8_t* added = static_cast<const uint8_t*>(a.residual);
  if (kAdd) added += (segment.residual + first * a.n + column) * added_bytes;
  sums += first * stride;
  for (int64_t i = first; i < a.pixels; i++, y += a.n * bytes, sums += stride) {
    VF v = vf_fma(vf_of_int(vi_load(sums)), scale, bias);
    if (kAdd) {
      v = vf_add(v, kAdd == kCodes ? Recoding::read(how, added, lanes) : vf_load_as(added, a.residual_dtype, lanes));
      added += a.n * added_bytes;
    }
    v = vf_min(most, vf_act<kAct>(v));
    if constexpr (kDtype == NYBBLE_U8) {
      Recoding::write(how, v, y, lanes);
      poison = vf_fma(v, vf_set1(0.0f), poison);
    } else if (seen) {
      store_seen<kDtype>(v, y, lanes, *seen);
    } else {
      vf_store_as(y, kDtype, v, lanes);
    }
  }
  if (kDtype == NYBBLE_U8) seen->poison = vf_add(seen->poison, poison);
}

template <int kDtype, int kAct, int kAdd>
inline void finish_pixels(const NybbleDirectArgs& a, const Recoding& how, const NybbleSegment& segment, int64_t column,
                          const int32_t* sums, int64_t stride, Seen* seen) {
  if (a.n - column >= W)
    finish_vectors<kDtype, kAct, kAdd, true>(a, how, segment, column, sums, stride, seen);
  else
    finish_vectors<kDtype, kAct, kAdd, false>(a, how, segment, column, sums, stride, seen);
}

inline void store_pixels(const NybbleDirectArgs& a, const Recoding&, const NybbleSegment& segment, int64_t column,
                         const int32_t* sums, int64_t stride, Seen*) {
  int32_t* y = static_cast<int32_t*>(a.y) + segment.y + segment.skip * a.n + column;
  sums += segment.skip * stride;
  for (int64_t i = segment.skip; i < a.pixels; i++, y += a.n, sums += stride)
    vi_store_as_s32(y, vi_load(sums), a.n - column);
}

using FinishPixels = void (*)(const NybbleDirectArgs&, const Recoding&, const NybbleSegment&, int64_t, const int32_t*,
                              int64_t, Seen*);

template <int kDtype, int kAct>
inline FinishPixels finish_of_residual(const NybbleDirectArgs& a) {
  if (!a.residual) return finish_pixels<kDtype, kAct, kNothing>;
  return a.residual_dtype == NYBBLE_U8 ? finish_pixels<kDtype, kAct, kCodes> : finish_pixels<kDtype, kAct, kFloats>;
}

template <int kDtype>
inline FinishPixels finish_of_act(const NybbleDirectArgs& a) {
  switch (a.act) {
    case NYBBLE_ACT_IDENTITY:
      return finish_of_residual<kDtype, NYBBLE_ACT_IDENTITY>(a);
    case NYBBLE_ACT_RELU:
      return finish_of_residual<kDtype, NYBBLE_ACT_RELU>(a);
    case NYBBLE_ACT_SILU:
      return finish_of_residual<kDtype, NYBBLE_ACT_SILU>(a);
    default:
      return nullptr;
  }
}

inline FinishPixels finish_of(const NybbleDirectArgs& a) {
  switch (a.y_dtype) {
    case NYBBLE_F32:
      return finish_of_act<NYBBLE_F32>(a);
    case NYBBLE_BF16:
      return finish_of_act<NYBBLE_BF16>(a);
    case NYBBLE_F16:
      return finish_of_act<NYBBLE_F16>(a);
    case NYBBLE_U8:
      return finish_of_act<NYBBLE_U8>(a);
    case NYBBLE_S32:
      return store_pixels;
    default:
      return nullptr;
  }
}

// Finishes segments one after the other, and notes the ranges of their samples.
class Finisher {
 public:
  explicit Finisher(const NybbleDirectArgs& a) : a_(a), how_(a), finish_(finish_of(a)), codes_(a) {}
  ~Finisher() { note(); }
  bool able() const {
    const bool adds = !a_.more || (codes_.serves && !a_.residual && !a_.each_channel && a_.more->run % 4 == 0);
    return finish_ && adds && (a_.range || a_.y_dtype != NYBBLE_U8);
  }

  // Sums in registers, from a column on, whose outputs do not wait.
  template <int S, int V>
  NYBBLE_INLINE void tile(Finisher& to, const NybbleSegment* segment, int64_t column, const VI (&acc)[S][kPixels][V]) {
    alignas(64) int32_t sums[S * kPixels * V * W];
#pragma GCC unroll 2
    for (int s = 0; s < S; s++)
#pragma GCC unroll 8
      for (int i = 0; i < kPixels; i++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) vi_store(sums + ((s * kPixels + i) * V + v) * W, acc[s][i][v]);
    for (int s = 0; s < S; s++) to(segment[s], column, V, sums + s * kPixels * V * W);
  }

  // Where what is NaN or Inf in the outputs of a segment is noted.
  VF& poison_of(const NybbleSegment& segment) {
    at(segment);
    return seen_.poison;
  }

  const Codes& codes() const { return codes_; }

  void operator()(const NybbleSegment& segment, int64_t column, int vectors, const int32_t* sums) {
    at(segment);
    for (int v = 0; v < vectors && column + v * W < a_.n; v++)
      finish_(a_, how_, segment, column + v * W, sums + v * W, vectors * W, a_.range ? &seen_ : nullptr);
  }

 private:
  void at(const NybbleSegment& segment) {
    if (segment.sample != sample_) note();
    sample_ = segment.sample;
  }

  void note() {
    if (a_.range && sample_ >= 0) extend_by(seen_, a_.range[sample_]);
    seen_ = Seen{};
  }

  const NybbleDirectArgs& a_;
  const Recoding how_;
  const FinishPixels finish_;
  const Codes codes_;
  int64_t sample_ = -1;
  Seen seen_;
};

// All segments and 64 channels, each with a weight of its own.
inline void direct_channels(const NybbleDirectArgs& a, int64_t column, Finisher& finish) {
  alignas(64) int32_t sums[NYBBLE_TILE_PIXELS * kChannels];
  const Taps taps(a, column);
  const bool codes = finish.codes().serves && !a.residual && a.n % NYBBLE_TILE_N == 0;
  for (int64_t i = 0; i < a.segments; i++) {
    const NybbleSegment& segment = a.segment[i];
    if (codes) {
      const int64_t left = a.n - column, channels = left < kChannels ? left : kChannels;
      write_channels(a, finish.codes(), segment, taps, column, channels, finish.poison_of(segment));
      continue;
    }
    channel_sums(a, segment, taps, sums);
    finish(segment, column, kLanes, sums);
  }
}

// Fetches what the outputs of a segment are written to, and what is added to them.
inline void prefetch_outputs(const NybbleDirectArgs& a, const NybbleSegment& segment, int64_t column) {
  const int64_t bytes = dtype_bytes(a.y_dtype), added_bytes = dtype_bytes(a.residual_dtype);
  for (int64_t i = segment.skip; i < a.pixels; i++) {
    __builtin_prefetch(static_cast<const uint8_t*>(a.y) + (segment.y + i * a.n + column) * bytes, 1);
    if (a.residual)
      __builtin_prefetch(static_cast<const uint8_t*>(a.residual) + (segment.residual + i * a.n + column) * added_bytes);
  }
}

// S segments and V * W columns, whose outputs wait.
template <int S, int V, int kAdd, class Waits>
inline void waiting_tile(const NybbleDirectArgs& a, const NybbleSegment* segment, int64_t column, Finisher& finish,
                         Waits& waiting) {
  VI acc[S][kPixels][V];
  if (kAdd == kProduct) {
    const NybbleSegment* other = a.more->segment + (segment - a.segment);
    direct_sums<S, V, kAdd>(*a.more, other, column, acc, waiting, finish.codes());
#pragma GCC unroll 2
    for (int s = 0; s < S; s++)
      Waits::put_product(waiting, s, *a.more, finish.codes(), other[s], column, acc[s], finish.poison_of(segment[s]));
  }
  direct_sums<S, V, kAdd>(a, segment, column, acc, waiting, finish.codes());
  if constexpr (V == 4) {
    Waits::template finish<kAdd>(waiting, a, finish.codes(), *segment, column, acc[0], finish.poison_of(*segment));
  } else {
#pragma GCC unroll 2
    for (int s = 0; s < S; s++)
      Waits::template put<kAdd>(waiting, s, a, finish.codes(), segment[s], column, acc[s],
                                finish.poison_of(segment[s]));
  }
}

// S segments and columns [column, end): V * W at a time, then fewer.
template <int S, int V, int kAdd, class Waits>
inline void direct_columns(const NybbleDirectArgs& a, const NybbleSegment* segment, int64_t column, int64_t end,
                           Finisher& finish, Waits& waiting) {
  for (; column + V * W <= end; column += V * W) {
    for (int s = 0; s < S; s++) prefetch_outputs(a, segment[s], column);
    if constexpr (kAdd != kNever && V == Waits::kVectors)
      if (column + V * W <= a.n) {
        waiting_tile<S, V, kAdd>(a, segment, column, finish, waiting);
        continue;
      }
    VI acc[S][kPixels][V];
    direct_sums<S, V, kNever>(a, segment, column, acc, waiting, finish.codes());
    Finisher::tile<S, V>(finish, segment, column, acc);
  }
  if constexpr (V > 1) direct_columns<S, V / 2, kAdd>(a, segment, column, end, finish, waiting);
}

// Columns whose weights stay in the L1 cache while all segments are multiplied with them, at least 64: whole lines of
// y.
inline int64_t columns_at_a_time(const NybbleDirectArgs& a) {
  constexpr int64_t kWeightBytes = 1 << 14, kLeast = 64;
  const int64_t k = a.k_padded + (a.more ? a.more->k_padded : 0), columns = kWeightBytes / k / kLeast * kLeast;
  return columns > kLeast ? columns : kLeast;
}

// All segments and columns.
template <int kAdd, int S, int V>
inline void direct_all(const NybbleDirectArgs& a, Finisher& finish) {
  const int64_t end = a.tile_end * NYBBLE_TILE_N, step = columns_at_a_time(a);
  Waiting<S, V> waiting;
  for (int64_t column = a.tile_begin * NYBBLE_TILE_N; column < end; column += step) {
    const int64_t to = column + step < end ? column + step : end;
    int64_t i = 0;
    for (; i + S <= a.segments; i += S) direct_columns<S, V, kAdd>(a, a.segment + i, column, to, finish, waiting);
    if (i < a.segments) direct_columns<1, V, kAdd>(a, a.segment + i, column, to, finish, waiting);
  }
  if (kAdd == kNever) return;
  while (waiting.next < waiting.count) Waiting<S, V>::template write<kAdd>(waiting, finish.codes());
}

// Whether tiles are one segment by four vectors, which have fewer instructions beside the multiplies than two segments
// by two vectors: then outputs need not wait.
inline bool is_wide(const NybbleDirectArgs& a, const Codes& how) {
  return kDirectVectors == 2 && how.saturates && a.n % (4 * W) == 0;
}

template <int kAdd>
inline void direct_waiting(const NybbleDirectArgs& a, Finisher& finish) {
  if (is_wide(a, finish.codes())) return direct_all<kAdd, 1, 4>(a, finish);
  direct_all<kAdd, 2, kDirectVectors>(a, finish);
}

inline NybbleStatus direct_all_channels(const NybbleDirectArgs& a, Finisher& finish) {
  if (a.runs > NYBBLE_DIRECT_TAPS || a.runs % a.each_channel || a.pixels > NYBBLE_TILE_PIXELS)
    return NYBBLE_UNSUPPORTED;
  for (int64_t tile = a.tile_begin; tile < a.tile_end; tile += kLanes) direct_channels(a, tile * NYBBLE_TILE_N, finish);
  return NYBBLE_OK;
}

inline NybbleStatus direct(const NybbleDirectArgs* a) {
  Finisher finish(*a);
  if (!finish.able()) return NYBBLE_UNSUPPORTED;
  if (a->each_channel) return direct_all_channels(*a, finish);
  if (a->run % 4 || a->pixels != kPixels) return NYBBLE_UNSUPPORTED;
  if (!finish.codes().serves) {
    direct_all<kNever, 2, kDirectVectors>(*a, finish);
  } else if (a->more) {
    direct_waiting<kProduct>(*a, finish);
  } else if (a->residual) {
    direct_waiting<kCodes>(*a, finish);
  } else {
    direct_waiting<kNothing>(*a, finish);
  }
  return NYBBLE_OK;
}

}  // namespace
