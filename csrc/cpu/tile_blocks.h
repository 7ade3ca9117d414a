// The loops around the register tiles of layout blocks8. Include after a target's tile header.
//
// A Tile multiplies R rows by V * W columns of a strip, V at most vectors(R):
//   static constexpr int vectors(int rows);
//   template <int R, int V> static void run(const NybbleLinearArgs*, int64_t row, int64_t column, Prefetcher&);
#pragma once

#include "tile_run.h"

namespace {

inline int64_t block_bytes(const NybbleLinearArgs* a) { return a->block_n * a->block_k; }

// The range of stored blocks of the strip that contains a column.
struct Blocks {
  uint64_t begin, end;
  Blocks(const NybbleLinearArgs* a, int64_t column)
      : begin(a->start[column / a->block_n]), end(a->start[column / a->block_n + 1]) {}
};

// The address of the codes of W columns of a block.
inline const uint8_t* block_at(const NybbleLinearArgs* a, uint64_t block, int64_t column) {
  const int64_t within = column % a->block_n;
  return a->codes + static_cast<int64_t>(block) * block_bytes(a) + within / NYBBLE_TILE_N * NYBBLE_TILE_N * a->block_k +
         within % NYBBLE_TILE_N * 4;
}

// Runs a dense register tile over the stored blocks of a strip; the accumulators stay in registers throughout.
template <class Dense>
struct BlockTile {
  using X = typename Dense::X;

  static constexpr int vectors(int rows) { return Dense::vectors(rows) < 2 ? 1 : 2; }

  template <int R, int V>
  static void run(const NybbleLinearArgs* a, int64_t row, int64_t column, Prefetcher& prefetcher) {
    if constexpr (R <= 2 && W == NYBBLE_TILE_N) return run_in_order<R, V>(a, row, column);
    const Blocks blocks(a, column);
    const X* panel = panel_at<X>(a, row);
    const int64_t lines = a->block_k / 4, between = block_bytes(a) - lines * kLine;
    const uint8_t* w[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) w[v] = block_at(a, blocks.begin, column + v * W);
    typename Dense::template Acc<R, V> acc;
    Dense::template start<R, V>(a, column, acc);
    for (uint64_t block = blocks.begin; block < blocks.end; block++) {
      const X* x = panel + a->index[block] * a->block_k * R;
      // The hardware prefetcher cannot predict the next block's activations: worth 4 to 7 % at 256 rows.
      const X* next = panel + a->index[block + 1 < blocks.end ? block + 1 : block] * a->block_k * R;
      for (int64_t i = 0; i < a->block_k * R; i += kLine / static_cast<int64_t>(sizeof(X)))
        __builtin_prefetch(next + i);
      for (int64_t line = 0; line < lines; line++, x += 4 * R) Dense::template multiply<R, V>(acc, w, x);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) w[v] += between;
      prefetcher.used(w, lines, false);
    }
    Dense::template finish<R, V>(a, row, column, acc);
  }

 private:
  // One or two rows are bound by memory, which is fastest when read in storage order: all lines of a block's first
  // vector of columns, then those of the next, instead of alternating. 1.2 to 1.5 times as fast.
  template <int R, int V>
  NYBBLE_INLINE void run_in_order(const NybbleLinearArgs* a, int64_t row, int64_t column) {
    constexpr int64_t kPrefetchDistance = 8192;
    const Blocks blocks(a, column);
    const X* panel = panel_at<X>(a, row);
    const int64_t lines = a->block_k / 4;
    typename Dense::template Acc<R, 1> acc[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) Dense::template start<R, 1>(a, column + v * W, acc[v]);
    for (uint64_t block = blocks.begin; block < blocks.end; block++) {
      const uint8_t* w[1] = {block_at(a, block, column)};
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) {
        const X* x = panel + a->index[block] * a->block_k * R;
        for (int64_t line = 0; line < lines; line++, x += 4 * R) {
          __builtin_prefetch(w[0] + kPrefetchDistance);
          Dense::template multiply<R, 1>(acc[v], w, x);
        }
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) Dense::template finish<R, 1>(a, row, column + v * W, acc[v]);
  }
};

template <class Tile, int R>
inline void run_strip(const NybbleLinearArgs* a, int64_t rows, int64_t row, int64_t column, int64_t end,
                      Prefetcher& prefetcher) {
  if constexpr (R > 0) {
    constexpr int V = Tile::vectors(R);
    if (rows != R) return run_strip<Tile, R - 1>(a, rows, row, column, end, prefetcher);
    for (; column + V * W <= end; column += V * W) Tile::template run<R, V>(a, row, column, prefetcher);
    for (; V > 1 && column < end; column += W) Tile::template run<R, 1>(a, row, column, prefetcher);
  }
}

// All row blocks are multiplied with a few strips before the next strips. The strips stay in the L2 cache meanwhile,
// and so do a row block's activations, of which each strip reads a part.
template <class Tile, int kRows>
inline NybbleStatus run_blocks(const NybbleLinearArgs* a) {
  constexpr int64_t kPass = 256 * 1024;
  if (a->block_rows > kRows) return NYBBLE_UNSUPPORTED;
  const int64_t last = a->tile_end * NYBBLE_TILE_N / a->block_n, row_blocks = a->block_end - a->block_begin;
  const auto bytes_to = [&](int64_t strip) { return static_cast<int64_t>(a->start[strip]) * block_bytes(a); };
  const auto pass_from = [&](int64_t strip) {
    int64_t end = strip < last ? strip + 1 : last;
    while (end < last && bytes_to(end + 1) - bytes_to(strip) <= kPass) end++;
    return end;
  };
  const int64_t first = a->tile_begin * NYBBLE_TILE_N / a->block_n;
  for (int64_t strip = first, end; strip < last; strip = end) {
    end = pass_from(strip);
    Prefetcher prefetcher(a->codes + bytes_to(end), a->codes + bytes_to(pass_from(end)), row_blocks);
    for (int64_t block = a->block_begin; block < a->block_end; block++) {
      prefetcher.columns_fetched(row_blocks > 1 && (block > a->block_begin || strip > first));
      const int64_t row = block * a->block_rows, rows = a->rows - row < a->block_rows ? a->rows - row : a->block_rows;
      for (int64_t s = strip; s < end; s++)
        run_strip<Tile, kRows>(a, rows, row, s * a->block_n, (s + 1) * a->block_n, prefetcher);
    }
  }
  return NYBBLE_OK;
}

}  // namespace
