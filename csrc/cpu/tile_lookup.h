// Rows of codes by their numbers, as floats: y = (code - zero_point) * scale in fp32, rounded once; or sums, means and
// maxima of such rows. A row of the layout plain is contiguous. In tiles it is a word of four bytes in each
// line of a tile, or two in each other line, which is collected first, kBlock columns at a time. Bound by reading rows
// that no cache holds, 16 times as many lines from a tile as from a plain row; else by writing y. Include after a
// target's tile header.
#pragma once

#include <string.h>

#include "tile_rows.h"
#include "tile_scale.h"

namespace {

// Columns of a row at a time: a multiple of all group sizes and of a word.
constexpr int64_t kBlock = 256;

// Where the codes of a row begin, and bytes from a word of four bytes to the next, unless lines lie side by side.
struct RowPlace {
  const uint8_t* codes;
  int64_t step;
  int64_t scale, scale_step;  // element of `scale` and `zero_point`
};

inline RowPlace place_of(const NybbleLookupArgs& a, int64_t row) {
  if (!a.tile_bytes) {
    const int64_t bytes = a.code_bits == 8 ? a.columns : (a.columns + 1) / 2;
    return {a.codes + row * bytes, 4, row * a.groups, 1};
  }
  const int64_t tile = row / NYBBLE_TILE_N, column = row % NYBBLE_TILE_N;
  return {a.codes + tile * a.tile_bytes + column * (a.paired ? 8 : 4), 4 * NYBBLE_TILE_N,
          tile * a.groups * NYBBLE_TILE_N + column, NYBBLE_TILE_N};
}

// Eight bytes of four bytes of nibbles: of the layouts n16k8 and n16k16n, byte j holds the columns j and j + 4.
inline uint64_t nibbles_apart(uint32_t word, bool tiled) {
  if (tiled) return (word & 0x0f0f0f0fu) | static_cast<uint64_t>(word >> 4 & 0x0f0f0f0fu) << 32;
  uint64_t wide = (word | static_cast<uint64_t>(word) << 16) & 0x0000ffff0000ffffu;
  wide = (wide | wide << 8) & 0x00ff00ff00ff00ffu;
  return (wide | wide << 4) & 0x0f0f0f0f0f0f0f0fu;
}

// The codes of `count` columns from c on, a multiple of kBlock, a byte each: in place, or collected in `to`.
template <int kBits>
inline const uint8_t* codes_of(const NybbleLookupArgs& a, const RowPlace& at, int64_t c, int64_t count, uint8_t* to) {
  constexpr int64_t kWord = kBits == 8 ? 4 : 8;
  const bool tiled = a.tile_bytes != 0;
  const int64_t first = c / kWord;
  const uint8_t* from = at.codes + first * at.step;
  if (kBits == 8 && !tiled) return from;
  const int64_t bytes = tiled ? (count + kWord - 1) / kWord * 4 : (count + 1) / 2, whole = bytes / 4;
  const auto collect = [&](const auto& place) {
    for (int64_t w = 0; w < whole; w++) {
      uint32_t word;
      memcpy(&word, place(w), 4);
      if (kBits == 8) {
        word ^= 0x01010101u * a.flipped;
        memcpy(to + w * 4, &word, 4);
      } else {
        const uint64_t wide = nibbles_apart(word, tiled);
        memcpy(to + w * 8, &wide, 8);
      }
    }
  };
  if (a.paired)
    collect([&](int64_t w) { return at.codes + nybble_paired_place(first + w, kBits / 4); });
  else
    collect([&](int64_t w) { return from + w * at.step; });
  if (bytes % 4) {  // of a plain row of nibbles
    uint32_t word = 0;
    memcpy(&word, from + whole * at.step, static_cast<size_t>(bytes % 4));
    const uint64_t wide = nibbles_apart(word, false);
    memcpy(to + whole * 8, &wide, 8);
  }
  return to;
}

// The zero point of a group.
template <int kBits>
inline float zero_of(const NybbleLookupArgs& a, int64_t place) {
  if (!a.zero_point) return kBits == 4 && !a.minimum ? 8.0f : 0.0f;
  const uint8_t zero = a.zero_point[place];
  return kBits == 8 ? static_cast<int8_t>(zero ^ a.flipped) : zero;
}

// Calls use(column, lanes, values) for `count` columns of a row from c on.
template <int kBits, class Use>
inline void each_value(const NybbleLookupArgs& a, const RowPlace& at, int64_t c, int64_t count, const Use& use) {
  uint8_t held[kBlock + 8];
  const uint8_t* codes = codes_of<kBits>(a, at, c, count, held);
  const int64_t group = a.group < kBlock ? a.group : kBlock;
  for (int64_t g = 0; g < count; g += group) {
    const int64_t place = at.scale + (c + g) / a.group * at.scale_step, end = g + group < count ? g + group : count;
    const VF scale = one_scale(a.scale, a.scale_dtype, place);
    const VF zero = vf_set1(zero_of<kBits>(a, place));
    const VF minimum = a.minimum ? one_scale(a.minimum, a.scale_dtype, place) : vf_set1(0.0f);
    for (int64_t i = g; i < end; i += W) {
      const int64_t lanes = end - i < W ? end - i : W;
      VF v = vf_load_s8(codes + i, lanes);
      if (kBits == 4 || a.zero_point) v = vf_sub(v, zero);
      v = vf_mul(v, scale);
      if (a.minimum) v = vf_add(v, minimum);
      use(i, lanes, v);
    }
  }
}

// The id at a place, or -1 with `wrong` set if it is no row of the weight.
inline int64_t id_at(const NybbleLookupArgs& a, int64_t place) {
  const int64_t id =
      a.id_bytes == 8 ? static_cast<const int64_t*>(a.ids)[place] : static_cast<const int32_t*>(a.ids)[place];
  if (id >= 0 && id < a.rows) return id;
  *a.wrong = place;
  return -1;
}

template <int kDtype, int kBits>
inline NybbleStatus look_up(const NybbleLookupArgs& a) {
  for (int64_t r = a.begin; r < a.end; r++) {
    const int64_t id = id_at(a, r);
    if (id < 0) return NYBBLE_UNSUPPORTED;
    const RowPlace at = place_of(a, id);
    uint8_t* y = row_at<kDtype>(a.y, r);
    for (int64_t c = 0; c < a.columns; c += kBlock) {
      const int64_t count = a.columns - c < kBlock ? a.columns - c : kBlock;
      each_value<kBits>(a, at, c, count, [&](int64_t i, int64_t lanes, VF v) __attribute__((always_inline)) {
        store_at<kDtype>(y, c + i, v, lanes);
      });
    }
  }
  return NYBBLE_OK;
}

// Adds the columns from c on of a bag's rows to `sums`, or takes their maxima; gives the number of rows, -1 for a wrong
// id.
template <int kBits, int kBag>
inline int64_t collect(const NybbleLookupArgs& a, int64_t bag, int64_t c, int64_t count, float* sums) {
  int64_t rows = 0;
  for (int64_t i = a.start[bag]; i < a.start[bag + 1]; i++) {
    const int64_t id = id_at(a, i);
    if (id < 0) return -1;
    if (id == a.left_out) continue;
    const VF weight = vf_set1(a.weights ? a.weights[i] : 1.0f);
    const bool first = rows++ == 0;
    each_value<kBits>(a, place_of(a, id), c, count, [&](int64_t j, int64_t, VF v) __attribute__((always_inline)) {
      if (a.weights) v = vf_mul(v, weight);
      if (!first) v = kBag == NYBBLE_BAG_MAX ? vf_max(vf_load(sums + j), v) : vf_add(vf_load(sums + j), v);
      vf_store(sums + j, v);
    });
  }
  return rows;
}

template <int kDtype, int kBits, int kBag>
inline NybbleStatus reduce(const NybbleLookupArgs& a) {
  float sums[kBlock + W];
  for (int64_t r = a.begin; r < a.end; r++) {
    uint8_t* y = row_at<kDtype>(a.y, r);
    for (int64_t c = 0; c < a.columns; c += kBlock) {
      const int64_t count = a.columns - c < kBlock ? a.columns - c : kBlock;
      const int64_t rows = collect<kBits, kBag>(a, r, c, count, sums);
      if (rows < 0) return NYBBLE_UNSUPPORTED;
      const VF divisor = vf_set1(static_cast<float>(rows));
      for (int64_t i = 0; i < count; i += W) {
        VF v = rows ? vf_load(sums + i) : vf_set1(0.0f);
        if (kBag == NYBBLE_BAG_MEAN && rows) v = vf_div(v, divisor);
        store_at<kDtype>(y, c + i, v, count - i < W ? count - i : W);
      }
    }
  }
  return NYBBLE_OK;
}

template <int kDtype, int kBits>
inline NybbleStatus lookup_bag(const NybbleLookupArgs& a) {
  switch (a.bag) {
    case NYBBLE_BAG_NONE:
      return look_up<kDtype, kBits>(a);
    case NYBBLE_BAG_SUM:
      return reduce<kDtype, kBits, NYBBLE_BAG_SUM>(a);
    case NYBBLE_BAG_MEAN:
      return reduce<kDtype, kBits, NYBBLE_BAG_MEAN>(a);
    case NYBBLE_BAG_MAX:
      return reduce<kDtype, kBits, NYBBLE_BAG_MAX>(a);
    default:
      return NYBBLE_UNSUPPORTED;
  }
}

template <int kDtype>
inline NybbleStatus lookup_bits(const NybbleLookupArgs& a) {
  if (a.code_bits == 8) return lookup_bag<kDtype, 8>(a);
  return a.code_bits == 4 ? lookup_bag<kDtype, 4>(a) : NYBBLE_UNSUPPORTED;
}

inline NybbleStatus lookup(const NybbleLookupArgs* a) {
  switch (a->dtype) {
    case NYBBLE_F32:
      return lookup_bits<NYBBLE_F32>(*a);
    case NYBBLE_BF16:
      return lookup_bits<NYBBLE_BF16>(*a);
    case NYBBLE_F16:
      return lookup_bits<NYBBLE_F16>(*a);
    default:
      return NYBBLE_UNSUPPORTED;
  }
}

}  // namespace
