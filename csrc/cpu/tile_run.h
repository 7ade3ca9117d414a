// The loops around every linear kernel's register tile, and its epilogues. Include after a target's tile header.
//
// A Tile<kVectors> multiplies R rows by kVectors * W columns:
//   template <int R> static void run(const NybbleLinearArgs*, int64_t row, int64_t column);
#pragma once

#include "../abi.h"

namespace {

// Columns whose weights stay in the second-level cache while the row blocks pass over them.
inline int64_t columns_per_pass(int64_t k_padded) {
  const int64_t columns = (192 * 1024) / k_padded / 64 * 64;
  return columns < 64 ? 64 : columns;
}

template <class Tile, int R>
inline void run_rows(const NybbleLinearArgs* a, int64_t rows, int64_t row, int64_t column) {
  if constexpr (R > 0) {
    if (rows == R)
      Tile::template run<R>(a, row, column);
    else
      run_rows<Tile, R - 1>(a, rows, row, column);
  }
}

template <template <int> class Tile, int kVectors, int kRows>
inline NybbleStatus run_tiles(const NybbleLinearArgs* a) {
  if (a->block_rows != kRows) return NYBBLE_UNSUPPORTED;
  const int64_t end = a->tile_end * NYBBLE_TILE_N, pass = columns_per_pass(a->k_padded);
  for (int64_t from = a->tile_begin * NYBBLE_TILE_N; from < end; from += pass) {
    const int64_t to = from + pass < end ? from + pass : end;
    for (int64_t block = a->block_begin; block < a->block_end; block++) {
      const int64_t row = block * kRows, rows = a->rows - row < kRows ? a->rows - row : kRows;
      int64_t column = from;
      for (; column + kVectors * W <= to; column += kVectors * W) run_rows<Tile<kVectors>, kRows>(a, rows, row, column);
      for (; column < to; column += W) run_rows<Tile<1>, kRows>(a, rows, row, column);
    }
  }
  return NYBBLE_OK;
}

// Where the codes of W columns start: tiles of 16 columns, `block_k` ks of 64 bytes each.
inline const uint8_t* codes_at(const NybbleLinearArgs* a, int64_t column, int64_t block_k) {
  const int64_t tile = column / NYBBLE_TILE_N;
  return a->codes + tile * (a->k_padded / block_k) * 64 + column % NYBBLE_TILE_N * 4;
}

// The element of [tiles][groups][16] that belongs to (column, group).
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

inline void store_row(const NybbleLinearArgs* a, int64_t row, int64_t column, VF value) {
  const int64_t bytes = a->y_dtype == NYBBLE_F32 ? 4 : 2, count = a->n - column;
  if (count > 0) vf_store_as(static_cast<uint8_t*>(a->y) + (row * a->n + column) * bytes, a->y_dtype, value, count);
}

// What the epilogues of W columns need, loaded once a tile.
struct Columns8 {
  const NybbleLinearArgs* a;
  int64_t column;
  VF scale = vf_load(static_cast<const float*>(a->scale) + column), bias = bias_at(a, column);
  VI sum = vi_load(a->column_sum + column);

  // y = (acc - act_zero * column_sum) * (act_scale * scale) + bias, in this order, or the accumulators themselves.
  void finish(int64_t row, VI acc) const {
    if (a->y_dtype == NYBBLE_S32) {
      if (a->n > column) vi_store_as_s32(static_cast<int32_t*>(a->y) + row * a->n + column, acc, a->n - column);
      return;
    }
    const VI centred = vi_sub(acc, vi_mul(vi_set1(a->act_zero[row]), sum));
    store_row(a, row, column, vf_fma(vf_of_int(centred), vf_mul(vf_set1(a->act_scale[row]), scale), bias));
  }
};

// The scale and zero point of W columns in one group of 4-bit codes.
inline VF group_scale(const NybbleLinearArgs* a, int64_t column, int64_t g) {
  return vf_load_bf16(static_cast<const uint16_t*>(a->scale) + group_at(a, column, g));
}
inline VI group_zero(const NybbleLinearArgs* a, int64_t column, int64_t g) {
  return a->zero_point ? vi_load_u8(a->zero_point + group_at(a, column, g)) : vi_set1(8);
}

// sum + scale * (acc - zero_point * act_sum) for one row of one group.
inline VF finish_group(const NybbleLinearArgs* a, int64_t row, int64_t g, VF scale, VI zero, VI acc, VF sum) {
  const VI offset = vi_mul(zero, vi_set1(a->act_sum[row * a->groups + g]));
  return vf_fma(vf_of_int(vi_sub(acc, offset)), scale, sum);
}

// y = (sum - act_zero * weight_sum) * act_scale + bias: what the activations' zero point adds is the same for all
// groups.
inline void finish_w4a8(const NybbleLinearArgs* a, int64_t row, int64_t column, VF sum) {
  const VF zero = vf_set1(-static_cast<float>(a->act_zero[row]));
  const VF centred = vf_fma(zero, vf_load(a->weight_sum + column), sum);
  store_row(a, row, column, vf_fma(centred, vf_set1(a->act_scale[row]), bias_at(a, column)));
}

}  // namespace
