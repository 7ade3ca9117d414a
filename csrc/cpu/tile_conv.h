// Convolutions as products of patches: rounds images to pixels of codes, packs
// patches of pixels into panels for the kernels of linear layers, and finishes
// their outputs in either order of channels. Bound by reading and writing
// images: byte copies, little beside the products. Include after a target's
// tile header.
#pragma once

#include "../abi_conv.h"
#include "tile_math.h"
#include "tile_prepare.h"

namespace {

inline NybbleStatus extend_range(NybbleRangeArgs* a) {
  Range found;
  const uint8_t* x = static_cast<const uint8_t*>(a->x);
  if (a->dtype == NYBBLE_F32)
    found = range_of<NYBBLE_F32>(x, a->count);
  else if (a->dtype == NYBBLE_BF16)
    found = range_of<NYBBLE_BF16>(x, a->count);
  else if (a->dtype == NYBBLE_F16)
    found = range_of<NYBBLE_F16>(x, a->count);
  else
    return NYBBLE_UNSUPPORTED;
  a->low = found.low < a->low ? found.low : a->low;
  a->high = found.high > a->high ? found.high : a->high;
  a->bad |= found.bad;
  return NYBBLE_OK;
}

inline void plan_sample(const NybbleRangeArgs* range, int32_t steps, NybbleRounding* to) {
  const RowPlan plan = plan_of({range->low, range->high, range->bad != 0}, 1, steps);
  *to = {plan.scale, plan.factor, plan.inverse, plan.zero, plan.steps, plan.count == 0, 0};
}

// `count` adjacent values as elements of a format. Writes no byte beyond them.
template <int kFormat, int kDtype, bool kGiven>
inline void write_run(const uint8_t* x, int64_t count, const NybbleRounding& how, uint8_t* to) {
  constexpr bool is_codes = kFormat != NYBBLE_PANEL_F32 && kFormat != NYBBLE_PANEL_BF16;
  constexpr int64_t bytes = element_bytes(kFormat);
  alignas(64) uint8_t tail[kStep * bytes];
  const RowPlan plan{how.scale, how.factor, how.inverse, how.zero, how.steps, count, how.factor != 1.0f};
  for (int64_t begin = 0; begin < count; begin += kStep) {
    const int64_t left = count - begin;
    uint8_t* place = left < kStep ? tail : to + begin * bytes;
    if constexpr (is_codes) {
      if (left < kStep)
        convert<kFormat, kDtype, kGiven, false>(x, plan, begin, count, tail);
      else
        convert<kFormat, kDtype, kGiven, true>(x, plan, begin, begin + kStep, place);
    } else {
      widen<kFormat, kDtype>(x, count, begin, begin + (left < kStep ? left : kStep), place);
    }
    if (left < kStep) memcpy(to + begin * bytes, tail, static_cast<size_t>(left * bytes));
  }
}

constexpr int64_t kSquare = 16;  // pixels and channels that are exchanged at a time

// Bytes from[channel][pixel], kStep from one channel to the next, to
// to[pixel][channel].
inline void turn_bytes(const uint8_t* from, int64_t pixels, int64_t channels, uint8_t* to, int64_t pixel_bytes) {
#if defined(__SSE2__)
  __m128i rows[kSquare], next[kSquare];
#pragma GCC unroll 16
  for (int i = 0; i < kSquare; i++) rows[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * kStep));
#pragma GCC unroll 4
  for (int stage = 0; stage < 4; stage++) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      next[2 * i] = _mm_unpacklo_epi8(rows[i], rows[i + 8]);
      next[2 * i + 1] = _mm_unpackhi_epi8(rows[i], rows[i + 8]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kSquare; i++) rows[i] = next[i];
  }
  if (channels == kSquare) {
    for (int64_t p = 0; p < pixels; p++) _mm_storeu_si128(reinterpret_cast<__m128i*>(to + p * pixel_bytes), rows[p]);
    return;
  }
  // Pixels of fewer bytes in all: whole vectors, of which the next ones overwrite the end.
  int64_t p = 0;
  if (pixel_bytes == channels)
    for (; (pixels - p) * pixel_bytes >= kSquare; p++)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + p * pixel_bytes), rows[p]);
  for (; p < pixels; p++) memcpy(to + p * pixel_bytes, &rows[p], static_cast<size_t>(channels));
#else
  for (int64_t p = 0; p < pixels; p++)
    for (int64_t c = 0; c < channels; c++) to[p * pixel_bytes + c] = from[c * kStep + p];
#endif
}

// Elements of a format; those of 16-bit codes are given as bytes.
template <int kFormat>
inline void turn(const uint8_t* from, int64_t pixels, int64_t channels, uint8_t* to, int64_t pixel_bytes) {
  constexpr int64_t bytes = element_bytes(kFormat);
  if constexpr (bytes == 1) {
    turn_bytes(from, pixels, channels, to, pixel_bytes);
  } else if constexpr (kFormat == NYBBLE_PANEL_S16) {
    alignas(16) uint8_t turned[kSquare * kSquare];
    turn_bytes(from, pixels, channels, turned, kSquare);
    for (int64_t p = 0; p < pixels; p++)
      for (int64_t c = 0; c < channels; c++) {
        const int16_t code = static_cast<int8_t>(turned[p * kSquare + c]);
        memcpy(to + p * pixel_bytes + c * 2, &code, 2);
      }
  } else {
    for (int64_t p = 0; p < pixels; p++)
      for (int64_t c = 0; c < channels; c++)
        memcpy(to + p * pixel_bytes + c * bytes, from + (c * kStep + p) * bytes, bytes);
  }
}

template <int kFormat, int kDtype, bool kGiven>
inline NybbleStatus write_pixels(const NybblePixelsArgs& a) {
  constexpr int64_t bytes = element_bytes(kFormat), x_bytes = kDtype == NYBBLE_F32 ? 4 : 2;
  // What is turned: 16-bit codes as bytes.
  constexpr int kTurned = kFormat == NYBBLE_PANEL_S16 ? NYBBLE_PANEL_S8 : kFormat;
  constexpr int64_t turned_bytes = element_bytes(kTurned);
  const uint8_t* x = static_cast<const uint8_t*>(a.x);
  uint8_t* to = static_cast<uint8_t*>(a.to);
  if (a.channel == 1) {
    write_run<kFormat, kDtype, kGiven>(x, a.width * a.channels, a.how, to);
    return NYBBLE_OK;
  }
  alignas(64) uint8_t held[kSquare * kStep * turned_bytes];
  for (int64_t c = 0; c < a.channels; c += kSquare) {
    const int64_t channels = a.channels - c < kSquare ? a.channels - c : kSquare;
    for (int64_t p = 0; p < a.width; p += kStep) {
      const int64_t pixels = a.width - p < kStep ? a.width - p : kStep;
      for (int64_t i = 0; i < channels; i++)
        write_run<kTurned, kDtype, kGiven>(x + ((c + i) * a.channel + p) * x_bytes, pixels, a.how,
                                           held + i * kStep * turned_bytes);
      for (int64_t q = 0; q < pixels; q += kSquare)
        turn<kFormat>(held + q * turned_bytes, pixels - q < kSquare ? pixels - q : kSquare, channels,
                      to + ((p + q) * a.channels + c) * bytes, a.channels * bytes);
    }
  }
  return NYBBLE_OK;
}

template <int kFormat, bool kGiven>
inline NybbleStatus pixels_dtype(const NybblePixelsArgs& a) {
  switch (a.x_dtype) {
    case NYBBLE_F32:
      return write_pixels<kFormat, NYBBLE_F32, kGiven>(a);
    case NYBBLE_BF16:
      return write_pixels<kFormat, NYBBLE_BF16, kGiven>(a);
    case NYBBLE_F16:
      return write_pixels<kFormat, NYBBLE_F16, kGiven>(a);
    default:
      return NYBBLE_UNSUPPORTED;
  }
}

template <int kFormat>
inline NybbleStatus pixels_given(const NybblePixelsArgs& a) {
  return a.how.given ? pixels_dtype<kFormat, true>(a) : pixels_dtype<kFormat, false>(a);
}

inline NybbleStatus pixels(const NybblePixelsArgs* a) {
  switch (a->panel_format) {
    case NYBBLE_PANEL_F32:
      return pixels_dtype<NYBBLE_PANEL_F32, false>(*a);
    case NYBBLE_PANEL_BF16:
    case NYBBLE_PANEL_BF16_LINES:
      return a->x_dtype == NYBBLE_BF16 ? write_pixels<NYBBLE_PANEL_BF16, NYBBLE_BF16, false>(*a) : NYBBLE_UNSUPPORTED;
    case NYBBLE_PANEL_S8:
    case NYBBLE_PANEL_S8_PAIRS:
    case NYBBLE_PANEL_S8_LINES:
      return pixels_given<NYBBLE_PANEL_S8>(*a);
    case NYBBLE_PANEL_S16:
      return pixels_given<NYBBLE_PANEL_S16>(*a);
    case NYBBLE_PANEL_U8:
      return pixels_given<NYBBLE_PANEL_U8>(*a);
    case NYBBLE_PANEL_U7:
      return pixels_given<NYBBLE_PANEL_U7>(*a);
    default:
      return NYBBLE_UNSUPPORTED;
  }
}

// Copies `words` words, of four elements, of each of `rows` rows to the panel,
// where a row's words are `stride` bytes apart and rows are adjacent.
template <int kWord, bool kExchange>
inline void interleave_rows(const uint8_t* const* row, int64_t offset, int64_t rows, int64_t words, uint8_t* to,
                            int64_t stride) {
  int64_t word = 0;
#if defined(__SSE2__)
  const auto load = [&](int64_t r) __attribute__((always_inline)) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row[r] + offset + word * kWord));
    return kExchange ? _mm_shufflehi_epi16(_mm_shufflelo_epi16(v, 0xd8), 0xd8) : v;  // 0 2 1 3
  };
  const auto store = [&](int64_t i, int64_t r, __m128i v) __attribute__((always_inline)) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * stride + r * kWord), v);
  };
  if (kWord == 4 && rows == 4) {
    for (; word + 4 <= words; word += 4, to += 4 * stride) {
      const __m128i a = load(0), b = load(1), c = load(2), d = load(3);
      const __m128i ab = _mm_unpacklo_epi32(a, b), cd = _mm_unpacklo_epi32(c, d);
      const __m128i ab2 = _mm_unpackhi_epi32(a, b), cd2 = _mm_unpackhi_epi32(c, d);
      store(0, 0, _mm_unpacklo_epi64(ab, cd));
      store(1, 0, _mm_unpackhi_epi64(ab, cd));
      store(2, 0, _mm_unpacklo_epi64(ab2, cd2));
      store(3, 0, _mm_unpackhi_epi64(ab2, cd2));
    }
  }
  if (kWord == 8 && rows == 4) {
    for (; word + 2 <= words; word += 2, to += 2 * stride) {
      const __m128i a = load(0), b = load(1), c = load(2), d = load(3);
      store(0, 0, _mm_unpacklo_epi64(a, b));
      store(0, 2, _mm_unpacklo_epi64(c, d));
      store(1, 0, _mm_unpackhi_epi64(a, b));
      store(1, 2, _mm_unpackhi_epi64(c, d));
    }
  }
#endif
  for (; word < words; word++, to += stride)
    for (int64_t r = 0; r < rows; r++) {
      const uint8_t* at = row[r] + offset + word * kWord;
      if (kExchange) {
        uint64_t four;
        memcpy(&four, at, 8);
        four = exchange(four);
        memcpy(to + r * kWord, &four, 8);
      } else {
        memcpy(to + r * kWord, at, kWord);
      }
    }
}

// The sums of the codes of a row, of so many bytes each, along each group, times sum_factor.
template <int64_t kBytes>
inline void sum_groups(const NybbleFillArgs& a, const uint8_t* row, int32_t* sums) {
  for (int64_t g = 0; g < a.groups; g++) {
    int32_t sum = 0;
    for (int64_t k = g * a.group; k < (g + 1) * a.group; k++) {
      int16_t code = static_cast<int8_t>(row[k * kBytes]);
      if (kBytes == 2) memcpy(&code, row + k * 2, 2);
      sum += code;
    }
    sums[g] = sum * a.sum_factor;
  }
}

constexpr int64_t kShort = 64;  // bytes of a run that is copied without a call

// Copies a short run, and up to 15 bytes after it.
inline void copy_short(const uint8_t* from, int64_t bytes, uint8_t* to) {
  for (int64_t i = 0; i < bytes; i += 16) {
    uint64_t two[2];
    memcpy(two, from + i, 16);
    memcpy(to + i, two, 16);
  }
}

// Rows in one piece, `pitch` bytes apart: copies of their runs, with zeros from
// the end of the last one on. Bytes after a row are written before the next
// one.
template <int64_t kBytes>
inline void join_runs(const NybbleFillArgs& a, int64_t first, int64_t rows, int64_t pitch) {
  const int64_t bytes = a.run * kBytes;
  for (int64_t r = 0; r < rows; r++) {
    const uint8_t* row = a.row[first + r];
    uint8_t* to = a.scratch + r * pitch;
    for (int64_t i = 0; i < a.runs; i++, to += bytes) {
      if (bytes <= kShort)
        copy_short(row + a.offset[i], bytes, to);
      else
        memcpy(to, row + a.offset[i], static_cast<size_t>(bytes));
    }
    memset(to, 0, static_cast<size_t>(a.scratch + (r + 1) * pitch - to));
  }
}

// Copies `words` words of each of `rows` rows to a block of `block` rows, where they are those from `first` on.
template <int kFormat>
inline void put_rows(const uint8_t* const* row, int64_t offset, int64_t rows, int64_t words, uint8_t* to, int64_t first,
                     int64_t block) {
  constexpr int kWord = 4 * element_bytes(kFormat);
  if (kFormat == NYBBLE_PANEL_S8_PAIRS)
    interleave_pairs(row, offset, rows, words, to, first, block);
  else
    interleave_rows<kWord, is_exchanged(kFormat)>(row, offset, rows, words, to + first * kWord, block * kWord);
}

template <int kFormat>
inline void fill_block(const NybbleFillArgs& a) {
  constexpr int64_t bytes = element_bytes(kFormat), whole = kFormat == NYBBLE_PANEL_S8_PAIRS ? 16 : 4;
  const int64_t pitch = a.k_padded * bytes;
  const bool direct = a.run % whole == 0 && a.runs * a.run == a.k_padded && !a.act_sum;
  for (int64_t r = 0; r < a.rows; r += kRows) {
    const int64_t rows = a.rows - r < kRows ? a.rows - r : kRows;
    uint8_t* to = static_cast<uint8_t*>(a.panel);
    if (direct) {
      for (int64_t i = 0; i < a.runs; i++, to += a.run * bytes * a.rows)
        put_rows<kFormat>(a.row + r, a.offset[i], rows, a.run / 4, to, r, a.rows);
      continue;
    }
    join_runs<bytes>(a, r, rows, pitch);
    const uint8_t* held[kRows];
    for (int64_t j = 0; j < rows; j++) {
      held[j] = a.scratch + j * pitch;
      if (a.act_sum) sum_groups<bytes>(a, held[j], a.act_sum + (r + j) * a.groups);
    }
    put_rows<kFormat>(held, 0, rows, a.k_padded / 4, to, r, a.rows);
  }
}

// Lines of 64 bytes of a row.
template <int64_t kBytes>
inline void fill_lines(const NybbleFillArgs& a) {
  const int64_t pitch = nybble_panel_row(a.panel_format, a.k_padded);
  for (int64_t r = 0; r < a.rows; r++) {
    join_runs<kBytes>(a, r, 1, pitch);
    if (a.act_sum) sum_groups<kBytes>(a, a.scratch, a.act_sum + r * a.groups);
    const uint8_t* from = a.scratch;
    for (int64_t line = 0; line * NYBBLE_LINE_K < pitch; line++, from += NYBBLE_LINE_K) {
      uint8_t* to = static_cast<uint8_t*>(a.panel) + (line * a.rows + r) * NYBBLE_LINE_K;
      const uint8_t* const rows[] = {from};
      if (kBytes == 2)
        interleave_rows<8, true>(rows, 0, 1, NYBBLE_LINE_K / 8, to, 8);
      else
        memcpy(to, from, NYBBLE_LINE_K);
    }
  }
}

inline NybbleStatus fill(const NybbleFillArgs* a) {
  switch (a->panel_format) {
    case NYBBLE_PANEL_F32:
      fill_block<NYBBLE_PANEL_F32>(*a);
      return NYBBLE_OK;
    case NYBBLE_PANEL_BF16:
    case NYBBLE_PANEL_S16:
      fill_block<NYBBLE_PANEL_S16>(*a);
      return NYBBLE_OK;
    case NYBBLE_PANEL_S8:
    case NYBBLE_PANEL_U8:
    case NYBBLE_PANEL_U7:
      fill_block<NYBBLE_PANEL_S8>(*a);
      return NYBBLE_OK;
    case NYBBLE_PANEL_S8_PAIRS:
      if constexpr (kMakesPairs) fill_block<NYBBLE_PANEL_S8_PAIRS>(*a);
      return kMakesPairs ? NYBBLE_OK : NYBBLE_UNSUPPORTED;
    case NYBBLE_PANEL_S8_LINES:
      fill_lines<1>(*a);
      return NYBBLE_OK;
    case NYBBLE_PANEL_BF16_LINES:
      fill_lines<2>(*a);
      return NYBBLE_OK;
    default:
      return NYBBLE_UNSUPPORTED;
  }
}

// Values of y seen so far: the least, the largest, and NaN if one is NaN or
// Inf.
struct Seen {
  VF low = vf_set1(0.0f), high = vf_set1(0.0f), poison = vf_set1(0.0f);
};

// Stores v as elements of y, and notes them as they are stored.
template <int kDtype>
inline void store_seen(VF v, uint8_t* y, int64_t lanes, Seen& seen) {
  vf_store_as(y, kDtype, v, lanes);
  if (kDtype != NYBBLE_F32) v = vf_load_as(y, kDtype, lanes);
  if (lanes < W) v = vf_of_bits(vi_first(vi_of_bits(v), lanes));
  seen.low = vf_min(seen.low, v);
  seen.high = vf_max(seen.high, v);
  seen.poison = vf_fma(v, vf_set1(0.0f), seen.poison);
}

inline void extend_by(const Seen& seen, NybbleRangeArgs& range) {
  const float low = vf_least(seen.low), high = vf_most(seen.high);
  range.low = low < range.low ? low : range.low;
  range.high = high > range.high ? high : range.high;
  range.bad |= vf_has_nan(seen.poison);
}

// act(v + residual), at most `most`, stored.
template <int kDtype, int kAct, bool kRange>
inline void finish_vector(const NybbleFinishArgs& a, VF v, int64_t at, int64_t lanes, Seen& seen) {
  constexpr int64_t bytes = kDtype == NYBBLE_F32 ? 4 : 2;
  uint8_t* y = static_cast<uint8_t*>(a.y) + at * bytes;
  if (a.residual) v = vf_add(v, vf_load_as(static_cast<const uint8_t*>(a.residual) + at * bytes, kDtype, lanes));
  v = vf_min(vf_set1(a.most), vf_act<kAct>(v));
  if (kRange)
    store_seen<kDtype>(v, y, lanes, seen);
  else
    vf_store_as(y, kDtype, v, lanes);
}

// Calls put(v, row, column, lanes) for vectors along the columns of y if they
// are adjacent, else along its rows.
template <class Put>
inline void each_output(const NybbleFinishArgs& a, const Put& put) {
  if (a.column_step == 1) {
    for (int64_t r = 0; r < a.rows; r++)
      for (int64_t c = 0; c < a.columns; c += W) {
        const int64_t lanes = a.columns - c < W ? a.columns - c : W;
        put(vf_load_as(a.x + r * a.x_stride + c, NYBBLE_F32, lanes), r * a.row_step + c, lanes);
      }
    return;
  }
  for (int64_t c = 0; c < a.columns; c += W)
    for (int64_t r = 0; r < a.rows; r += W) {
      const int64_t columns = a.columns - c < W ? a.columns - c : W, lanes = a.rows - r < W ? a.rows - r : W;
      VF square[W];
      for (int64_t i = 0; i < W; i++)
        square[i] = i < lanes ? vf_load_as(a.x + (r + i) * a.x_stride + c, NYBBLE_F32, columns) : vf_set1(0.0f);
      vf_transpose(square);
      for (int64_t i = 0; i < columns; i++) put(square[i], (c + i) * a.column_step + r, lanes);
    }
}

template <int kDtype, int kAct, bool kRange>
inline void finish_all(const NybbleFinishArgs& a, Seen& seen) {
  each_output(a, [&](VF v, int64_t at, int64_t lanes)
                     __attribute__((always_inline)) { finish_vector<kDtype, kAct, kRange>(a, v, at, lanes, seen); });
}

template <int kDtype, int kAct>
inline NybbleStatus finish_act(const NybbleFinishArgs& a) {
  Seen seen;
  if (!a.range) {
    finish_all<kDtype, kAct, false>(a, seen);
    return NYBBLE_OK;
  }
  finish_all<kDtype, kAct, true>(a, seen);
  extend_by(seen, *a.range);
  return NYBBLE_OK;
}

template <int kDtype>
inline NybbleStatus finish_dtype(const NybbleFinishArgs& a) {
  switch (a.act) {
    case NYBBLE_ACT_IDENTITY:
      return finish_act<kDtype, NYBBLE_ACT_IDENTITY>(a);
    case NYBBLE_ACT_RELU:
      return finish_act<kDtype, NYBBLE_ACT_RELU>(a);
    case NYBBLE_ACT_SILU:
      return finish_act<kDtype, NYBBLE_ACT_SILU>(a);
    default:
      return NYBBLE_UNSUPPORTED;
  }
}

inline NybbleStatus finish(const NybbleFinishArgs* a) {
  switch (a->dtype) {
    case NYBBLE_F32:
      return finish_dtype<NYBBLE_F32>(*a);
    case NYBBLE_BF16:
      return finish_dtype<NYBBLE_BF16>(*a);
    case NYBBLE_F16:
      return finish_dtype<NYBBLE_F16>(*a);
    case NYBBLE_S32:  // moved as they are
      each_output(*a, [&](VF v, int64_t at, int64_t lanes) __attribute__((always_inline)) {
        vf_store_as(static_cast<float*>(a->y) + at, NYBBLE_F32, v, lanes);
      });
      return NYBBLE_OK;
    default:
      return NYBBLE_UNSUPPORTED;
  }
}

}  // namespace
