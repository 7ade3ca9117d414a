// The loops around the register tiles of layout gather8, and their epilogue. Include after a target's tile header.
//
// A Tile multiplies R rows by at most kPassTiles tiles of 16 columns:
//   template <int R> static void run(const NybbleLinearArgs*, int64_t row, int64_t tile, int64_t end);
#pragma once

#include "tile_run.h"

namespace {

constexpr int64_t kStepBytes = 256, kPassTiles = 16;

template <class T>
NYBBLE_INLINE void scatter(T* y, const int32_t* order, const T* lanes, int64_t n) {
#pragma GCC unroll 16
  for (int i = 0; i < W; i++)
    if (order[i] < n) y[order[i]] = lanes[i];
}

// Like finish_w8a8, but scatters to the columns in a->order.
template <int R, int V>
NYBBLE_INLINE void finish_gather(const NybbleLinearArgs* a, int64_t row, int64_t place, const VI (&acc)[R][V], int v) {
  if (!a->order) return finish_w8a8<R, V>(a, row, place, acc, v);
  const int32_t* order = a->order + place;
  const int64_t bytes = a->y_dtype == NYBBLE_BF16 || a->y_dtype == NYBBLE_F16 ? 2 : 4;
  alignas(64) uint8_t lanes[4 * W];
  float biases[W] = {};
  for (int i = 0; i < W && a->bias; i++) {
    if (order[i] >= a->n) continue;
    const int64_t bias_bytes = a->bias_dtype == NYBBLE_F32 ? 4 : 2;
    vf_store(reinterpret_cast<float*>(lanes),
             vf_load_as(static_cast<const uint8_t*>(a->bias) + order[i] * bias_bytes, a->bias_dtype, 1));
    memcpy(&biases[i], lanes, 4);
  }
  const VF scale = vf_load(static_cast<const float*>(a->scale) + place), bias = vf_load(biases);
  const VI sum = vi_load(a->column_sum + place);
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
    if (a->y_dtype == NYBBLE_S32) {
      vi_store(lanes, acc[r][v]);
    } else {
      const VI centred = vi_sub(acc[r][v], vi_mul(vi_set1(a->act_zero[row + r]), sum));
      vf_store_as(lanes, a->y_dtype, vf_fma(vf_of_int(centred), vf_mul(vf_set1(a->act_scale[row + r]), scale), bias),
                  W);
    }
    if (bytes == 2)
      scatter(static_cast<uint16_t*>(a->y) + (row + r) * a->n, order, reinterpret_cast<uint16_t*>(lanes), a->n);
    else
      scatter(static_cast<uint32_t*>(a->y) + (row + r) * a->n, order, reinterpret_cast<uint32_t*>(lanes), a->n);
  }
}

template <class Tile, int R>
inline void run_gather_rows(const NybbleLinearArgs* a, int64_t rows, int64_t row, int64_t tile, int64_t end) {
  if constexpr (R > 0) {
    if (rows == R)
      Tile::template run<R>(a, row, tile, end);
    else
      run_gather_rows<Tile, R - 1>(a, rows, row, tile, end);
  }
}

template <class Tile, int kRows>
inline NybbleStatus run_gather(const NybbleLinearArgs* a) {
  const int64_t pass_steps = a->pass_bytes / kStepBytes;
  if (a->block_rows > kRows) return NYBBLE_UNSUPPORTED;
  for (int64_t tile = a->tile_begin, end; tile < a->tile_end; tile = end) {
    end = tile + 1;
    while (end < a->tile_end && end - tile < kPassTiles &&
           static_cast<int64_t>(a->start[end + 1] - a->start[tile]) <= pass_steps)
      end++;
    for (int64_t block = a->block_begin; block < a->block_end; block++) {
      const int64_t row = block * a->block_rows, rows = a->rows - row < a->block_rows ? a->rows - row : a->block_rows;
      run_gather_rows<Tile, kRows>(a, rows, row, tile, end);
    }
  }
  return NYBBLE_OK;
}

}  // namespace
