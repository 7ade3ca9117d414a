// y = softmax(q k^T * scale + mask) v, one pass over the keys with a running maximum and sum. Include after a target's
// vector header.
//
// Columns, pairs of a head and a query, are in the lanes, up to two vectors a tile, or 16 columns; keys are read where
// they lie, one number for all lanes at a time. So the maximum, the exponentials and the sums work lane by lane, and
// neither keys nor values are packed (16-bit ones are converted, and int8 codes multiplied by their scales, a block at
// a time for all tiles of the call):
//   scores[key][column] = sum_d k[key][d] q[d][column]     q transposed once per tile
//   o[d][column] += sum_key v[key][d] p[key][column]       o transposed back at the end
// Bound by the fused multiply-adds: 2 head_dim a score, and about 12 more instructions for its exponential. Measured on
// one core of Zen 5, share of the peak: AVX-512 88 % at head_dim 64 and 1500 keys, 75 % at head_dim 32 and 128 keys in
// the cache; AVX2 88 % and 80 %.
#pragma once

#include "tile_attention_few.h"

namespace {

template <int V>
NYBBLE_INLINE void load_queries(const NybbleAttentionArgs* a, Tile& tile) {
  const int64_t bytes = element_bytes(a);
  const VF scale = vf_set1(a->scale);
  Column at(a, tile.column);
  for (int v = 0; v < V; v++) {
    const uint8_t* from[W];
    const int held = tile.count - v * W < W ? tile.count - v * W : W;
    for (int i = 0; i < held; i++, at.next(a))
      from[i] = element(a->q, at.head * a->q_head + at.query * a->q_token, bytes);
    for (int64_t d = 0; d < a->head_dim; d += W) {
      VF rows[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; i++)
        rows[i] = i < held ? vf_mul(vf_load_as(from[i] + d * bytes, a->dtype, a->head_dim - d), scale) : vf_set1(0.0f);
      vf_transpose(rows);
      for (int i = 0; i < W && d + i < a->head_dim; i++) vf_store(tile.q + (d + i) * V * W + v * W, rows[i]);
    }
  }
}

template <int R, int V>
NYBBLE_INLINE void score_tile(const Rows& k, const float* q, int64_t depth, float* scores) {
  VF acc[R][V];
  const float* rows[(R + 2) / 3];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
    if (r % 3 == 0) rows[r / 3] = k.at + r * k.stride;
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) acc[r][v] = vf_set1(0.0f);
  }
  for (int64_t d = 0; d < depth; d++, q += V * W) {
    VF x[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) x[v] = vf_load(q + v * W);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const VF one = vf_set1(rows[r / 3][r % 3 * k.stride + d]);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) acc[r][v] = vf_fma_fast(one, x[v], acc[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) vf_store(scores + (r * V + v) * W, acc[r][v]);
}

// keep: the factor of what o holds, where `started`.
template <int R, int V>
NYBBLE_INLINE void value_tile(const Rows& values, const float* p, int64_t keys, const VF (&keep)[V], bool started,
                              float* o) {
  VF acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) acc[r][v] = vf_set1(0.0f);
  const float* from = values.at;
  for (int64_t key = 0; key < keys; key++, p += V * W, from += values.stride) {
    VF x[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) x[v] = vf_load(p + v * W);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const VF one = vf_set1(from[r]);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) acc[r][v] = vf_fma_fast(one, x[v], acc[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      float* to = o + (r * V + v) * W;
      vf_store(to, started ? vf_fma_fast(vf_load(to), keep[v], acc[r][v]) : acc[r][v]);
    }
}

template <int V, int R>
inline void scores_of(int64_t rows, const Rows& k, const float* q, int64_t depth, float* scores) {
  if (rows == R) return score_tile<R, V>(k, q, depth, scores);
  if constexpr (R > 1) scores_of<V, R - 1>(rows, k, q, depth, scores);
}

template <int V, int R>
inline void values_of(int64_t rows, const Rows& values, const float* p, int64_t keys, const VF (&keep)[V], bool started,
                      float* o) {
  if (rows == R) return value_tile<R, V>(values, p, keys, keep, started, o);
  if constexpr (R > 1) values_of<V, R - 1>(rows, values, p, keys, keep, started, o);
}

// Calls run(first, rows) for `count` rows in parts of at most tile_rows(V), as equal as possible.
template <int V, class Run>
NYBBLE_INLINE void in_tiles(int64_t count, const Run& run) {
  constexpr int kRows = tile_rows(V);
  const int64_t tiles = (count + kRows - 1) / kRows;
  for (int64_t i = 0, row = 0; i < tiles; i++) {
    const int64_t rows = (count - row + tiles - i - 1) / (tiles - i);
    run(row, rows);
    row += rows;
  }
}

template <int V>
NYBBLE_INLINE void hide_edges(const Tile& tile, int64_t begin, int64_t end, float* scores) {
  for (int64_t key = begin; key < end; key++) {
    if (key >= tile.all_first && key < tile.all_last) continue;
    for (int v = 0; v < V; v++) {
      float* at = scores + ((key - begin) * V + v) * W;
      const VI low = vi_load(tile.low + v * W), limit = vi_load(tile.limit + v * W);
      const VI here = vi_set1(static_cast<int32_t>(key));
      const VF seen = vf_where_less(here, limit, vf_load(at), vf_set1(-INFINITY));
      vf_store(at, vf_where_less(here, low, vf_set1(-INFINITY), seen));
    }
  }
}

template <int V>
NYBBLE_INLINE void add_slopes(const NybbleAttentionArgs* a, const Tile& tile, int64_t begin, int64_t end,
                              float* scores) {
  float slopes[V * W], places[V * W];
  Column at(a, tile.column);
  for (int i = 0; i < V * W; i++) {
    slopes[i] = a->slopes[at.head];
    places[i] = static_cast<float>(a->keys - a->queries + at.query);
    if (i + 1 < tile.count) at.next(a);
  }
  for (int64_t key = begin; key < end; key++)
    for (int v = 0; v < V; v++) {
      float* to = scores + ((key - begin) * V + v) * W;
      const VF distance = vf_sub(vf_set1(static_cast<float>(key)), vf_load(places + v * W));
      vf_store(to, vf_fma(vf_load(slopes + v * W), distance, vf_load(to)));
    }
}

// Scores to weights of the values, for a block of keys; returns what to multiply the earlier sums with in `keep`.
template <int V>
NYBBLE_INLINE void weigh(Tile& tile, int64_t keys, float* scores, VF (&keep)[V]) {
  VF most[V], sum[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; v++) {
    most[v] = vf_load(tile.most + v * W);
    sum[v] = vf_set1(0.0f);
  }
  for (int64_t key = 0; key < keys; key++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) most[v] = vf_max(vf_load(scores + (key * V + v) * W), most[v]);
  for (int64_t key = 0; key < keys; key++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      float* at = scores + (key * V + v) * W;
      const VF p = exp_of_difference(vf_load(at), most[v]);
      vf_store(at, p);
      sum[v] = vf_add(sum[v], p);
    }
#pragma GCC unroll 4
  for (int v = 0; v < V; v++) {
    keep[v] = exp_of_difference(vf_load(tile.most + v * W), most[v]);
    vf_store(tile.sum + v * W, vf_fma_fast(vf_load(tile.sum + v * W), keep[v], sum[v]));
    vf_store(tile.most + v * W, most[v]);
  }
}

// Keys or values as they lie in memory; `scale` is null unless they are int8 codes.
struct Stored {
  const void* base;
  int64_t stride, width;
  const float* scale;
  int64_t scale_stride;
};

// Rows from `begin` to before `end` as floats, in `to` unless they are floats where they lie.
NYBBLE_INLINE Rows float_rows(const Stored& of, int dtype, int64_t begin, int64_t end, float* to, int64_t row) {
  const int64_t bytes = kv_bytes(dtype);
  const uint8_t* from = element(of.base, begin * of.stride, bytes);
  if (dtype == NYBBLE_F32) return {reinterpret_cast<const float*>(from), of.stride};
  for (int64_t key = 0; key < end - begin; key++) {
    const VF scale = vf_set1(dtype == NYBBLE_S8 ? of.scale[(begin + key) * of.scale_stride] : 1.0f);
    for (int64_t d = 0; d < of.width; d += W) {
      const VF read = load_kv(from + (key * of.stride + d) * bytes, dtype, of.width - d);
      vf_store(to + key * row + d, dtype == NYBBLE_S8 ? vf_mul(read, scale) : read);
    }
  }
  return {to, row};
}

template <int V>
inline void run_block(const NybbleAttentionArgs* a, const Shared& shared, Tile& tile, const Rows& k, const Rows& values,
                      int64_t block, int64_t block_end) {
  int64_t begin = block > tile.first ? block : tile.first, end = block_end < tile.last ? block_end : tile.last;
  if (begin >= end) return;
  Mask<V> mask(a, tile, shared.bias);
  if (a->mask_kind && !mask.load(begin, end)) return;
  float* scores = shared.scores;
  const int64_t keys = end - begin;
  in_tiles<V>(keys, [&](int64_t row, int64_t rows) {
    const Rows at{k.at + (begin - block + row) * k.stride, k.stride};
    scores_of<V, tile_rows(V)>(rows, at, tile.q, a->head_dim, scores + row * V * W);
  });
  if (a->mask_kind) mask.add(keys, scores);
  if (a->slopes) add_slopes<V>(a, tile, begin, end, scores);
  if (begin < tile.all_first || end > tile.all_last) hide_edges<V>(tile, begin, end, scores);
  VF keep[V];
  weigh<V>(tile, keys, scores, keep);
  in_tiles<V>(a->value_dim, [&](int64_t row, int64_t rows) {
    const Rows at{values.at + (begin - block) * values.stride + row, values.stride};
    values_of<V, tile_rows(V)>(rows, at, scores, keys, keep, tile.started, tile.o + row * V * W);
  });
  tile.started = true;
}

template <int V>
NYBBLE_INLINE void store_outputs(const NybbleAttentionArgs* a, const Tile& tile) {
  const int64_t bytes = element_bytes(a);
  Column at(a, tile.column);
  for (int v = 0; v < V; v++) {
    uint8_t* to[W];
    const int held = tile.count - v * W < W ? tile.count - v * W : W;
    for (int i = 0; i < held; i++, at.next(a))
      to[i] = static_cast<uint8_t*>(a->y) + (at.head * a->y_head + at.query * a->y_token) * bytes;
    // The sum is 1 or more, or 0 where no key is seen; NaN stays.
    const VF part = vf_div(vf_set1(1.0f), vf_max(vf_set1(0x1p-126f), vf_load(tile.sum + v * W)));
    for (int64_t d = 0; d < a->value_dim; d += W) {
      VF rows[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; i++)
        rows[i] = tile.started && d + i < a->value_dim ? vf_mul(vf_load(tile.o + (d + i) * V * W + v * W), part)
                                                       : vf_set1(0.0f);
      vf_transpose(rows);
#pragma GCC unroll 16
      for (int i = 0; i < held; i++) vf_store_as(to[i] + d * bytes, a->dtype, rows[i], a->value_dim - d);
    }
  }
}

inline void start_tile(const NybbleAttentionArgs* a, Tile& tile, int64_t column, Carver& carver) {
  const int64_t left = a->column_end - column;
  tile.column = column;
  tile.count = static_cast<int>(left < kTileVectors * W ? left : kTileVectors * W);
  tile.started = false;
  tile.see(a);
  const int64_t width = tile.vectors() * W;
  tile.q = carver.take(a->head_dim * width);
  tile.o = carver.take(a->value_dim * width);
  tile.most = carver.take(width);
  tile.sum = carver.take(width);
  for (int64_t i = 0; i < width; i++) {
    tile.most[i] = kLowest;
    tile.sum[i] = 0.0f;
  }
  with_vectors(tile, [&](auto vectors) { load_queries<vectors.count>(a, tile); });
}

inline NybbleStatus attention(const NybbleAttentionArgs* a) {
  const int64_t columns = a->column_end - a->column_begin, width = kTileVectors * W;
  if (a->parts) return merge_few(a);
  if (a->scratch_bytes < nybble_attention_scratch(columns, a->head_dim, a->value_dim)) return NYBBLE_UNSUPPORTED;
  if (columns <= NYBBLE_ATTENTION_FEW) return attention_few(a);
  Carver carver{static_cast<float*>(a->scratch)};
  const int64_t key_row = nybble_attention_row(a->head_dim), value_row = nybble_attention_row(a->value_dim);
  float *key_floats = carver.take(kKeys * key_row), *value_floats = carver.take(kKeys * value_row);
  const Shared shared{carver.take(kKeys * width), carver.take(kKeys * width)};
  const int64_t count = (columns + width - 1) / width;
  Tile* tiles = reinterpret_cast<Tile*>(carver.take(count * kTileFloats));
  const int dtype = kv_dtype(a);
  const Stored keys{a->k, a->k_token, a->head_dim, a->k_scale, a->k_scale_token};
  const Stored stored_values{a->v, a->v_token, a->value_dim, a->v_scale, a->v_scale_token};
  int64_t first = a->key_end, last = a->key_begin;
  for (int64_t i = 0; i < count; i++) {
    start_tile(a, tiles[i], a->column_begin + i * width, carver);
    first = tiles[i].first < first ? tiles[i].first : first;
    last = tiles[i].last > last ? tiles[i].last : last;
  }
  for (int64_t begin = first; begin < last; begin += kKeys) {
    const int64_t end = begin + kKeys < last ? begin + kKeys : last;
    const Rows k = float_rows(keys, dtype, begin, end, key_floats, key_row);
    const Rows values = float_rows(stored_values, dtype, begin, end, value_floats, value_row);
    for (int64_t i = 0; i < count; i++) {
      Tile& tile = tiles[i];
      with_vectors(tile, [&](auto vectors) { run_block<vectors.count>(a, shared, tile, k, values, begin, end); });
    }
  }
  for (int64_t i = 0; i < count; i++)
    with_vectors(tiles[i], [&](auto vectors) { store_outputs<vectors.count>(a, tiles[i]); });
  return NYBBLE_OK;
}

}  // namespace
