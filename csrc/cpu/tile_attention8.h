// y = softmax(q k^T * scale + mask) v with products of 8-bit codes, in the tiles and the order of tile_attention.h.
//
//   codes of a query, and of a key less a center: round(x 127 / max|x|)        see tile_attention8_pack.h
//   scores[key][column] = (sum_d k[key][d] q[d][column]) k_scale[key] q_scale[column]     the sum in int32, exact
//   p[key][column] = round(255 exp(score - largest score of the column so far))          u8
//   o[d][column] += (sum_key v[key][d] p[key][column]) v_scale[block][d]                  the sum over a block in int32
// The sum of the weights is a row of o, whose values are 1: of the weights as they were rounded.
// All operations are of one rounding and lane by lane, so that the bits of the result are the same on every target.
// A query, or a key or value that it sees, with a NaN or an infinity makes its result NaN.
#pragma once

#include "tile_attention8_pack.h"

namespace {

// Scores of R keys and V vectors of columns.
template <int R, int V>
NYBBLE_INLINE void score_tile8(const uint8_t* keys, int64_t stride, const float* key_scale, const int32_t* key_sum,
                               const Tile& tile, int64_t depth, const float* q_scale, float* scores) {
  VI acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) acc[r][v] = vi_set1(key_sum[r]);
  const float* q = tile.q;
  const uint8_t* rows[(R + 2) / 3];
#pragma GCC unroll 16
  for (int r = 0; r < R; r += 3) rows[r / 3] = keys + r * stride;
  for (int64_t d = 0; d < depth; d++, q += V * W) {
    VI x[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) x[v] = vi_load(q + v * W);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const VI one = word_at(rows[r / 3] + r % 3 * stride + d * 4);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) Codes::dot(acc[r][v], x[v], one);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++)
      vf_store(scores + (r * V + v) * W,
               vf_mul(vf_mul(vf_of_int(acc[r][v]), vf_set1(key_scale[r])), vf_load(q_scale + v * W)));
}

// What the sums of products of values with V vectors of weights start at: it takes off kValueOffset times the weights.
template <int V>
NYBBLE_INLINE void start_values(const float* p, int64_t words, VI (&start)[V]) {
#pragma GCC unroll 4
  for (int v = 0; v < V; v++) start[v] = vi_set1(0);
  if constexpr (Codes::kValueOffset != 0) {
    for (int64_t word = 0; word < words; word++)
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) Codes::dot_values(start[v], vi_load(p + (word * V + v) * W), vi_set1(0x01010101));
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) start[v] = vi_mul(start[v], vi_set1(-Codes::kValueOffset));
  }
}

// o of R columns of the values; keep: the factor of what o holds, where `started`.
template <int R, int V>
NYBBLE_INLINE void value_tile8(const uint8_t* values, int64_t stride, const float* value_scale, const float* p,
                               int64_t words, const VI (&start)[V], const VF (&keep)[V], bool started, float* o) {
  VI acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) acc[r][v] = start[v];
  for (int64_t word = 0; word < words; word++, p += V * W, values += stride * 4) {
    VI x[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) x[v] = vi_load(p + v * W);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const VI one = word_at(values + r * 4);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) Codes::dot_values(acc[r][v], x[v], one);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      float* to = o + (r * V + v) * W;
      const VF sum = vf_mul(vf_of_int(acc[r][v]), vf_set1(value_scale[r]));
      vf_store(to, started ? vf_fma(vf_load(to), keep[v], sum) : sum);
    }
}

template <int V, int R>
inline void scores8(int64_t rows, const NybbleAttentionArgs* a, const Block& block, int64_t key, const Tile& tile,
                    const float* q_scale, float* scores) {
  if (rows == R)
    return score_tile8<R, V>(block.keys + key * Block::key_row(a), Block::key_row(a), block.key_scale + key,
                             block.key_sum + key, tile, Block::depth(a), q_scale, scores);
  if constexpr (R > 1) scores8<V, R - 1>(rows, a, block, key, tile, q_scale, scores);
}

template <int V, int R>
inline void values8(int64_t rows, const NybbleAttentionArgs* a, const Block& block, int64_t key, int64_t d,
                    const float* p, int64_t words, const VI (&start)[V], const VF (&keep)[V], const Tile& tile) {
  if (rows == R)
    return value_tile8<R, V>(block.values + (key / Codes::kCodes * Block::value_row(a) + d) * 4, Block::value_row(a),
                             block.value_scale + d, p, words, start, keep, tile.started, tile.o + d * V * W);
  if constexpr (R > 1) values8<V, R - 1>(rows, a, block, key, d, p, words, start, keep, tile);
}

// round(255 2^x) for x <= 0, within 1/40 before it is rounded; 0 for NaN.
NYBBLE_INLINE VI weight_of(VF x) {
  const VF shift = vf_set1(0x1.8p23f);
  x = vf_max(x, vf_set1(-16.0f));
  const VF moved = vf_add(x, shift);  // round(x) in the last bits
  const VF f = vf_sub(x, vf_sub(moved, shift));
  VF p = vf_fma(vf_set1(0x1.c23368p+3f), f, vf_set1(0x1.eeed3cp+5f));
  p = vf_fma(p, f, vf_set1(0x1.619028p+7f));
  p = vf_fma(p, f, vf_set1(0x1.fdf69cp+7f));
  return vi_round(vf_of_bits(vi_add(vi_of_bits(p), vi_shift_left_32<23>(vi_of_bits(moved)))));
}

// a - b, as a power of 2. Scores are powers of 2, but where something is added to them they are kNatural, of e.
template <bool kNatural>
NYBBLE_INLINE VF difference(VF a, VF b) {
  const VF d = vf_sub(a, b);
  return kNatural ? vf_mul(d, vf_set1(kLog2e)) : d;
}
inline bool natural(const NybbleAttentionArgs* a) { return a->mask_kind > NYBBLE_MASK_BOOL || a->slopes; }

// Scores to weights, of a number of keys that is a multiple of 4; what to multiply the earlier sums with in `keep`.
template <int V, bool kNatural>
NYBBLE_INLINE void weigh8(Tile& tile, int64_t keys, const float* scores, float* p, VF (&keep)[V]) {
  VF most[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; v++) most[v] = vf_load(tile.most + v * W);
  for (int64_t key = 0; key < keys; key++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) most[v] = vf_max(vf_load(scores + (key * V + v) * W), most[v]);
  for (int64_t key = 0; key < keys; key += Codes::kCodes, p += V * W)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      VI codes[Codes::kCodes];
#pragma GCC unroll 4
      for (int i = 0; i < Codes::kCodes; i++)
        codes[i] = weight_of(difference<kNatural>(vf_load(scores + ((key + i) * V + v) * W), most[v]));
      vi_store(p + v * W, Codes::word_of_weights(codes));
    }
#pragma GCC unroll 4
  for (int v = 0; v < V; v++) {
    keep[v] = power_of_two<true>(difference<kNatural>(vf_load(tile.most + v * W), most[v]));
    vf_store(tile.most + v * W, most[v]);
  }
}

// Adds NaN to the lanes of columns with a score that is NaN or infinite, but for those of hidden keys.
template <int V>
inline void note_nan(int64_t keys, const float* scores, float* nan) {
  for (int64_t key = 0; key < keys; key++)
    for (int v = 0; v < V; v++) {
      const VF seen = vf_max(vf_set1(kLowest), vf_load(scores + (key * V + v) * W));
      vf_store(nan + v * W, vf_fma(seen, vf_set1(0.0f), vf_load(nan + v * W)));
    }
}

inline void hide_rows(int64_t from, int64_t to, int64_t width, float* scores) {
  for (int64_t i = from * width; i < to * width; i++) scores[i] = -INFINITY;
}

// A tile, and what more these kernels keep of it.
struct Tile8Bits : Tile {
  float *q_scale, *nan;  // [width]; nan: what is added to the sums of weights, 0 or NaN
};

// Scratch shared by the tiles of a call.
struct Shared8 : Shared {
  float* p;
};

template <int V>
inline void run_block8(const NybbleAttentionArgs* a, const Shared8& shared, Tile8Bits& tile, int64_t number) {
  const int64_t block = number * kKeys;
  int64_t begin = block > tile.first ? block : tile.first, end = block + kKeys < tile.last ? block + kKeys : tile.last;
  if (begin >= end) return;
  Mask<V> mask(a, tile, shared.bias);
  if (a->mask_kind && !mask.load(begin, end)) return;
  const Block codes(a, number);
  const int64_t first = begin / 4 * 4, keys = (end - first + 3) / 4 * 4;
  float *scores = shared.scores, *seen = scores + (begin - first) * V * W;
  hide_rows(0, begin - first, V * W, scores);
  hide_rows(end - first, keys, V * W, scores);
  in_tiles<V>(end - begin, [&](int64_t row, int64_t rows) {
    scores8<V, tile_rows(V)>(rows, a, codes, begin - block + row, tile, tile.q_scale, seen + row * V * W);
  });
  if (a->mask_kind) mask.add(end - begin, seen);
  if (a->slopes) add_slopes<V>(a, tile, begin, end, seen);
  if (begin < tile.all_first || end > tile.all_last) hide_edges<V>(tile, begin, end, seen);
  if (*codes.nan || natural(a)) note_nan<V>(keys, scores, tile.nan);
  VF keep[V];
  natural(a) ? weigh8<V, true>(tile, keys, scores, shared.p, keep)
             : weigh8<V, false>(tile, keys, scores, shared.p, keep);
  VI start[V];
  start_values<V>(shared.p, keys / Codes::kCodes, start);
  in_tiles<V>(a->value_dim + 1, [&](int64_t row, int64_t rows) {
    values8<V, tile_rows(V)>(rows, a, codes, first - block, row, shared.p, keys / Codes::kCodes, start, keep, tile);
  });
  tile.started = true;
}

inline void start_tile8(const NybbleAttentionArgs* a, Tile8Bits& tile, int64_t column, Carver& carver, float* memory) {
  const int64_t left = a->column_end - column;
  tile.column = column;
  tile.count = static_cast<int>(left < kTileVectors * W ? left : kTileVectors * W);
  tile.started = false;
  tile.see(a);
  const int64_t width = tile.vectors() * W;
  tile.q = carver.take((a->head_dim + 15) / 16 * 16 / Codes::kCodes * width);
  tile.o = carver.take((a->value_dim + 1) * width);
  tile.sum = tile.o + a->value_dim * width;
  tile.most = carver.take(width);
  tile.q_scale = carver.take(width);
  tile.nan = carver.take(width);
  const float scale = natural(a) ? a->scale : a->scale * kLog2e;
  with_kind(a->dtype, [&](auto kind) {
    constexpr int dtype = decltype(kind)::dtype;
    with_vectors(tile, [&](auto vectors) { pack_queries<vectors.count, dtype>(a, tile, scale, tile.q_scale, memory); });
  });
  for (int64_t i = 0; i < width; i++) {
    tile.most[i] = kLowest;
    tile.sum[i] = 0.0f;
    tile.nan[i] = tile.q_scale[i] * 0.0f;
  }
}

inline void finish_tile8(const NybbleAttentionArgs* a, Tile8Bits& tile) {
  for (int64_t i = 0; i < tile.vectors() * W && tile.started; i++) tile.sum[i] += tile.nan[i];
  with_vectors(tile, [&](auto vectors) { store_outputs<vectors.count>(a, tile); });
}

inline NybbleStatus attention8(const NybbleAttentionArgs* a) {
  const int64_t columns = a->column_end - a->column_begin, width = kTileVectors * W;
  if (a->parts || a->partial || a->scratch_bytes < nybble_attention_scratch(columns, a->head_dim, a->value_dim))
    return NYBBLE_UNSUPPORTED;
  if (a->pack) return pack(a);
  Carver carver{static_cast<float*>(a->scratch)};
  const Shared8 shared{{carver.take(kKeys * width), carver.take(kKeys * width)},
                       carver.take(kKeys / Codes::kCodes * width)};
  const int64_t count = (columns + width - 1) / width;
  static_assert(sizeof(Tile8Bits) <= NYBBLE_ATTENTION_TILE, "the scratch is too small");
  Tile8Bits* tiles = reinterpret_cast<Tile8Bits*>(carver.take(count * kTileFloats));
  float* memory = carver.take(nybble_attention_row(a->head_dim) * width);
  int64_t first = a->keys, last = 0;
  for (int64_t i = 0; i < count; i++) {
    start_tile8(a, tiles[i], a->column_begin + i * width, carver, memory);
    first = tiles[i].first < first ? tiles[i].first : first;
    last = tiles[i].last > last ? tiles[i].last : last;
  }
  for (int64_t number = first / kKeys; number * kKeys < last; number++)
    for (int64_t i = 0; i < count; i++)
      with_vectors(tiles[i], [&](auto vectors) { run_block8<vectors.count>(a, shared, tiles[i], number); });
  for (int64_t i = 0; i < count; i++) finish_tile8(a, tiles[i]);
  return NYBBLE_OK;
}

}  // namespace
