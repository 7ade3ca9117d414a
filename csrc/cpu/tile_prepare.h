// Packs activations into panels, for every target. Dynamic quantization uses the row's range [low, high], extended to
// include 0, so that 0 is exact. With codes from lowest to highest, act_steps apart (-128 to 127, or -64 to 63):
//   scale = (high - low) / act_steps, zero = round(-low * (act_steps / (high - low))) + lowest
//   q = min(round(x * (act_steps / (high - low))) + zero, highest), rounding half to even
// Static quantization uses a given scale and zero point, and clamps at both ends:
//   q = round(min(max(x * (1 / scale), lowest - zero), highest - zero)) + zero
// A NaN or an Inf in a row is detected by summing x * 0. Include after a target's tile header.
#pragma once

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "../abi.h"

namespace {

// If act_steps / range or the range itself would overflow, the row is first scaled by a power of two.
constexpr float kTiny = 0x1p-100f, kTinyFactor = 0x1p100f;
constexpr float kHuge = 0x1p126f, kHugeFactor = 0x1p-4f;

// Loads W values from k on, with 0 from `count` on.
template <int kDtype>
inline VF load_x(const uint8_t* x, int64_t k, int64_t count) {
  constexpr int64_t bytes = kDtype == NYBBLE_F32 ? 4 : 2;
  if (k + W <= count) return vf_load_as(x + k * bytes, kDtype, W);
  return k < count ? vf_load_as(x + k * bytes, kDtype, count - k) : vf_set1(0.0f);
}

inline int32_t lowest_code(int32_t act_steps) { return -(act_steps + 1) / 2; }
inline int32_t highest_code(int32_t act_steps) { return act_steps / 2; }

// Quantization of a row: min(round(x * factor * inverse) + zero, highest) for k < count, 0 from there on.
struct RowPlan {
  float scale, factor, inverse;
  int32_t zero, steps;
  int64_t count;
  bool scaled;  // factor is not 1
};

// For a row with a NaN or an Inf: codes 0, and scale NaN, which makes its outputs NaN.
inline RowPlan bad_row(int32_t steps) {
  const int32_t nan_bits = 0x7fc00000;
  float quiet_nan;
  memcpy(&quiet_nan, &nan_bits, 4);
  return {quiet_nan, 1.0f, 0.0f, 0, steps, 0, false};
}

// The least and the largest of values and 0; whether one is NaN or Inf.
struct Range {
  float low, high;
  bool bad;
};

template <int kDtype>
inline Range range_of(const uint8_t* x, int64_t count) {
  // Several accumulators of each kind hide the latency. `poison` becomes NaN if the row has a NaN or an Inf.
  constexpr int n = 4;
  const VF none = vf_set1(0.0f);
  VF low[n] = {none, none, none, none}, high[n] = {none, none, none, none}, poison[n] = {none, none, none, none};
  int64_t k = 0;
  for (; k + n * W <= count; k += n * W) {
#pragma GCC unroll 4
    for (int i = 0; i < n; i++) {
      const VF v = load_x<kDtype>(x, k + i * W, k + i * W + W);
      low[i] = vf_min(low[i], v);
      high[i] = vf_max(high[i], v);
      poison[i] = vf_fma(v, none, poison[i]);
    }
  }
  for (; k < count; k += W) {
    const VF v = load_x<kDtype>(x, k, count);
    low[0] = vf_min(low[0], v);
    high[0] = vf_max(high[0], v);
    poison[0] = vf_fma(v, none, poison[0]);
  }
#pragma GCC unroll 4
  for (int i = 1; i < n; i++) {
    low[0] = vf_min(low[0], low[i]);
    high[0] = vf_max(high[0], high[i]);
    poison[0] = vf_add(poison[0], poison[i]);
  }
  return {vf_least(low[0]), vf_most(high[0]), vf_has_nan(poison[0])};
}

// The plan for `count` values of a range.
inline RowPlan plan_of(const Range& range, int64_t count, int32_t steps) {
  if (range.bad) return bad_row(steps);
  const float magnitude = range.high > -range.low ? range.high : -range.low;
  if (magnitude == 0.0f) return {0.0f, 1.0f, 0.0f, 0, steps, 0, false};
  const float factor = magnitude < kTiny ? kTinyFactor : magnitude > kHuge ? kHugeFactor : 1.0f;
  const float lowest = range.low * factor;
  const float levels = static_cast<float>(steps), width = range.high * factor - lowest, inverse = levels / width;
  int32_t zero[W];
  vi_store(zero, vi_round(vf_set1(-lowest * inverse)));
  return {width / levels / factor, factor, inverse, zero[0] + lowest_code(steps), steps, count, factor != 1.0f};
}

template <int kDtype>
inline RowPlan plan_row(const uint8_t* x, int64_t count, int32_t steps) {
  return plan_of(range_of<kDtype>(x, count), count, steps);
}

// Static quantization: the scale and zero point are given; the row is only searched for a NaN or an Inf.
template <int kDtype>
inline RowPlan given_row(const uint8_t* x, const NybblePrepareArgs& a) {
  constexpr int n = 4;
  const VF none = vf_set1(0.0f);
  VF poison[n] = {none, none, none, none};
  int64_t k = 0;
  for (; k + n * W <= a.k; k += n * W) {
#pragma GCC unroll 4
    for (int i = 0; i < n; i++) poison[i] = vf_fma(load_x<kDtype>(x, k + i * W, k + i * W + W), none, poison[i]);
  }
  for (; k < a.k; k += W) poison[0] = vf_fma(load_x<kDtype>(x, k, a.k), none, poison[0]);
#pragma GCC unroll 4
  for (int i = 1; i < n; i++) poison[0] = vf_add(poison[0], poison[i]);
  if (vf_has_nan(poison[0])) return bad_row(a.act_steps);
  return {a.given_scale, 1.0f, 1.0f / a.given_scale, a.given_zero, a.act_steps, a.k, false};
}

constexpr int64_t kStep = 64;  // number of k at a time
constexpr int64_t kRows = 4;   // rows at a time: they stay in the L1 cache for both passes
// Number of k that are gathered at a time, where a panel has an order: so many that the first ones are in the cache,
// and no longer on their way there element by element, before vectors of them are read.
constexpr int64_t kGathered = 512;

constexpr int64_t element_bytes(int format) {
  return format == NYBBLE_PANEL_F32                                                                       ? 4
         : format == NYBBLE_PANEL_S16 || format == NYBBLE_PANEL_BF16 || format == NYBBLE_PANEL_BF16_LINES ? 2
                                                                                                          : 1;
}
constexpr bool is_bf16(int format) { return format == NYBBLE_PANEL_BF16 || format == NYBBLE_PANEL_BF16_LINES; }
constexpr bool is_lines(int format) { return format >= NYBBLE_PANEL_U8_LINES; }
constexpr bool is_exchanged(int format) { return format == NYBBLE_PANEL_BF16 || format == NYBBLE_PANEL_S16; }

// The k at which the line of k begins, and at which lines of bytes up to k end.
constexpr int64_t line_begin(int64_t k) { return k / NYBBLE_LINE_K * NYBBLE_LINE_K; }
constexpr int64_t line_end(int64_t k) { return line_begin(k + NYBBLE_LINE_K - 1); }

// How store_codes writes the codes of a format.
constexpr int code_format(int format) {
  return format == NYBBLE_PANEL_U8_LINES                                      ? NYBBLE_PANEL_U8
         : format == NYBBLE_PANEL_S8_LINES || format == NYBBLE_PANEL_S8_PAIRS ? NYBBLE_PANEL_S8
                                                                              : format;
}

// Quantizes k in [begin, end) of one row; returns the lane-wise sum of the codes. kWhole: end - begin is kStep, and end
// is at most plan.count.
template <int kFormat, int kDtype, bool kGiven, bool kWhole>
inline VI convert(const uint8_t* x, const RowPlan& plan, int64_t begin, int64_t end, uint8_t* to) {
  const VF factor = vf_set1(plan.factor), inverse = vf_set1(plan.inverse);
  const int32_t lowest = lowest_code(plan.steps), highest = highest_code(plan.steps);
  const VI zero = vi_set1(plan.zero), most = vi_set1(highest);
  const VF lower = vf_set1(static_cast<float>(lowest - plan.zero));
  const VF upper = vf_set1(static_cast<float>(highest - plan.zero));
  const bool scaled = plan.scaled;
  const int64_t count = plan.count, ks = kWhole ? kStep : end - begin;
  VI sum = vi_set1(0);
#pragma GCC unroll 4
  for (int64_t i = 0; i < ks; i += W) {
    VF v = kWhole ? load_x<kDtype>(x, begin + i, begin + i + W) : load_x<kDtype>(x, begin + i, count);
    VI codes;
    if (kGiven) {  // clamp before rounding: values far outside have no int32
      codes = vi_add(vi_round(vf_min(vf_max(vf_mul(v, inverse), lower), upper)), zero);
    } else {
      if (scaled) v = vf_mul(v, factor);
      codes = vi_min(vi_add(vi_round(vf_mul(v, inverse)), zero), most);
    }
    if (!kWhole && begin + i + W > count) codes = vi_first(codes, begin + i < count ? count - begin - i : 0);
    sum = vi_add(sum, codes);
    store_codes<code_format(kFormat)>(to + i * element_bytes(kFormat), codes);
  }
  return sum;
}

// Copies float activations: any dtype to float32, or bfloat16 unchanged.
template <int kFormat, int kDtype>
inline void widen(const uint8_t* x, int64_t count, int64_t begin, int64_t end, uint8_t* to) {
  if (is_bf16(kFormat)) {
    const int64_t left = count - begin < end - begin ? count - begin : end - begin;
    memset(to, 0, static_cast<size_t>(end - begin) * 2);
    if (left > 0) memcpy(to, x + begin * 2, static_cast<size_t>(left) * 2);
    return;
  }
  for (int64_t k = begin; k < end; k += W, to += W * 4)
    vf_store(reinterpret_cast<float*>(to), load_x<kDtype>(x, k, count));
}

// Copies the elements of k in [begin, end) of a row, those below a.k, in the order of the panel.
template <typename T>
inline void gather_row(const NybblePrepareArgs& a, const uint8_t* row, int64_t begin, int64_t end, uint8_t* to) {
  const int32_t* order = a.order + begin;
  const int64_t count = (end < a.k ? end : a.k) - begin;
  const T* from = reinterpret_cast<const T*>(row);
  T* place = reinterpret_cast<T*>(to);
#pragma GCC unroll 4
  for (int64_t i = 0; i < count; i++) place[i] = from[order[i]];
}

// Swaps the inner two of four 16-bit elements.
inline uint64_t exchange(uint64_t four) {
  return (four & 0xffff00000000ffffu) | (four & 0xffff0000u) << 16 | (four >> 16 & 0xffff0000u);
}

// Copies `rows` rows of `words` words, `row_bytes` apart, to the panel, where a row's words are `stride` bytes apart
// and rows are adjacent. kWord: bytes of a word, which is four elements.
template <int kWord, bool kExchange>
inline void interleave(const uint8_t* from, int64_t row_bytes, int64_t rows, int64_t words, uint8_t* to,
                       int64_t stride) {
  int64_t word = 0;
#if defined(__SSE2__)
  const auto load = [&](int64_t r) __attribute__((always_inline)) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + r * row_bytes + word * kWord));
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
      __m128i v[4];
      for (int r = 0; r < 4; r++) {
        v[r] = load(r);
        if (kExchange) v[r] = _mm_shufflehi_epi16(_mm_shufflelo_epi16(v[r], 0xd8), 0xd8);  // 0 2 1 3
      }
      store(0, 0, _mm_unpacklo_epi64(v[0], v[1]));
      store(0, 2, _mm_unpacklo_epi64(v[2], v[3]));
      store(1, 0, _mm_unpackhi_epi64(v[0], v[1]));
      store(1, 2, _mm_unpackhi_epi64(v[2], v[3]));
    }
  }
  if (kWord == 8 && rows == 1 && stride == kWord) {
    for (; word + 2 <= words; word += 2, to += 2 * stride) {
      const __m128i v = load(0);
      store(0, 0, kExchange ? _mm_shufflehi_epi16(_mm_shufflelo_epi16(v, 0xd8), 0xd8) : v);
    }
  }
#endif
  for (; word < words; word++, to += stride)
    for (int64_t r = 0; r < rows; r++) {
      const uint8_t* at = from + r * row_bytes + word * kWord;
      uint8_t* place = to + r * kWord;
      if (kExchange) {
        uint64_t four;
        memcpy(&four, at, 8);
        four = exchange(four);
        memcpy(place, &four, 8);
      } else {
        memcpy(place, at, kWord);
      }
    }
}

// Copies `words` words of codes, from byte `offset` of each of `rows` rows on, to a block of a panel of pairs, where
// they are the rows from `first` on. A multiple of 16 k comes before in the block.
inline void interleave_pairs(const uint8_t* const* row, int64_t offset, int64_t rows, int64_t words, uint8_t* to,
                             int64_t first, int64_t block) {
  for (; words >= 4; words -= 4, offset += 16, to += 16 * block)
    for (int64_t r = 0; r < rows; r++) {
      uint64_t two[2];  // little-endian
      memcpy(two, row[r] + offset, 16);
      const uint64_t even = (two[0] & 0xffffffff) | two[1] << 32, odd = two[0] >> 32 | (two[1] >> 32) << 32;
      memcpy(to + 8 * (first + r), &even, 8);
      memcpy(to + 8 * (block + first + r), &odd, 8);
    }
  if (words >= 2) {
    for (int64_t r = 0; r < rows; r++) memcpy(to + 8 * (first + r), row[r] + offset, 8);
    offset += 8;
    to += 8 * block;
  }
  if (words % 2)
    for (int64_t r = 0; r < rows; r++) memcpy(to + 4 * (first + r), row[r] + offset, 4);
}

// Packs a row block with `rows` rows that starts at row0 into lines of bfloat16.
inline void prepare_bf16_lines(const NybblePrepareArgs& a, int64_t row0, int64_t rows) {
  constexpr int64_t kLineK = NYBBLE_LINE_K / 2;
  uint8_t* to = static_cast<uint8_t*>(a.panel) + row0 * nybble_panel_row(NYBBLE_PANEL_BF16_LINES, a.k_padded);
  for (int64_t k = 0; k < a.k_padded; k += kLineK)
    for (int64_t r = 0; r < rows; r++, to += NYBBLE_LINE_K) {
      const uint8_t* from = static_cast<const uint8_t*>(a.x) + ((row0 + r) * a.ldx + k) * 2;
      alignas(16) uint8_t ordered[NYBBLE_LINE_K], tail[NYBBLE_LINE_K];
      if (a.order) {
        gather_row<uint16_t>(a, from - k * 2, k, k + kLineK, ordered);
        from = ordered;
      }
      if (k + kLineK > a.k) {
        widen<NYBBLE_PANEL_BF16_LINES, NYBBLE_BF16>(from - k * 2, a.k, k, k + kLineK, tail);
        from = tail;
      }
      interleave<8, true>(from, 0, 1, NYBBLE_LINE_K / 8, to, 8);
    }
}

// Copies k in [begin, end) of r rows, kGathered elements apart, in the order of the panel.
template <int64_t kBytes>
inline void gather_rows(const NybblePrepareArgs& a, const uint8_t* x, int64_t r, int64_t begin, int64_t end,
                        uint8_t* to) {
  for (int64_t j = 0; j < r; j++, x += a.ldx * kBytes, to += kGathered * kBytes) {
    if (kBytes == 4)
      gather_row<uint32_t>(a, x, begin, end, to);
    else
      gather_row<uint16_t>(a, x, begin, end, to);
  }
}

// Packs r rows, from row i on, of a row block with `block` rows that starts at row0.
template <int kFormat, int kDtype, bool kGiven>
inline void prepare_rows(const NybblePrepareArgs& a, int64_t row0, int64_t i, int64_t r, int64_t block) {
  constexpr bool is_codes = kFormat != NYBBLE_PANEL_F32 && kFormat != NYBBLE_PANEL_BF16;
  constexpr bool kExchange = is_exchanged(kFormat), kLines = is_lines(kFormat);
  constexpr bool is_panel = kFormat == NYBBLE_PANEL_BF16 || (kFormat == NYBBLE_PANEL_F32 && kDtype == NYBBLE_F32);
  constexpr int64_t bytes = element_bytes(kFormat), x_bytes = kDtype == NYBBLE_F32 ? 4 : 2;
  const int64_t row_bytes = a.ldx * x_bytes;
  const uint8_t* x = static_cast<const uint8_t*>(a.x) + (row0 + i) * row_bytes;
  constexpr bool kPairs = kFormat == NYBBLE_PANEL_S8_PAIRS;  // whose rows do not begin at one place each
  uint8_t* panel = static_cast<uint8_t*>(a.panel) + row0 * a.k_padded * bytes + (kPairs ? 0 : i * 4 * bytes);
  alignas(64) uint8_t rows[kRows * kStep * bytes], ordered[kRows * kGathered * x_bytes];
  const uint8_t* from = x;  // element 0 of the first row
  int64_t from_bytes = row_bytes, gathered = 0;
  RowPlan plans[kRows];
  for (int64_t j = 0; j < r && is_codes; j++) {
    const uint8_t* row = x + j * row_bytes;
    plans[j] = kGiven ? given_row<kDtype>(row, a) : plan_row<kDtype>(row, a.k, a.act_steps);
    a.act_scale[row0 + i + j] = plans[j].scale;
    a.act_zero[row0 + i + j] = plans[j].zero;
  }
  for (int64_t g = 0; g < a.groups; g++) {
    const int64_t group_end = (g + 1) * a.group;
    VI sums[kRows] = {vi_set1(0), vi_set1(0), vi_set1(0), vi_set1(0)};
    for (int64_t begin = g * a.group; begin < group_end; begin += kStep) {
      int64_t end = begin + kStep < group_end ? begin + kStep : group_end;
      if (kLines && end == a.k_padded) end = line_end(end);
      uint8_t* to_panel = panel + begin * block * bytes;
      const int64_t words = (end - begin) / 4, stride = 4 * block * bytes;
      if (a.order && end > gathered) {
        gathered = begin + kGathered;
        gather_rows<x_bytes>(a, x, r, begin, gathered, ordered);
        from = ordered - begin * x_bytes;
        from_bytes = kGathered * x_bytes;
      }
      if (is_panel && end <= a.k) {  // no conversion needed
        interleave<4 * bytes, kExchange>(from + begin * bytes, from_bytes, r, words, to_panel, stride);
        continue;
      }
      for (int64_t j = 0; j < r; j++) {
        uint8_t* to = rows + j * kStep * bytes;
        if (kLines)
          to = static_cast<uint8_t*>(a.panel) + row0 * line_end(a.k_padded) + line_begin(begin) * block +
               (i + j) * NYBBLE_LINE_K + (begin - line_begin(begin));
        const uint8_t* row = from + j * from_bytes;
        if constexpr (is_codes)
          sums[j] = vi_add(sums[j], begin + kStep == end && end <= plans[j].count
                                        ? convert<kFormat, kDtype, kGiven, true>(row, plans[j], begin, end, to)
                                        : convert<kFormat, kDtype, kGiven, false>(row, plans[j], begin, end, to));
        else
          widen<kFormat, kDtype>(row, a.k, begin, end, to);
      }
      if constexpr (kPairs) {
        const uint8_t* const each[kRows] = {rows, rows + kStep, rows + 2 * kStep, rows + 3 * kStep};
        interleave_pairs(each, 0, r, words, to_panel, i, block);
      } else if constexpr (!kLines) {
        interleave<4 * bytes, kExchange>(rows, kStep * bytes, r, words, to_panel, stride);
      }
    }
    for (int64_t j = 0; j < r && a.act_sum; j++)
      a.act_sum[(row0 + i + j) * a.groups + g] = vi_sum(sums[j]) * a.sum_factor;
  }
}

template <int kFormat, int kDtype, bool kGiven>
inline NybbleStatus prepare_blocks(const NybblePrepareArgs* a) {
  for (int64_t block = a->block_begin; block < a->block_end; block++) {
    const int64_t row0 = block * a->block_rows, left = a->rows - row0;
    const int64_t rows = left < a->block_rows ? left : a->block_rows;
    if constexpr (kFormat == NYBBLE_PANEL_BF16_LINES)
      prepare_bf16_lines(*a, row0, rows);
    else
      for (int64_t i = 0; i < rows; i += kRows)
        prepare_rows<kFormat, kDtype, kGiven>(*a, row0, i, rows - i < kRows ? rows - i : kRows, rows);
  }
  return NYBBLE_OK;
}

template <int kFormat, bool kGiven>
inline NybbleStatus prepare_dtype(const NybblePrepareArgs* a) {
  switch (a->x_dtype) {
    case NYBBLE_F32:
      return prepare_blocks<kFormat, NYBBLE_F32, kGiven>(a);
    case NYBBLE_BF16:
      return prepare_blocks<kFormat, NYBBLE_BF16, kGiven>(a);
    case NYBBLE_F16:
      return prepare_blocks<kFormat, NYBBLE_F16, kGiven>(a);
    default:
      return NYBBLE_UNSUPPORTED;
  }
}

template <int kFormat>
inline NybbleStatus prepare_codes(const NybblePrepareArgs* a) {
  return a->given_scale > 0 ? prepare_dtype<kFormat, true>(a) : prepare_dtype<kFormat, false>(a);
}

inline NybbleStatus prepare(const NybblePrepareArgs* a) {
  switch (a->panel_format) {
    case NYBBLE_PANEL_F32:
      return prepare_dtype<NYBBLE_PANEL_F32, false>(a);
    case NYBBLE_PANEL_S8:
      return prepare_codes<NYBBLE_PANEL_S8>(a);
    case NYBBLE_PANEL_S16:
      return prepare_codes<NYBBLE_PANEL_S16>(a);
    case NYBBLE_PANEL_U8:
      return prepare_codes<NYBBLE_PANEL_U8>(a);
    case NYBBLE_PANEL_U7:
      return prepare_codes<NYBBLE_PANEL_U7>(a);
    case NYBBLE_PANEL_S8_PAIRS:
      if constexpr (kMakesPairs) return prepare_codes<NYBBLE_PANEL_S8_PAIRS>(a);
      return NYBBLE_UNSUPPORTED;
    case NYBBLE_PANEL_U8_LINES:
      return prepare_codes<NYBBLE_PANEL_U8_LINES>(a);
    case NYBBLE_PANEL_S8_LINES:
      return prepare_codes<NYBBLE_PANEL_S8_LINES>(a);
    case NYBBLE_PANEL_BF16:
      return a->x_dtype == NYBBLE_BF16 ? prepare_blocks<NYBBLE_PANEL_BF16, NYBBLE_BF16, false>(a) : NYBBLE_UNSUPPORTED;
    case NYBBLE_PANEL_BF16_LINES:
      return a->x_dtype == NYBBLE_BF16 ? prepare_blocks<NYBBLE_PANEL_BF16_LINES, NYBBLE_BF16, false>(a)
                                       : NYBBLE_UNSUPPORTED;
    default:
      return NYBBLE_UNSUPPORTED;
  }
}

}  // namespace
