// Codes of keys, values and queries for tile_attention8.h. Include after tile_attention8_bytes.h or _words.h.
//
// Keys and values lie in blocks of kKeys, of nybble_attention8_block bytes. A key less a center is its codes in
// [-127, 127] times its scale; the center is a mean of all keys, in which each weighs 1 / its largest number, so that
// no key rules it: it adds the same to all scores of a query, which changes no weight. The values of a block are codes
// times a scale for each column; one more column of ones sums up the weights. A key with a NaN or an infinity, in
// itself or in its value, has the scale NaN.
#pragma once

#include "tile_attention.h"

namespace {

// A block of keys and values.
struct Block {
  uint8_t* keys;                                        // [kKeys][key_row]
  uint8_t* values;                                      // [kKeys / kCodes][value_row] words
  float* key_scale;                                     // [kKeys]
  int32_t* key_sum;                                     // [kKeys] sums of codes times -kOffset
  float* value_scale;                                   // [value_row]
  int32_t* nan;                                         // [1] whether a key has the scale NaN
  static constexpr int64_t kBytes = 4 / Codes::kCodes;  // of a code
  static int64_t key_row(const NybbleAttentionArgs* a) { return (a->head_dim + 15) / 16 * 16 * kBytes; }
  static int64_t value_row(const NybbleAttentionArgs* a) { return nybble_attention_row(a->value_dim); }
  static int64_t depth(const NybbleAttentionArgs* a) { return (a->head_dim + Codes::kCodes - 1) / Codes::kCodes; }

  Block(const NybbleAttentionArgs* a, int64_t number) {
    keys = static_cast<uint8_t*>(a->packed) + number * nybble_attention8_block(a->head_dim, a->value_dim);
    values = keys + kKeys * key_row(a);
    key_scale = reinterpret_cast<float*>(values + kKeys * kBytes * value_row(a));
    key_sum = reinterpret_cast<int32_t*>(key_scale + kKeys);
    value_scale = reinterpret_cast<float*>(key_sum + kKeys);
    nan = reinterpret_cast<int32_t*>(value_scale + value_row(a));
  }
};

constexpr float kLeastScaled = 0x1p-100f;  // numbers below are 0

NYBBLE_INLINE VI magnitude_bits(VF a) { return vi_and(vi_of_bits(a), vi_set1(0x7fffffff)); }
// Lanes that are NaN or infinite become 0.
NYBBLE_INLINE VF finite(VF a) {
  const VF zero = vf_set1(0.0f);
  return vf_where_less(magnitude_bits(a), vi_of_bits(vf_set1(INFINITY)), a, zero);
}
NYBBLE_INLINE VI larger(VI a, VI b) { return vi_of_bits(vf_where_less(a, b, vf_of_bits(b), vf_of_bits(a))); }
NYBBLE_INLINE bool any_infinite(VF a) { return vf_any_unlike(finite(a), a); }

// factor / most; 0 where `most` is too small to scale by.
NYBBLE_INLINE VF part_of(float factor, VF most) {
  const VF small = vf_set1(kLeastScaled), zero = vf_set1(0.0f);
  return vf_where_less(vi_of_bits(most), vi_of_bits(small), zero, vf_div(vf_set1(factor), vf_max(most, small)));
}

// Calls part(d, lanes) for each vector of a row.
template <class Part>
NYBBLE_INLINE void each_part(int64_t width, const Part& part) {
  int64_t d = 0;
  for (; d + W <= width; d += W) part(d, W);
  if (d < width) part(d, width - d);
}

// A number for each lane to choose code by.
template <int kDtype>
struct Kind {
  static constexpr int dtype = kDtype;
};
template <class Run>
inline void with_kind(int dtype, const Run& run) {
  if (dtype == NYBBLE_F32) return run(Kind<NYBBLE_F32>{});
  if (dtype == NYBBLE_BF16) return run(Kind<NYBBLE_BF16>{});
  if (dtype == NYBBLE_F16) return run(Kind<NYBBLE_F16>{});
  run(Kind<NYBBLE_S8>{});
}

// Up to W rows as they are stored: what is found of each is in the lanes. So many rows at a time, since the loads of
// one do not wait for the sums over another.
template <int kDtype>
struct Batch {
  int64_t width;
  int rows = 0;
  const uint8_t* at[W] = {};
  float scale[W] = {};

  void add(const Stored& of, int64_t row) {
    at[rows] = element(of.base, row * of.stride, kv_bytes(kDtype));
    if (kDtype == NYBBLE_S8) scale[rows] = of.scale[row * of.scale_stride];
    rows++;
  }
  VF load(int row, int64_t d, int64_t lanes) const {
    const VF read = load_kv(at[row] + d * kv_bytes(kDtype), kDtype, lanes);
    return kDtype == NYBBLE_S8 ? vf_mul(read, vf_set1(scale[row])) : read;
  }
  // Less `center`, if there is one.
  VF load(int row, int64_t d, int64_t lanes, const float* center) const {
    const VF read = load(row, d, lanes);
    return center ? vf_sub(read, vf_load(center + d)) : read;
  }
};

template <int kDtype>
NYBBLE_INLINE Batch<kDtype> batch_of(const Stored& of, int64_t begin, int64_t end) {
  Batch<kDtype> batch{of.width};
  for (int64_t row = begin; row < end && batch.rows < W; row++) batch.add(of, row);
  return batch;
}

// The largest magnitudes of rows less `center`; NaN where one is NaN or infinite.
template <int kDtype>
inline VF largest(const Batch<kDtype>& batch, const float* center) {
  VF rows[W];
  for (int i = 0; i < W; i++) {
    VI most = vi_set1(0);
    if (i < batch.rows)
      each_part(batch.width, [&](int64_t d, int64_t lanes) __attribute__((always_inline)) {
        most = larger(most, magnitude_bits(batch.load(i, d, lanes, center)));
      });
    rows[i] = vf_of_bits(most);
  }
  vf_transpose(rows);
  VI most = vi_of_bits(rows[0]);
#pragma GCC unroll 16
  for (int i = 1; i < W; i++) most = larger(most, vi_of_bits(rows[i]));
  return vf_where_less(most, vi_of_bits(vf_set1(INFINITY)), vf_of_bits(most), vf_set1(NAN));
}

// Writes the codes of rows less `center`, `stride` bytes apart, but for those with NaN as `most`; returns their sums.
template <int kFormat, int kDtype>
inline VI store_rows8(const Batch<kDtype>& batch, const float* center, VF most, uint8_t* to, int64_t stride) {
  float factors[W], known[W];
  vf_store(factors, part_of(127.0f, most));
  vf_store(known, most);
  VF sums[W];
  for (int i = 0; i < W; i++) {
    VI sum = vi_set1(0);
    if (i < batch.rows && !isnan(known[i])) {
      const VF factor = vf_set1(factors[i]);
      uint8_t* row = to + i * stride;
      each_part(batch.width, [&](int64_t d, int64_t lanes) __attribute__((always_inline)) {
        const VI codes = vi_round(vf_mul(batch.load(i, d, lanes, center), factor));
        store_codes<kFormat>(row + d * nybble_panel_element(kFormat), codes);
        sum = vi_add(sum, codes);
      });
    }
    sums[i] = vf_of_bits(sum);
  }
  vf_transpose(sums);
  VI sum = vi_of_bits(sums[0]);
#pragma GCC unroll 16
  for (int i = 1; i < W; i++) sum = vi_add(sum, vi_of_bits(sums[i]));
  return sum;
}

template <int kDtype>
inline void find_center(const NybbleAttentionArgs* a, const Stored& keys, float* center) {
  const int64_t row = nybble_attention_row(a->head_dim);
  for (int64_t d = 0; d < row; d++) center[d] = 0.0f;
  float total = 0.0f;
  for (int64_t key = 0; key < a->keys; key += W) {
    const Batch<kDtype> batch = batch_of<kDtype>(keys, key, a->keys);
    const VF most = largest<kDtype>(batch, nullptr);
    float weights[W], known[W];
    vf_store(weights, part_of(1.0f, most));
    vf_store(known, most);
    for (int i = 0; i < batch.rows; i++) {
      if (!(known[i] >= kLeastScaled)) weights[i] = 0.0f;
      total += weights[i];
    }
    each_part(a->head_dim, [&](int64_t d, int64_t lanes) __attribute__((always_inline)) {
      VF sum = vf_load(center + d);
      for (int i = 0; i < batch.rows; i++)
        if (weights[i] > 0.0f) sum = vf_fma(batch.load(i, d, lanes), vf_set1(weights[i]), sum);
      vf_store(center + d, sum);
    });
  }
  const VF part = vf_set1(total > 0.0f ? 1.0f / total : 0.0f);
  for (int64_t d = 0; d < a->head_dim; d += W) vf_store(center + d, vf_mul(vf_load(center + d), part));
}

template <int kDtype>
inline void pack_keys(const NybbleAttentionArgs* a, const Stored& keys, const float* center, int64_t begin, int64_t end,
                      const Block& to) {
  const int64_t row = Block::key_row(a);
  memset(to.keys, 0, static_cast<size_t>(kKeys * row));
  *to.nan = 0;
  for (int64_t i = 0; i < end - begin; i += W) {
    const Batch<kDtype> batch = batch_of<kDtype>(keys, begin + i, end);
    const VF most = largest<kDtype>(batch, center);
    if (vf_has_nan(most)) *to.nan = 1;
    vf_store(to.key_scale + i, vf_div(most, vf_set1(127.0f)));
    const VI sum = store_rows8<Codes::kKeysAs, kDtype>(batch, center, most, to.keys + i * row, row);
    vi_store(to.key_sum + i, vi_mul(sum, vi_set1(-Codes::kOffset)));
  }
}

// N vectors of columns from d on, the last one `count` lanes wide.
template <int kDtype, int N>
inline void pack_columns(const Stored& values, int64_t begin, int64_t end, int64_t d, int64_t count, const Block& to,
                         int64_t row) {
  const int64_t keys = end - begin;
  const auto load = [&](int64_t i, int n) __attribute__((always_inline)) {
    Batch<kDtype> one{values.width};
    one.add(values, begin + i);
    return one.load(0, d + n * W, N == 1 ? count : W);
  };
  VI most[N];
#pragma GCC unroll 4
  for (int n = 0; n < N; n++) most[n] = vi_set1(0);
  for (int64_t i = 0; i < keys; i++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) most[n] = larger(most[n], magnitude_bits(load(i, n)));
  for (int n = 0; n < N; n++) {
    const bool infinite = any_infinite(vf_of_bits(most[n]));
    if (infinite) {
      most[n] = vi_set1(0);
      *to.nan = 1;
    }
    for (int64_t i = 0; i < keys && infinite; i++) {
      most[n] = larger(most[n], magnitude_bits(finite(load(i, n))));
      if (any_infinite(load(i, n))) to.key_scale[i] = NAN;
    }
  }
  VF factor[N];
#pragma GCC unroll 4
  for (int n = 0; n < N; n++) {
    factor[n] = part_of(127.0f, vf_of_bits(most[n]));
    vf_store(to.value_scale + d + n * W, vf_div(vf_of_bits(most[n]), vf_set1(127.0f)));
  }
  for (int64_t i = 0; i < kKeys; i += Codes::kCodes)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
      VI codes[Codes::kCodes];
#pragma GCC unroll 4
      for (int j = 0; j < Codes::kCodes; j++)
        codes[j] = i + j < keys ? vi_round(vf_mul(finite(load(i + j, n)), factor[n])) : vi_set1(0);
      vi_store(to.values + (i / Codes::kCodes * row + d + n * W) * 4, Codes::value_word(codes));
    }
}

template <int kDtype, int N>
inline void pack_values(const Stored& values, int64_t begin, int64_t end, int64_t d, const Block& to, int64_t row) {
  for (; values.width - d >= N * W; d += N * W) pack_columns<kDtype, N>(values, begin, end, d, W, to, row);
  if constexpr (N > 1)
    pack_values<kDtype, N / 2>(values, begin, end, d, to, row);
  else if (d < values.width)
    pack_columns<kDtype, 1>(values, begin, end, d, values.width - d, to, row);
}

template <int kDtype>
inline void pack_all(const NybbleAttentionArgs* a) {
  float* center = static_cast<float*>(a->scratch);
  const Stored keys{a->k, a->k_token, a->head_dim, a->k_scale, a->k_scale_token};
  const Stored values{a->v, a->v_token, a->value_dim, a->v_scale, a->v_scale_token};
  find_center<kDtype>(a, keys, center);
  for (int64_t begin = 0; begin < a->keys; begin += kKeys) {
    const int64_t end = begin + kKeys < a->keys ? begin + kKeys : a->keys, row = Block::value_row(a);
    const Block to(a, begin / kKeys);
    pack_keys<kDtype>(a, keys, center, begin, end, to);
    pack_values<kDtype, 4>(values, begin, end, 0, to, row);
    to.value_scale[a->value_dim] = 1.0f;  // the column that sums up the weights
    for (int64_t i = 0; i < kKeys / Codes::kCodes; i++)
      memcpy(to.values + (i * row + a->value_dim) * 4, &Codes::kOnes, 4);
  }
}

inline NybbleStatus pack(const NybbleAttentionArgs* a) {
  with_kind(kv_dtype(a), [&](auto kind) { pack_all<decltype(kind)::dtype>(a); });
  return NYBBLE_OK;
}

// The codes of a tile's queries, [depth][V][W] words, and their scales times `scale`.
template <int V, int kDtype>
inline void pack_queries(const NybbleAttentionArgs* a, const Tile& tile, float scale, float* scales, float* memory) {
  const int64_t words = (a->head_dim + 15) / 16 * 16 / Codes::kCodes, padded = words + W;
  memset(memory, 0, static_cast<size_t>(V * W * padded * 4));
  Column at(a, tile.column);
  for (int v = 0; v < V; v++) {
    Batch<kDtype> batch{a->head_dim};
    for (int i = v * W; i < tile.count && batch.rows < W; i++) {
      batch.add({a->q, 1, a->head_dim, nullptr, 0}, at.head * a->q_head + at.query * a->q_token);
      if (i + 1 < tile.count) at.next(a);
    }
    const VF most = largest<kDtype>(batch, nullptr);
    float* rows = memory + v * W * padded;
    vf_store(scales + v * W, vf_mul(vf_div(most, vf_set1(127.0f)), vf_set1(scale)));
    store_rows8<Codes::kQueries, kDtype>(batch, nullptr, most, reinterpret_cast<uint8_t*>(rows), padded * 4);
    for (int64_t word = 0; word < words; word += W) {
      VF block[W];
      for (int i = 0; i < W; i++) block[i] = vf_load(rows + i * padded + word);
      vf_transpose(block);
      for (int i = 0; i < W && word + i < words; i++) vf_store(tile.q + ((word + i) * V + v) * W, block[i]);
    }
  }
}

}  // namespace
