// Register tiles for the mask layouts and few rows: lines are expanded in registers as they are multiplied. Weights
// that are not stored expand to the code of zero. Include after tile_avx512vbmi.h.
#pragma once

#include "tile_vnni.h"

namespace {

// Reads the lines of V tiles of 16 columns. Each tile is a stream: the masks of eight lines, then their values.
template <int R, int V, int kPlanes>
struct MaskStreams {
  static constexpr int64_t kMaskBytes = NYBBLE_MASK_LINES * kPlanes * 8;
  const uint8_t* mask[V];
  const uint8_t* values[V][kPlanes];
  int64_t left = 0;  // lines left before the next masks must be read

  MaskStreams(const NybbleLinearArgs* a, int64_t column) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
#pragma GCC unroll 2
      for (int p = 0; p < kPlanes; p++) values[v][p] = a->codes + a->start[column / NYBBLE_TILE_N + v];
    }
  }

  // Moves on to the masks of the next lines, which follow the values of the last ones.
  void next_masks() {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      const uint8_t *low = values[v][0], *high = values[v][kPlanes - 1];
      mask[v] = low > high ? low : high;
#pragma GCC unroll 2
      for (int p = 0; p < kPlanes; p++) values[v][p] = mask[v] + kMaskBytes;
#pragma GCC unroll 8
      for (int64_t ahead = 0; ahead < kMaskBytes + 256; ahead += kLine)
        __builtin_prefetch(mask[v] + kPrefetchDistance + ahead);
    }
    left = NYBBLE_MASK_LINES;
  }

  // Loads the next 64 values of a plane; only as many as `kept` has bits belong to the line.
  VI next(int v, int p, uint64_t* kept) {
    memcpy(kept, mask[v], 8);
    mask[v] += 8;
    const VI found = vi_load(values[v][p]);
    values[v][p] += __builtin_popcountll(*kept);
    return found;
  }

 private:
  // In bytes. On Zen 5, 4096 is 15 % faster at 16 rows and 4 % slower at one.
  static constexpr int64_t kPrefetchDistance = R > 8 ? 4096 : 2048;
};

template <class Step, class Streams>
NYBBLE_INLINE void each_mask_line(int64_t lines, Streams& streams, const Step& step) {
  while (lines > 0) {
    if (streams.left == 0) streams.next_masks();
    const int64_t count = lines < streams.left ? lines : streams.left;
    for (int64_t i = 0; i < count; i++) step();
    streams.left -= count;
    lines -= count;
  }
}

struct TileMask8 {
  static constexpr int vectors(int rows) { return Tile8::vectors(rows); }

  template <int R, int V>
  static void run(const NybbleLinearArgs* a, int64_t row, int64_t column) {
    MaskStreams<R, V, 1> streams(a, column);
    VI acc[R][V];
    Tile8::start<R, V>(a, column, acc);
    const uint8_t* x = panel_at<uint8_t>(a, row);
    each_mask_line(a->k_padded / 4, streams, [&]() __attribute__((always_inline)) {
      VI codes[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) {
        uint64_t kept;
        const VI values = streams.next(v, 0, &kept);
        codes[v] = vi_expand(kept, values);
      }
      Tile8::dot<R, V>(acc, codes, x);
      x += 4 * R;
    });
    Tile8::finish<R, V>(a, row, column, acc);
  }
};

struct TileMask4 {
  static constexpr int vectors(int rows) { return Tile4::vectors(rows); }

  template <int R, int V>
  static void run(const NybbleLinearArgs* a, int64_t row, int64_t column) {
    MaskStreams<R, V, 2> streams(a, column);
    VF sum[R][V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) sum[r][v] = vf_set1(0.0f);
    }
    const int8_t* x = panel_at<int8_t>(a, row);
    const VI nibble = vi_set1(0x0f0f0f0f), zero = vi_set1(0x08080808);
    const Place at{row, column, 0, a->k_padded};
    GroupNumbers<V> numbers(a, at.column);
    for (int64_t g = 0; g < a->groups; g++) {
      VI acc[R][V];
      Tile4::start_group<R, V>(a, at, g, acc);
      each_mask_line(a->group / 8, streams, [&]() __attribute__((always_inline)) {
#pragma GCC unroll 2
        for (int p = 0; p < 2; p++) {
          VI codes[V];
#pragma GCC unroll 4
          for (int v = 0; v < V; v++) {
            uint64_t kept;
            const VI values = streams.next(v, p, &kept);
            codes[v] = vi_expand(kept, vi_and(p ? vi_shift_right<4>(values) : values, nibble), zero);
          }
          Tile4::multiply_half<R, V>(acc, codes, x + 4 * p * R);
        }
        x += 8 * R;
      });
      Tile4::add_group<R, V>(a, at, g, acc, sum, numbers);
    }
    Tile4::finish<R, V>(a, row, column, sum);
  }
};

// All row blocks are multiplied before the next columns, so that later blocks find the values in the cache.
template <class Tile, int R>
inline void run_mask_rows(const NybbleLinearArgs* a, int64_t rows, int64_t row, int64_t column, int64_t tiles) {
  if constexpr (R > 0) {
    constexpr int V = Tile::vectors(R);
    if (rows != R) return run_mask_rows<Tile, R - 1>(a, rows, row, column, tiles);
    for (; tiles >= V; tiles -= V, column += V * W) Tile::template run<R, V>(a, row, column);
    for (; V > 1 && tiles > 0; tiles--, column += W) Tile::template run<R, 1>(a, row, column);
  }
}

template <class Tile, int kRows>
inline NybbleStatus run_mask_tiles(const NybbleLinearArgs* a) {
  static_assert(W == NYBBLE_TILE_N);
  constexpr int64_t kPass = 4;
  if (a->block_rows > kRows) return NYBBLE_UNSUPPORTED;
  for (int64_t tile = a->tile_begin; tile < a->tile_end; tile += kPass)
    for (int64_t block = a->block_begin; block < a->block_end; block++) {
      const int64_t row = block * a->block_rows, rows = a->rows - row < a->block_rows ? a->rows - row : a->block_rows;
      run_mask_rows<Tile, kRows>(a, rows, row, tile * W, a->tile_end - tile < kPass ? a->tile_end - tile : kPass);
    }
  return NYBBLE_OK;
}

}  // namespace
