// The loops around the tiles of the blocks layout. Include after a target's tile header.
//
// A Tile multiplies R rows by V * W columns of a strip, with V at most vectors(R):
//   static constexpr int vectors(int rows);
//   template <int R, int V> static void run(const NybbleLinearArgs*, int64_t row, int64_t column);
#pragma once

#include "tile_run.h"

namespace {

// The stored blocks of the strip that a column stands in.
struct Blocks {
  uint64_t begin, end;
  Blocks(const NybbleLinearArgs* a, int64_t column)
      : begin(a->start[column / a->block_n]), end(a->start[column / a->block_n + 1]) {}
};

// Where the codes of W columns of a block start.
inline const uint8_t* block_at(const NybbleLinearArgs* a, uint64_t block, int64_t column) {
  const int64_t within = column % a->block_n;
  return a->codes + static_cast<int64_t>(block) * a->block_n * a->block_k +
         within / NYBBLE_TILE_N * NYBBLE_TILE_N * a->block_k + within % NYBBLE_TILE_N * 4;
}

template <class Tile, int R>
inline void run_block_rows(const NybbleLinearArgs* a, int64_t rows, int64_t row, int64_t column, int64_t end) {
  if constexpr (R > 0) {
    constexpr int V = Tile::vectors(R);
    if (rows != R) return run_block_rows<Tile, R - 1>(a, rows, row, column, end);
    for (; column + V * W <= end; column += V * W) Tile::template run<R, V>(a, row, column);
    for (; V > 1 && column < end; column += W) Tile::template run<R, 1>(a, row, column);
  }
}

template <class Tile, int kRows>
inline NybbleStatus run_blocks(const NybbleLinearArgs* a) {
  if (a->block_rows > kRows) return NYBBLE_UNSUPPORTED;
  for (int64_t column = a->tile_begin * NYBBLE_TILE_N; column < a->tile_end * NYBBLE_TILE_N; column += a->block_n)
    for (int64_t block = a->block_begin; block < a->block_end; block++) {
      const int64_t row = block * a->block_rows, rows = a->rows - row < a->block_rows ? a->rows - row : a->block_rows;
      run_block_rows<Tile, kRows>(a, rows, row, column, column + a->block_n);
    }
  return NYBBLE_OK;
}

}  // namespace
