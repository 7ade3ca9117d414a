// The register tiles for bfloat16 activations built on bfmmla, which multiplies two rows by two columns, of four k
// each. Four k of two rows lie together in a panel; codes become bfloat16, which holds them exactly, of two columns
// together, in registers or once for many rows: both ways give the same bits. Include after tile_neonbf16.h.
#pragma once

#include "tile_float_ends.h"

namespace {

constexpr int pairs_of(int rows) { return (rows + 1) / 2; }

// The sums of two rows and W columns, as 2 x 2 blocks: [pairs of rows][pairs of columns].
template <int R, int V>
using Blocks = VF[pairs_of(R)][2 * V];

// W weights of four k each as bfloat16: columns 0 and 1, columns 2 and 3. Each four k in the order of a panel, 0 2 1 3.
struct Columns {
  VI low, high;
};

// The bytes of each four k, in the order of a panel.
NYBBLE_INLINE uint8x16_t panel_order(VI line) {
  constexpr uint8_t kOrder[16] = {0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15};
  return vqtbl1q_u8(vreinterpretq_u8_s32(line), vld1q_u8(kOrder));
}

// Integers of up to 9 bits as bfloat16: the upper halves of their float32 values, whose lower are 0. They are the last
// bits of a float, from which the rest is taken: on Neoverse V2, conversions take four times as long.
NYBBLE_INLINE VI bf16_of(int16x8_t codes) {
  const VI rest = vi_set1(0x4b400000);  // 1.5 * 2^23
  const VF low = vf_sub(vf_of_bits(vaddw_s16(rest, vget_low_s16(codes))), vf_of_bits(rest));
  const VF high = vf_sub(vf_of_bits(vaddw_high_s16(rest, codes)), vf_of_bits(rest));
  return vreinterpretq_s32_s16(vuzp2q_s16(vreinterpretq_s16_f32(low), vreinterpretq_s16_f32(high)));
}

// Codes of packed lines, as the tiles take them:
//   kWords                            words of four k in a line
//   kLineBytes, kDecodedLine          bytes of a line; if it was decoded before, else 0
//   kOrigin                           whether they have zero points or a minimum
//   Codes{args}
//   origin(column, g)                 made once for W columns in a group
//   word<i>(line, origin)             the i-th word of a line

// Signed bytes of n16k4 lines.
struct Bf16Signed {
  static constexpr int kWords = 1;
  static constexpr int64_t kLineBytes = kLine, kDecodedLine = 0;
  static constexpr bool kOrigin = false;

  explicit Bf16Signed(const NybbleLinearArgs*) {}
  VI origin(int64_t, int64_t) const { return vi_set1(0); }
  template <int>
  NYBBLE_INLINE Columns word(const Bf16Signed&, const uint8_t* line, VI) {
    const int8x16_t codes = vreinterpretq_s8_u8(panel_order(vi_load(line)));
    return {bf16_of(vmovl_s8(vget_low_s8(codes))), bf16_of(vmovl_high_s8(codes))};
  }
};

// The numbers of W columns as bytes, each of them for four k.
NYBBLE_INLINE VI repeat_bytes(VI numbers) { return vi_mul(numbers, vi_set1(0x01010101)); }

// Bytes of n16k4g lines minus their zero points.
struct Bf16Bytes {
  static constexpr int kWords = 1;
  static constexpr int64_t kLineBytes = kLine, kDecodedLine = 0;
  static constexpr bool kOrigin = true;
  const NybbleLinearArgs* a;

  explicit Bf16Bytes(const NybbleLinearArgs* args) : a(args) {}
  VI origin(int64_t column, int64_t g) const {
    return repeat_bytes(a->zero_point ? vi_load_u8(a->zero_point + group_at(a, column, g)) : vi_set1(128));
  }
  template <int>
  NYBBLE_INLINE Columns word(const Bf16Bytes&, const uint8_t* line, VI origin) {
    const uint8x16_t codes = panel_order(vi_load(line)), zero = vreinterpretq_u8_s32(origin);
    return {bf16_of(vreinterpretq_s16_u16(vsubl_u8(vget_low_u8(codes), vget_low_u8(zero)))),
            bf16_of(vreinterpretq_s16_u16(vsubl_high_u8(codes, zero)))};
  }
};

// Numbers in bfloat16 by indices in [0, 32), as a table of their low bytes and one of their high bytes.
struct Bf16Table {
  uint8x16x2_t low, high;

  explicit Bf16Table(const uint16_t (&entries)[32]) {
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(entries);
    const uint8x16x2_t first = vld2q_u8(bytes), second = vld2q_u8(bytes + 32);
    low = {{first.val[0], second.val[0]}};
    high = {{first.val[1], second.val[1]}};
  }
  Columns at(uint8x16_t index) const {
    const uint8x16_t lows = vqtbl2q_u8(low, index), highs = vqtbl2q_u8(high, index);
    return {vreinterpretq_s32_u8(vzip1q_u8(lows, highs)), vreinterpretq_s32_u8(vzip2q_u8(lows, highs))};
  }
};

// The low (i = 0) or high nibbles of a line of n16k8.
template <int i>
NYBBLE_INLINE uint8x16_t nibbles_of(const uint8_t* line) {
  const uint8x16_t bytes = panel_order(vi_load(line));
  return i ? vshrq_n_u8(bytes, 4) : vandq_u8(bytes, vdupq_n_u8(15));
}

// Nibbles of n16k8 lines minus their zero points.
struct Bf16Nibbles {
  static constexpr int kWords = 2;
  static constexpr int64_t kLineBytes = kLine, kDecodedLine = 0;
  static constexpr bool kOrigin = true;
  const NybbleLinearArgs* a;
  Bf16Table table;

  explicit Bf16Nibbles(const NybbleLinearArgs* args) : a(args), table(steps()) {}
  // 16 - zero_point
  VI origin(int64_t column, int64_t g) const {
    VI zero = vi_set1(a->minimum ? 0 : kMiddle);
    if (a->zero_point) zero = vi_load_u8(a->zero_point + group_at(a, column, g));
    return repeat_bytes(vi_sub(vi_set1(16), zero));
  }
  template <int i>
  NYBBLE_INLINE Columns word(const Bf16Nibbles& codes, const uint8_t* line, VI origin) {
    return codes.table.at(vaddq_u8(nibbles_of<i>(line), vreinterpretq_u8_s32(origin)));
  }

 private:
  // Entry i is i - 16.
  static Bf16Table steps() {
    uint16_t entries[32];
    for (int i = 0; i < 32; i += W) {
      float values[W];
      for (int j = 0; j < W; j++) values[j] = static_cast<float>(i + j - 16);
      vf_store_as(entries + i, NYBBLE_BF16, vf_load(values), W);
    }
    return Bf16Table(entries);
  }
};

// Nibbles of n16k8 lines that pick a value of the book, rounded to bfloat16.
struct Bf16Book {
  static constexpr int kWords = 2;
  static constexpr int64_t kLineBytes = kLine, kDecodedLine = 0;
  static constexpr bool kOrigin = false;
  Bf16Table table;

  explicit Bf16Book(const NybbleLinearArgs* a) : table(values(a)) {}
  VI origin(int64_t, int64_t) const { return vi_set1(0); }
  template <int i>
  NYBBLE_INLINE Columns word(const Bf16Book& codes, const uint8_t* line, VI) {
    return codes.table.at(nibbles_of<i>(line));
  }

 private:
  static Bf16Table values(const NybbleLinearArgs* a) {
    uint16_t entries[32] = {};
    for (int i = 0; i < 16; i += W) vf_store_as(entries + i, NYBBLE_BF16, vf_load(a->book + i), W);
    return Bf16Table(entries);
  }
};

// The weights that Packed decoded before: of each word a line of the first two of every four columns, and one of the
// others.
template <class Packed>
struct DecodedWords {
  static constexpr int kWords = Packed::kWords;
  static constexpr int64_t kDecodedLine = kWords * 2 * kLine, kLineBytes = kDecodedLine;
  static constexpr bool kOrigin = Packed::kOrigin;

  explicit DecodedWords(const NybbleLinearArgs*) {}
  VI origin(int64_t, int64_t) const { return vi_set1(0); }
  template <int i>
  NYBBLE_INLINE Columns word(const DecodedWords&, const uint8_t* line, VI) {
    return {vi_load(line + i * 2 * kLine), vi_load(line + i * 2 * kLine + kLine)};
  }

  template <int i = 0>
  NYBBLE_INLINE void store_line(const Packed& codes, const uint8_t* from, VI origin, uint8_t* to) {
    if constexpr (i < kWords) {
      const Columns columns = Packed::template word<i>(codes, from, origin);
      vi_store(to + i * 2 * kLine, columns.low);
      vi_store(to + i * 2 * kLine + kLine, columns.high);
      store_line<i + 1>(codes, from, origin, to);
    }
  }

  static void decode(const NybbleLinearArgs* a, int64_t column, int64_t begin, int64_t end, uint8_t* to) {
    const Packed codes(a);
    const int64_t ks = end - begin, step = a->group < ks ? a->group : ks;
    for (int64_t c = 0; c < NYBBLE_TILE_N; c += W) {
      const uint8_t* from = codes_at(a, column + c) + begin / (4 * kWords) * kLine;
      uint8_t* line = to + c * 4;
      for (int64_t k = begin; k < end; k += step) {
        const VI origin = codes.origin(column + c, k / a->group);
        for (int64_t i = 0; i < step; i += 4 * kWords, from += kLine, line += kDecodedLine)
          store_line(codes, from, origin, line);
      }
    }
  }
};

// Pair p of R rows at x, four k each; the row after an odd last one is 0.
template <int R>
NYBBLE_INLINE VI rows_at(const uint8_t* x, int p) {
  return 2 * p + 1 < R ? vi_load(x + 16 * p) : vi_load_first<2>(x + 16 * p);
}

template <class Codes>
struct PairTile : TileDefaults {
  static constexpr int64_t kDecodedLine = Codes::kDecodedLine;
  template <int R, int V>
  using Acc = Blocks<R, V>;

  static constexpr int vectors(int rows) {
    constexpr int kTables = kDecodedLine > 0 ? 0 : 5;
    return fitting_vectors(2 * pairs_of(rows) + 2, pairs_of(rows) + kTables + 3);
  }

  // Adds the products of the words of a line from the i-th on.
  template <int R, int V, int i = 0>
  NYBBLE_INLINE void multiply(const Codes& codes, Blocks<R, V>& acc, const uint8_t* const (&w)[V],
                              const VI (&origin)[V], const uint8_t* x) {
    if constexpr (i < Codes::kWords) {
      constexpr int kPairs = pairs_of(R);
      VI rows[kPairs];
#pragma GCC unroll 8
      for (int p = 0; p < kPairs; p++) rows[p] = rows_at<R>(x + i * 8 * R, p);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) {
        const Columns columns = Codes::template word<i>(codes, w[v], origin[v]);
#pragma GCC unroll 8
        for (int p = 0; p < kPairs; p++) {
          mmla_bf16(acc[p][2 * v], rows[p], columns.low);
          mmla_bf16(acc[p][2 * v + 1], rows[p], columns.high);
        }
      }
      multiply<R, V, i + 1>(codes, acc, w, origin, x);
    }
  }

  // Adds the products of `ks` k.
  template <int R, int V, class Fetch>
  NYBBLE_INLINE void multiply_lines(const Codes& codes, int64_t ks, Blocks<R, V>& acc, const uint8_t* (&w)[V],
                                    const VI (&origin)[V], const uint8_t*& x, Fetch& prefetcher) {
    each_line<4>(ks / (4 * Codes::kWords), w, prefetcher, false, [&]() __attribute__((always_inline)) {
      multiply<R, V>(codes, acc, w, origin, x);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) w[v] += Codes::kLineBytes;
      x += 8 * Codes::kWords * R;
    });
  }

  // Row by row.
  template <int R, int V>
  NYBBLE_INLINE void rows_of(const Blocks<R, V>& acc, VF (&rows)[R][V]) {
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) {
        const float64x2_t left = vreinterpretq_f64_f32(acc[r / 2][2 * v]);
        const float64x2_t right = vreinterpretq_f64_f32(acc[r / 2][2 * v + 1]);
        rows[r][v] = vreinterpretq_f32_f64(r % 2 ? vzip2q_f64(left, right) : vzip1q_f64(left, right));
      }
  }
};

// Weights of 8 bits with a scale a column.
template <class Codes>
struct ColumnsTile : PairTile<Codes> {
  template <int R, int V>
  NYBBLE_INLINE void run(const NybbleLinearArgs* a, const Place& at, const uint8_t* (&w)[V], Blocks<R, V>& acc,
                         Prefetcher& prefetcher) {
    const Codes codes(a);
    const uint8_t* x = panel_at<uint8_t>(a, at.row * 2) + at.begin * R * 2;
    VI origin[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) origin[v] = vi_set1(0);
    ColumnsTile::template multiply_lines<R, V>(codes, at.end - at.begin, acc, w, origin, x, prefetcher);
  }

  template <int R, int V>
  NYBBLE_INLINE void finish(const NybbleLinearArgs* a, int64_t row, int64_t column, const Blocks<R, V>& acc) {
    VF rows[R][V];
    ColumnsTile::template rows_of<R, V>(acc, rows);
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) finish_w8a16<R>(a, row, column + v * W, rows, v);
  }
};

// Numbers of W columns as the blocks of sums have them.
struct OfBlocks {
  VF low, high;
  explicit OfBlocks(VF numbers) {
    const float64x2_t pairs = vreinterpretq_f64_f32(numbers);
    low = vreinterpretq_f32_f64(vdupq_laneq_f64(pairs, 0));
    high = vreinterpretq_f32_f64(vdupq_laneq_f64(pairs, 1));
  }
};

// Weights with scales by group. A group has accumulators of its own, which its scale then multiplies.
template <class Codes>
struct GroupTile : PairTile<Codes> {
  // What the minimum of a group, whose activations are at x, adds to the sums.
  template <int R, int V>
  NYBBLE_INLINE void add_minimums(const NybbleLinearArgs* a, int64_t column, int64_t g, const uint8_t* x,
                                  Blocks<R, V>& sum) {
    constexpr int kPairs = pairs_of(R);
    constexpr int32_t kTwoOnes = 0x3f803f80;  // as bfloat16
    VF of_rows[kPairs];
#pragma GCC unroll 8
    for (int p = 0; p < kPairs; p++) of_rows[p] = vf_set1(0.0f);
    for (int64_t k = 0; k < a->group; k += 4, x += 8 * R)
#pragma GCC unroll 8
      for (int p = 0; p < kPairs; p++) mmla_bf16(of_rows[p], rows_at<R>(x, p), vi_set1(kTwoOnes));
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      const OfBlocks minimum(group_minimum(a, column + v * W, g));
#pragma GCC unroll 8
      for (int p = 0; p < kPairs; p++) {
        sum[p][2 * v] = vf_fma(of_rows[p], minimum.low, sum[p][2 * v]);
        sum[p][2 * v + 1] = vf_fma(of_rows[p], minimum.high, sum[p][2 * v + 1]);
      }
    }
  }

  template <int R, int V>
  NYBBLE_INLINE void run(const NybbleLinearArgs* a, const Place& at, const uint8_t* (&w)[V], Blocks<R, V>& sum,
                         Prefetcher& prefetcher) {
    constexpr int kPairs = pairs_of(R);
    const Codes codes(a);
    const uint8_t* x = panel_at<uint8_t>(a, at.row * 2) + at.begin * R * 2;
    for (int64_t g = at.begin / a->group; g * a->group < at.end; g++) {
      if (Codes::kOrigin && a->minimum) add_minimums<R, V>(a, at.column, g, x, sum);
      Blocks<R, V> acc;
      VI origin[V];
      each_register(acc, [](auto& one) __attribute__((always_inline)) { zero_register(one); });
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) origin[v] = codes.origin(at.column + v * W, g);
      with_nibbles(a, w, prefetcher, [&](auto& from, auto& fetch) __attribute__((always_inline)) {
        GroupTile::template multiply_lines<R, V>(codes, a->group, acc, from, origin, x, fetch);
      });
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) {
        const OfBlocks scale(group_scale(a, at.column + v * W, g));
#pragma GCC unroll 8
        for (int p = 0; p < kPairs; p++) {
          sum[p][2 * v] = vf_fma(acc[p][2 * v], scale.low, sum[p][2 * v]);
          sum[p][2 * v + 1] = vf_fma(acc[p][2 * v + 1], scale.high, sum[p][2 * v + 1]);
        }
      }
    }
  }

  template <int R, int V>
  NYBBLE_INLINE void finish(const NybbleLinearArgs* a, int64_t row, int64_t column, const Blocks<R, V>& sum) {
    VF rows[R][V];
    GroupTile::template rows_of<R, V>(sum, rows);
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) finish_w4a16<R, V>(a, row, column + v * W, rows, v);
  }
};

// Tile<Codes>, or where weights were decoded once, with those.
template <template <class> class Tile, class Codes, int kRows>
inline NybbleStatus run_bf16(const NybbleLinearArgs* a) {
  struct Decoded : Tile<DecodedWords<Codes>> {
    static void decode(const NybbleLinearArgs* args, int64_t column, int64_t begin, int64_t end, uint8_t* to) {
      DecodedWords<Codes>::decode(args, column, begin, end, to);
    }
  };
  if constexpr (!kPlanes)  // kernels.def: planes are never decoded before
    if (a->decoded) return run_tiles<Decoded, kRows>(a);
  return run_tiles<Tile<Codes>, kRows>(a);
}

}  // namespace
