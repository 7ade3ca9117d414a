// The loops around the register tiles of layout blocks8: passes of strips, K blocks, row blocks, register tiles.
// Include after a target's tile header, whose dense Tile has, besides what tile_run.h needs,
//   using X                         element of the activation panel
//   multiply<R, V>(acc, w, x)       adds the products of one line, and advances the streams w
#pragma once

#include "tile_run.h"

namespace {

inline int64_t block_bytes(const NybbleLinearArgs* a) { return a->block_n * a->block_k; }

// The stored blocks of the strip that contains a column, along K from begin to end.
struct Stored {
  uint64_t begin, end;
  Stored(const NybbleLinearArgs* a, const Place& at)
      : begin(a->start[at.column / a->block_n]), end(a->start[at.column / a->block_n + 1]) {
    if (at.begin > 0) begin = first_from(a, at.begin, begin, end);
    if (at.end < a->k_padded) end = first_from(a, at.end, begin, end);
  }

 private:
  // The first of the blocks [low, high) that starts at k or later.
  static uint64_t first_from(const NybbleLinearArgs* a, int64_t k, uint64_t low, uint64_t high) {
    while (low < high) {
      const uint64_t middle = (low + high) / 2;
      if (a->index[middle] * a->block_k < k)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }
};

// The address of the codes of W columns of a block.
inline const uint8_t* block_at(const NybbleLinearArgs* a, uint64_t block, int64_t column) {
  const int64_t within = column % a->block_n;
  return a->codes + static_cast<int64_t>(block) * block_bytes(a) + within / NYBBLE_TILE_N * NYBBLE_TILE_N * a->block_k +
         within % NYBBLE_TILE_N * 4;
}

// Runs a dense register tile over the stored blocks of a strip; the accumulators stay in registers throughout.
template <class Dense>
struct BlockTile : Dense {
  using X = typename Dense::X;

  static constexpr int vectors(int rows) { return Dense::vectors(rows) < 2 ? 1 : 2; }

  template <int R, int V, class Acc>
  NYBBLE_INLINE void run(const NybbleLinearArgs* a, const Place& at, Acc& acc, Prefetcher& prefetcher) {
    const Stored blocks(a, at);
    const X* panel = panel_at<X>(a, at.row);
    const int64_t lines = a->block_k / 4, between = block_bytes(a) - lines * kLine;
    const uint8_t* w[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) w[v] = block_at(a, blocks.begin, at.column + v * W);
    for (uint64_t block = blocks.begin; block < blocks.end; block++) {
      const X* x = panel + a->index[block] * a->block_k * R;
      // The hardware prefetcher cannot predict the next block's activations: worth 4 to 7 % at 256 rows on Zen 5.
      const X* next = panel + a->index[block + 1 < blocks.end ? block + 1 : block] * a->block_k * R;
      for (int64_t i = 0; i < a->block_k * R; i += kLine / static_cast<int64_t>(sizeof(X)))
        __builtin_prefetch(next + i);
      for (int64_t line = 0; line < lines; line++, x += 4 * R) Dense::template multiply<R, V>(acc, w, x);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) w[v] += between;
      prefetcher.used(w, lines, false);
    }
  }
};

// One or two rows are bound by memory, which is fastest when read in storage order: all lines of a block's first
// vector of columns, then those of the next, instead of alternating: 1.2 to 1.5 times as fast on Zen 5.
template <class Dense>
struct BlockTileInOrder : Dense {
  using X = typename Dense::X;
  template <int R, int V>
  using Acc = typename Dense::template Acc<R, 1>[V];

  static constexpr int vectors(int rows) { return BlockTile<Dense>::vectors(rows); }

  template <int R, int V, class Sums>
  NYBBLE_INLINE void start(const NybbleLinearArgs* a, int64_t column, Sums& acc) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) Dense::template start<R, 1>(a, column + v * W, acc[v]);
  }

  template <int R, int V, class Sums>
  NYBBLE_INLINE void run(const NybbleLinearArgs* a, const Place& at, Sums& acc, Prefetcher&) {
    constexpr int64_t kPrefetchDistance = 8192;
    const Stored blocks(a, at);
    const X* panel = panel_at<X>(a, at.row);
    const int64_t lines = a->block_k / 4;
    for (uint64_t block = blocks.begin; block < blocks.end; block++) {
      const uint8_t* w[1] = {block_at(a, block, at.column)};
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) {
        const X* x = panel + a->index[block] * a->block_k * R;
        for (int64_t line = 0; line < lines; line++, x += 4 * R) {
          __builtin_prefetch(w[0] + kPrefetchDistance);
          Dense::template multiply<R, 1>(acc[v], w, x);
        }
      }
    }
  }

  template <int R, int V, class Sums>
  NYBBLE_INLINE void finish(const NybbleLinearArgs* a, int64_t row, int64_t column, const Sums& acc) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) Dense::template finish<R, 1>(a, row, column + v * W, acc[v]);
  }
};

template <class Tile, int R, int V>
inline void run_block_tile(const NybbleLinearArgs* a, const Place& at, int64_t slot, Prefetcher& prefetcher) {
  typename Tile::template Acc<R, V> acc;
  if (at.begin == 0)
    Tile::template start<R, V>(a, at.column, acc);
  else
    Tile::load(static_cast<const uint8_t*>(a->partial) + slot, acc);
  Tile::template run<R, V>(a, at, acc, prefetcher);
  if (at.end == a->k_padded)
    Tile::template finish<R, V>(a, at.row, at.column, acc);
  else
    Tile::save(static_cast<uint8_t*>(a->partial) + slot, acc);
}

// The strip whose first column is at.column. Its sums are kept from byte `slot` of a->partial on, `bytes` of W columns.
template <class Tile, int R>
inline void run_strip_tiles(const NybbleLinearArgs* a, Place at, int64_t slot, int64_t bytes, Prefetcher& prefetcher) {
  constexpr int V = Tile::vectors(R);
  const int64_t end = at.column + a->block_n;
  for (; at.column + V * W <= end; at.column += V * W, slot += V * bytes)
    run_block_tile<Tile, R, V>(a, at, slot, prefetcher);
  for (; V > 1 && at.column < end; at.column += W, slot += bytes) run_block_tile<Tile, R, 1>(a, at, slot, prefetcher);
}

template <class Dense, int kRows, int R>
inline void run_strip(const NybbleLinearArgs* a, int64_t rows, const Place& at, int64_t slot, Prefetcher& prefetcher) {
  if constexpr (R > 0) {
    constexpr int64_t bytes = slot_bytes<Dense, kRows>();
    if (rows != R)
      run_strip<Dense, kRows, R - 1>(a, rows, at, slot, prefetcher);
    else if constexpr (R <= 2 && W == NYBBLE_TILE_N)
      run_strip_tiles<BlockTileInOrder<Dense>, R>(a, at, slot, bytes, prefetcher);
    else
      run_strip_tiles<BlockTile<Dense>, R>(a, at, slot, bytes, prefetcher);
  }
}

// All row blocks of a K block of the strips [strip, end).
template <class Dense, int kRows>
inline void run_strips(const NybbleLinearArgs* a, int64_t strip, int64_t end, Place at, Prefetcher& prefetcher) {
  constexpr int64_t bytes = slot_bytes<Dense, kRows>();
  const int64_t row_blocks = a->block_end - a->block_begin, first = a->tile_begin * NYBBLE_TILE_N / a->block_n;
  int64_t slot = 0;
  for (int64_t block = a->block_begin; block < a->block_end; block++) {
    prefetcher.columns_fetched(row_blocks > 1 && (block > a->block_begin || strip > first));
    at.row = block * a->block_rows;
    const int64_t rows = a->rows - at.row < a->block_rows ? a->rows - at.row : a->block_rows;
    for (int64_t s = strip; s < end; s++, slot += a->block_n / W * bytes) {
      at.column = s * a->block_n;
      run_strip<Dense, kRows, kRows>(a, rows, at, slot, prefetcher);
    }
  }
}

// Bytes of the blocks before a strip.
inline int64_t bytes_to(const NybbleLinearArgs* a, int64_t strip) {
  return static_cast<int64_t>(a->start[strip]) * block_bytes(a);
}

// Calls run(strip, end, next) for each pass of strips [strip, end); the one after it ends at next.
template <class Run>
inline void each_pass(const NybbleLinearArgs* a, const Run& run) {
  const int64_t last = a->tile_end * NYBBLE_TILE_N / a->block_n;
  const auto pass_from = [&](int64_t strip) {
    int64_t end = strip < last ? strip + 1 : last;
    while (end < last && bytes_to(a, end + 1) - bytes_to(a, strip) <= a->pass_bytes &&
           (end + 1 - strip) * a->block_n <= a->pass)
      end++;
    return end;
  };
  for (int64_t strip = a->tile_begin * NYBBLE_TILE_N / a->block_n, end; strip < last; strip = end) {
    end = pass_from(strip);
    run(strip, end, pass_from(end));
  }
}

// Strips of the widest pass.
inline int64_t most_strips(const NybbleLinearArgs* a) {
  const int64_t strips = most_columns(a) / a->block_n;
  return strips > 1 ? strips : 1;
}

template <class Dense, int kRows>
inline NybbleStatus run_blocks(const NybbleLinearArgs* a) {
  constexpr int64_t slot = slot_bytes<Dense, kRows>();
  static_assert(slot <= NYBBLE_PARTIAL_BYTES * kRows * W);
  static_assert(slot_bytes<BlockTileInOrder<Dense>, 2>() <= slot, "the sums of one or two rows have room too");
  const int64_t ks = a->k_padded, row_blocks = a->block_end - a->block_begin;
  if (a->block_rows > kRows || !holds_sums(a, most_strips(a) * (a->block_n / W) * slot)) return NYBBLE_UNSUPPORTED;
  each_pass(a, [&](int64_t strip, int64_t end, int64_t next) {
    Prefetcher prefetcher(Streams(a->codes + bytes_to(a, end), bytes_to(a, next) - bytes_to(a, end)), row_blocks);
    for (int64_t k = 0; k < ks; k += a->k_block)
      run_strips<Dense, kRows>(a, strip, end, Place{0, 0, k, k + a->k_block < ks ? k + a->k_block : ks}, prefetcher);
  });
  return NYBBLE_OK;
}

}  // namespace
