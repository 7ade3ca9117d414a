// The loops of tile_run.h around register tiles of AMX, which take the rows of a block at run time. A Family has
//   using Op                                      CodesOp or Bf16Op
//   static int64_t step(a)                        k of a step
//   static constexpr bool kDecodes                whether weights are decoded, once per K block of a pass, by
//     decode(a, column, begin, end, to)           the steps of 16 columns, each filled up with zeros
//   run<T, V>(a, k, at)                           a register tile of T x V tiles over a K block
//   static constexpr bool kStrips                 whether small groups are run in strips, see tile_amx_strips.h
#pragma once

#include "tile_amx.h"
#include "tile_amx_strips.h"

namespace {

// A register tile: rows from row, columns from column; the byte of a->partial from which its sums are kept.
struct TilePlace {
  int64_t row, rows, column, slot;
};

constexpr int64_t kSlotBytes = kMostRows * 2 * W * 4;
static_assert(kSlotBytes <= NYBBLE_PARTIAL_BYTES * kMostRows * W, "enough for a last column tile alone");

template <class Op>
inline TileSums<Op>& slot_at(const NybbleLinearArgs* a, const TilePlace& at) {
  static_assert(sizeof(TileSums<Op>) == kSlotBytes);
  return *reinterpret_cast<TileSums<Op>*>(static_cast<uint8_t*>(a->partial) + at.slot);
}

inline int64_t whole_steps(int64_t k, int64_t step) { return (k + step - 1) / step * step; }

// The activations of a row block from k on.
template <class Op>
inline const uint8_t* lines_at(const NybbleLinearArgs* a, const TilePlace& at, int64_t k) {
  const int64_t byte = k * Op::kBytes, row_bytes = whole_steps(a->k_padded * Op::kBytes, NYBBLE_LINE_K);
  return static_cast<const uint8_t*>(a->panel) + at.row * row_bytes + byte / NYBBLE_LINE_K * at.rows * NYBBLE_LINE_K +
         byte % NYBBLE_LINE_K;
}

// Calls finish(Rows<R>, r) for each R rows from r on.
template <int R>
struct Rows {
  static constexpr int kCount = R;
};
template <class Finish>
NYBBLE_INLINE void each_rows(int64_t rows, const Finish& finish) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) finish(Rows<4>(), r);
  for (; r < rows; r++) finish(Rows<1>(), r);
}

// The vectors of R rows and one column vector, from row r on.
template <class Op, int R>
NYBBLE_INLINE void load_rows(const TileSums<Op>& sums, int64_t r, int v, typename Op::Vector (&to)[R][1]) {
#pragma GCC unroll 4
  for (int i = 0; i < R; i++) to[i][0] = Op::load(sums.at[r + i] + v * W);
}

// The register tiles of a row block and a K block, two column tiles at a time.
template <class Family, int T>
inline void run_tile_columns(const NybbleLinearArgs* a, const KBlock& k, TilePlace at) {
  for (; at.column + 2 * W <= k.to; at.column += 2 * W, at.slot += kSlotBytes) Family::template run<T, 2>(a, k, at);
  if (at.column < k.to) Family::template run<T, 1>(a, k, at);
}

// The rows of a row block, whose tiles are configured for steps of `bytes` bytes.
inline TilePlace enter_rows(const NybbleLinearArgs* a, TileScope& tiles, int64_t block, int64_t bytes) {
  const int64_t row = block * a->block_rows, left = a->rows - row, rows = left < a->block_rows ? left : a->block_rows;
  tiles.set(rows, bytes);
  return {row, rows, 0, 0};
}

template <class Family>
inline void run_row_block(const NybbleLinearArgs* a, const KBlock& k, TilePlace at, int64_t slot) {
  at.column = k.from;
  at.slot = slot;
  if (at.rows > kTileRows)
    run_tile_columns<Family, 2>(a, k, at);
  else
    run_tile_columns<Family, 1>(a, k, at);
}

// Bytes of the sums of a row block and so many columns.
inline int64_t slots_of(int64_t columns) { return (columns + 2 * W - 1) / (2 * W) * kSlotBytes; }

// Bytes of the decoded weights of 16 columns and so many k.
template <class Family>
inline int64_t decoded_tile(const NybbleLinearArgs* a, int64_t ks) {
  return whole_steps(ks, Family::step(a)) * NYBBLE_TILE_N * Family::Op::kBytes;
}

template <class Family>
inline Streams decode_steps(const NybbleLinearArgs* a, const KBlock& k) {
  uint8_t* to = static_cast<uint8_t*>(a->decoded);
  const int64_t bytes = decoded_tile<Family>(a, k.end - k.begin);
  for (int64_t column = k.from; column < k.to; column += NYBBLE_TILE_N)
    Family::decode(a, column, k.begin, k.end, to + (column - k.from) / NYBBLE_TILE_N * bytes);
  return Streams(to, bytes);
}

// A strip of a row block, of at most R rows.
template <class Family, int R>
inline void run_strip(const NybbleLinearArgs* a, const KBlock& k, const StripPlace& at, int64_t slot) {
  Strip<Family, R> strip(a, k, at);
  const int64_t v = (at.column - k.from) / W, r = at.row - at.block;
  TileSums<Bf16Op> here,
      &total = k.end - k.begin < a->k_padded ? slot_at<Bf16Op>(a, {0, 0, 0, slot + v / 2 * kSlotBytes}) : here;
  strip.run(k.begin / a->group, k.begin == 0, total.at[r] + v % 2 * W, 2 * W);
  if (k.end < a->k_padded) return;
  each_rows(at.rows, [&](auto count, int64_t i) __attribute__((always_inline)) {
    VF sums[decltype(count)::kCount][1];
    load_rows<Bf16Op>(total, r + i, v % 2, sums);
    Family::template finish<decltype(count)::kCount>(a, at.row + i, at.column, sums);
  });
}

// A row block in strips.
template <class Family>
inline void run_strips(const NybbleLinearArgs* a, TileScope& tiles, const KBlock& k, int64_t block, int64_t slot) {
  const int64_t row = block * a->block_rows, left = a->rows - row, rows = left < a->block_rows ? left : a->block_rows;
  for (int64_t r = 0; r < rows; r += kTileRows) {
    StripPlace at{row, rows, row + r, rows - r < kTileRows ? rows - r : kTileRows, k.from};
    tiles.set<true>(at.rows, Family::step(a) * Family::Op::kBytes);
    for (; at.column < k.to; at.column += W) {
      if (at.rows > 12)
        run_strip<Family, 16>(a, k, at, slot);
      else if (at.rows > 8)
        run_strip<Family, 12>(a, k, at, slot);
      else if (at.rows > 4)
        run_strip<Family, 8>(a, k, at, slot);
      else
        run_strip<Family, 4>(a, k, at, slot);
    }
  }
}

template <class Family, int kRows>
inline NybbleStatus run_amx(const NybbleLinearArgs* a) {
  static_assert(kRows == kMostRows);
  if (a->block_rows > kMostRows || !holds_sums(a, slots_of(most_columns(a)))) return NYBBLE_UNSUPPORTED;
  if (Family::kDecodes && !holds_decoded(a, decoded_tile<Family>(a, most_k(a)))) return NYBBLE_UNSUPPORTED;
  TileScope tiles;
  each_k_block(a, [&](KBlock k) {
    const bool strips = Family::kStrips && a->group <= kStripGroup;
    if constexpr (Family::kDecodes)
      if (!strips) k.weights = decode_steps<Family>(a, k);
    for (int64_t block = a->block_begin; block < a->block_end; block++) {
      const int64_t slot = (block - a->block_begin) * slots_of(k.to - k.from);
      if constexpr (Family::kStrips)
        if (strips) {
          run_strips<Family>(a, tiles, k, block, slot);
          continue;
        }
      run_row_block<Family>(a, k, enter_rows(a, tiles, block, Family::step(a) * Family::Op::kBytes), slot);
    }
  });
  return NYBBLE_OK;
}

// Writes the rows of a register tile, whose sums are in the tiles.
template <class Family, class Op, int T, int V>
inline void finish_tiles(const NybbleLinearArgs* a, const TilePlace& at) {
  TileSums<Op> sums;
  store_tiles<Op, T, V>(sums);
#pragma GCC unroll 2
  for (int v = 0; v < V; v++)
    each_rows(at.rows, [&](auto some, int64_t r) __attribute__((always_inline)) {
      constexpr int R = decltype(some)::kCount;
      typename Op::Vector acc[R][1];
      load_rows<Op, R>(sums, r, v, acc);
      Family::template finish<R>(a, at.row + r, at.column + v * W, acc);
    });
}

// All of K in one group: the sums stay in the tiles of a K block.
template <class Family>
struct WholeRows {
  static constexpr bool kStrips = false;

  template <int T, int V>
  static void run(const NybbleLinearArgs* a, const KBlock& k, const TilePlace& at) {
    using Op = typename Family::Op;
    const int64_t ks = k.end - k.begin, step = Family::step(a);
    TileOperands o{lines_at<Op>(a, at, k.begin),
                   {k.weights.at(at.column - k.from), V > 1 ? k.weights.at(at.column - k.from + W) : nullptr},
                   at.rows * NYBBLE_LINE_K,
                   step * NYBBLE_TILE_N * Op::kBytes};
    if (k.begin == 0)
      zero_tiles<T, V>();
    else
      load_tiles<Op, T, V>(slot_at<Op>(a, at));
    multiply_tiles<Op, T, V>(o, Family::kDecodes ? whole_steps(ks, step) / step : ks / step);
    if (!Family::kDecodes && ks % step) multiply_rest<Op, T, V>(o, ks % step);
    if (k.end < a->k_padded) return store_tiles<Op, T, V>(slot_at<Op>(a, at));
    finish_tiles<Family, Op, T, V>(a, at);
  }

 private:
  // The last step of packed weights, shorter than a tile: padded with zeros here, or it would read past the weights.
  template <class Op, int T, int V>
  static void multiply_rest(const TileOperands& o, int64_t k) {
    alignas(64) uint8_t rest[V][kTileRows * 64];
    memset(rest, 0, sizeof rest);
    TileOperands padded{o.x, {rest[0], rest[V - 1]}, 0, 0};
    for (int v = 0; v < V; v++) memcpy(rest[v], o.w[v], static_cast<size_t>(k) * NYBBLE_TILE_N);
    multiply_tiles<Op, T, V>(padded, 1);
  }
};

// Groups along K: the sums of each are scaled by the weights' scales, and added in float32.
template <class Family>
struct Grouped {
  static constexpr bool kStrips = true;

  // The sum of a row and W columns in a group. A Family whose codes are not counted from their zero points corrects it.
  template <class Vector>
  NYBBLE_INLINE Vector centred(const NybbleLinearArgs*, int64_t, int64_t, int64_t, Vector sum) {
    return sum;
  }

  template <int T, int V>
  static void run(const NybbleLinearArgs* a, const KBlock& k, const TilePlace& at) {
    using Op = typename Family::Op;
    const int64_t step = Family::step(a), steps = whole_steps(a->group, step) / step;
    const uint8_t* w = k.weights.at(at.column - k.from);
    const int64_t between = V > 1 ? k.weights.at(at.column - k.from + W) - w : 0;
    TileSums<Op> sums;
    TileSums<Bf16Op> here, &total = k.end - k.begin < a->k_padded ? slot_at<Bf16Op>(a, at) : here;
    for (int64_t g = k.begin / a->group; g * a->group < k.end; g++, w += steps * step * NYBBLE_TILE_N * Op::kBytes) {
      zero_tiles<T, V>();
      TileOperands o{lines_at<Op>(a, at, g * a->group),
                     {w, w + between},
                     at.rows * NYBBLE_LINE_K,
                     step * NYBBLE_TILE_N * Op::kBytes};
      multiply_tiles<Op, T, V>(o, steps);
      store_tiles<Op, T, V>(sums);
      add_group<Op, V>(a, at, g, sums, total);
    }
    if (k.end < a->k_padded) return;
#pragma GCC unroll 2
    for (int v = 0; v < V; v++)
      each_rows(at.rows, [&](auto some, int64_t r) __attribute__((always_inline)) {
        constexpr int R = decltype(some)::kCount;
        VF acc[R][1];
        load_rows<Bf16Op, R>(total, r, v, acc);
        Family::template finish<R>(a, at.row + r, at.column + v * W, acc);
      });
  }

 private:
  template <class Op, int V>
  NYBBLE_INLINE void add_group(const NybbleLinearArgs* a, const TilePlace& at, int64_t g, const TileSums<Op>& sums,
                               TileSums<Bf16Op>& total) {
    VF scale[V], minimum[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) {
      scale[v] = group_scale(a, at.column + v * W, g);
      minimum[v] = a->minimum ? group_minimum(a, at.column + v * W, g) : vf_set1(0.0f);
    }
    for (int64_t r = 0; r < at.rows; r++) {
      VF sum[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) {
        const VF before = g == 0 ? vf_set1(0.0f) : vf_load(total.at[r] + v * W);
        const auto of_group = Family::centred(a, at.row + r, at.column + v * W, g, Op::load(sums.at[r] + v * W));
        sum[v] = vf_fma(Op::to_float(of_group), scale[v], before);
      }
      if (a->minimum) {
        const VF act_sum = vf_of_int(vi_set1(a->act_sum[(at.row + r) * a->groups + g]));
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) sum[v] = vf_fma(act_sum, minimum[v], sum[v]);
      }
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) vf_store(total.at[r] + v * W, sum[v]);
    }
  }
};

}  // namespace
