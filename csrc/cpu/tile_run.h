// The loops around the register tiles of dense layouts, and the epilogues. Include after a target's tile header.
//
// A Tile multiplies R rows by V * W columns, V at most vectors(R):
//   static constexpr int vectors(int rows);
//   template <int R, int V> static void run(const NybbleLinearArgs*, int64_t row, int64_t column, Prefetcher&);
#pragma once

#include "../abi.h"

// For the steps of a register tile: if not inlined, accumulators would be passed through memory.
#define NYBBLE_INLINE __attribute__((always_inline)) static inline

namespace {

constexpr int64_t kLine = 64;

// The largest number of column vectors, `per_vector` registers each, that fits beside `fixed` other registers.
constexpr int fitting_vectors(int per_vector, int fixed) {
  for (int vectors = 4; vectors > 1; vectors /= 2)
    if (vectors * per_vector + fixed <= kRegisters) return vectors;
  return 1;
}

// Bytes of codes of one column.
inline int64_t column_bytes(const NybbleLinearArgs* a) { return a->k_padded * a->code_bits / 8; }

// The address of the codes of W columns: tiles of 16 columns, lines of 64 bytes with a few k each.
inline const uint8_t* codes_at(const NybbleLinearArgs* a, int64_t column) {
  const int64_t tile = column / NYBBLE_TILE_N;
  return a->codes + tile * NYBBLE_TILE_N * column_bytes(a) + column % NYBBLE_TILE_N * 4;
}

// Prefetches codes, so that memory and multiplier work in parallel. If several row blocks are multiplied with the
// current columns, each prefetches its share of the next columns. A row block whose columns were not prefetched (the
// only one or the first) prefetches a short distance ahead in its own streams, unless its work per line is so light
// that the hardware prefetcher does better.
class Prefetcher {
 public:
  Prefetcher(const uint8_t* next, const uint8_t* end, int64_t blocks) : next_(next), end_(blocks > 1 ? end : next) {
    while (blocks >> (shift_ + 1)) shift_++;
  }

  // Sets whether the columns of the next row block have been prefetched.
  void columns_fetched(bool yes) { fetched_ = yes; }

  // Called after each few lines that every stream has used.
  template <int V>
  void used(const uint8_t* const (&streams)[V], int64_t lines, bool light) {
    if (!fetched_ && !light)
      for (int64_t i = 0; i < lines; i++)
        for (const uint8_t* stream : streams) __builtin_prefetch(stream + kPrefetchDistance + i * kLine);
    for (int64_t i = (lines * V + (int64_t{1} << shift_) - 1) >> shift_; i > 0 && next_ < end_; i--, next_ += kLine)
      __builtin_prefetch(next_);
  }

 private:
  static constexpr int64_t kPrefetchDistance = 2048;
  const uint8_t *next_, *end_;
  int shift_ = 0;
  bool fetched_ = false;
};

// Calls step(), which advances the streams, for each of `lines` lines; prefetches after every kStep lines.
template <int64_t kStep, int V, class Step>
NYBBLE_INLINE void each_line(int64_t lines, const uint8_t* (&streams)[V], Prefetcher& prefetcher, bool light,
                             const Step& step) {
  for (; lines >= kStep; lines -= kStep) {
    for (int64_t i = 0; i < kStep; i++) step();
    prefetcher.used(streams, kStep, light);
  }
  for (; lines > 0; lines--) step();
}

// Columns that all row blocks are multiplied with before the next columns. Their weights stay in the L2 cache
// meanwhile, beside those that are prefetched. Few row blocks use few columns, so that prefetching starts early; many
// use more, or they would reread their activations too often. At least the columns of one register tile.
inline int64_t columns_per_pass(const NybbleLinearArgs* a, int64_t blocks, int64_t tile) {
  const int64_t bytes = (blocks <= 8 ? 128 : 256) * 1024, most = bytes / column_bytes(a) / 64 * 64;
  if (most > 0) return most;
  return blocks > 2 && 64 * column_bytes(a) <= 256 * 1024 ? 64 : tile;
}

// The widest tile that fits, then the remaining columns with half as many vectors.
template <class Tile, int R, int V>
inline void run_columns(const NybbleLinearArgs* a, int64_t row, int64_t column, int64_t end, Prefetcher& prefetcher) {
  for (; column + V * W <= end; column += V * W) Tile::template run<R, V>(a, row, column, prefetcher);
  if constexpr (V > 1) run_columns<Tile, R, V / 2>(a, row, column, end, prefetcher);
}

template <class Tile, int R>
inline void run_rows(const NybbleLinearArgs* a, int64_t rows, int64_t row, int64_t column, int64_t end,
                     Prefetcher& prefetcher) {
  if constexpr (R > 0) {
    if (rows == R)
      run_columns<Tile, R, Tile::vectors(R)>(a, row, column, end, prefetcher);
    else
      run_rows<Tile, R - 1>(a, rows, row, column, end, prefetcher);
  }
}

template <class Tile, int kRows>
inline NybbleStatus run_tiles(const NybbleLinearArgs* a) {
  if (a->block_rows > kRows) return NYBBLE_UNSUPPORTED;
  const int64_t end = a->tile_end * NYBBLE_TILE_N, blocks = a->block_end - a->block_begin;
  const int64_t pass = columns_per_pass(a, blocks, (blocks > 1 ? Tile::vectors(kRows) : Tile::vectors(1)) * W);
  for (int64_t from = a->tile_begin * NYBBLE_TILE_N; from < end; from += pass) {
    const int64_t to = from + pass < end ? from + pass : end, next = to + pass < end ? to + pass : end;
    Prefetcher prefetcher(codes_at(a, to), codes_at(a, next), blocks);
    for (int64_t block = a->block_begin; block < a->block_end; block++) {
      prefetcher.columns_fetched(blocks > 1 && (block > a->block_begin || from > a->tile_begin * NYBBLE_TILE_N));
      const int64_t row = block * a->block_rows, rows = a->rows - row < a->block_rows ? a->rows - row : a->block_rows;
      run_rows<Tile, kRows>(a, rows, row, from, to, prefetcher);
    }
  }
  return NYBBLE_OK;
}

// Index of (column, group) in an array [tiles][groups][16].
inline int64_t group_at(const NybbleLinearArgs* a, int64_t column, int64_t g) {
  return (column / NYBBLE_TILE_N * a->groups + g) * NYBBLE_TILE_N + column % NYBBLE_TILE_N;
}

template <class T>
inline const T* panel_at(const NybbleLinearArgs* a, int64_t row) {
  return static_cast<const T*>(a->panel) + row * a->k_padded;
}

inline VF bias_at(const NybbleLinearArgs* a, int64_t column) {
  const int64_t count = a->n - column;
  if (!a->bias || count <= 0) return vf_set1(0.0f);
  const int64_t bytes = a->bias_dtype == NYBBLE_F32 ? 4 : 2;
  return vf_load_as(static_cast<const uint8_t*>(a->bias) + column * bytes, a->bias_dtype, count);
}

// Stores of_row(r) as rows [row, row + R) of W columns of y; skips columns from n on. Loops over rows are unrolled, to
// keep the accumulators in registers.
template <int R, class OfRow>
NYBBLE_INLINE void store_rows(const NybbleLinearArgs* a, int64_t row, int64_t column, const OfRow& of_row) {
  const int64_t count = a->n - column, bytes = a->y_dtype == NYBBLE_F32 ? 4 : 2;
  uint8_t* y = static_cast<uint8_t*>(a->y) + (row * a->n + column) * bytes;
  if (count >= W && a->y_dtype == NYBBLE_F32) {
#pragma GCC unroll 16
    for (int r = 0; r < R; r++, y += a->n * 4) vf_store(reinterpret_cast<float*>(y), of_row(r));
  } else if (count >= W && a->y_dtype == NYBBLE_BF16) {
#pragma GCC unroll 16
    for (int r = 0; r < R; r++, y += a->n * 2) vf_store_as(y, NYBBLE_BF16, of_row(r), W);
  } else if (count > 0) {
#pragma GCC unroll 16
    for (int r = 0; r < R; r++, y += a->n * bytes) vf_store_as(y, a->y_dtype, of_row(r), count);
  }
}

// y = (acc - act_zero * column_sum) * (act_scale * scale) + bias, in this order; for int32 y, the accumulators.
template <int R, int V>
NYBBLE_INLINE void finish_w8a8(const NybbleLinearArgs* a, int64_t row, int64_t column, const VI (&acc)[R][V], int v) {
  if (a->y_dtype == NYBBLE_S32) {
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
      if (a->n > column)
        vi_store_as_s32(static_cast<int32_t*>(a->y) + (row + r) * a->n + column, acc[r][v], a->n - column);
    return;
  }
  const VF scale = vf_load(static_cast<const float*>(a->scale) + column), bias = bias_at(a, column);
  const VI sum = vi_load(a->column_sum + column);
  store_rows<R>(a, row, column, [&](int r) __attribute__((always_inline)) {
    const VI centred = vi_sub(acc[r][v], vi_mul(vi_set1(a->act_zero[row + r]), sum));
    return vf_fma(vf_of_int(centred), vf_mul(vf_set1(a->act_scale[row + r]), scale), bias);
  });
}

// The scales of W columns in one group of 4-bit codes. For small groups, hardware prefetching is too slow: the software
// prefetch gains 5 % at one row.
inline VF group_scale(const NybbleLinearArgs* a, int64_t column, int64_t g) {
  const uint16_t* scale = static_cast<const uint16_t*>(a->scale) + group_at(a, column, g);
  if (a->group <= 32) __builtin_prefetch(scale + 256);
  return vf_load_bf16(scale);
}

// Initial accumulators of a group, which subtract the weight zero point: -zero_point * (sum of activation codes).
struct GroupStart {
  const int32_t* sums;
  int64_t groups;
  bool symmetric;
  VI zero;

  GroupStart(const NybbleLinearArgs* a, int64_t row, int64_t column, int64_t g)
      : sums(a->act_sum + row * a->groups + g),
        groups(a->groups),
        symmetric(!a->zero_point),
        zero(symmetric ? vi_set1(0) : vi_load_u8(a->zero_point + group_at(a, column, g))) {}

  VI of_row(int r) const {
    const VI sum = vi_set1(sums[r * groups]);
    return symmetric ? sum : vi_mul(zero, sum);
  }
};

// y = (sum - act_zero * weight_sum) * act_scale + bias. The correction for the activation zero point spans all groups.
template <int R, int V>
NYBBLE_INLINE void finish_w4a8(const NybbleLinearArgs* a, int64_t row, int64_t column, const VF (&sum)[R][V], int v) {
  const VF weight_sum = vf_load(a->weight_sum + column), bias = bias_at(a, column);
  store_rows<R>(a, row, column, [&](int r) __attribute__((always_inline)) {
    const VF zero = vf_set1(-static_cast<float>(a->act_zero[row + r]));
    return vf_fma(vf_fma(zero, weight_sum, sum[r][v]), vf_set1(a->act_scale[row + r]), bias);
  });
}

}  // namespace
