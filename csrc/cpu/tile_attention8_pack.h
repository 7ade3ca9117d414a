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

// What multiplies numbers of at most `most` to codes.
inline float to_codes(float most) { return most < kLeastScaled ? 0.0f : 127.0f / most; }
NYBBLE_INLINE VI magnitude_bits(VF a) { return vi_and(vi_of_bits(a), vi_set1(0x7fffffff)); }
NYBBLE_INLINE VF magnitude(VF a) { return vf_of_bits(magnitude_bits(a)); }
// Lanes that are NaN or infinite become 0.
NYBBLE_INLINE VF finite(VF a) {
  const VF zero = vf_set1(0.0f);
  return vf_where_less(magnitude_bits(a), vi_of_bits(vf_set1(INFINITY)), a, zero);
}

// A row as it is stored, in units of its scale.
struct StoredRow {
  const uint8_t* at;
  int dtype;
  int64_t width;
  VF scale;
  StoredRow(const Stored& of, int as, int64_t row)
      : at(element(of.base, row * of.stride, kv_bytes(as))),
        dtype(as),
        width(of.width),
        scale(vf_set1(as == NYBBLE_S8 ? of.scale[row * of.scale_stride] : 1.0f)) {}
  VF load(int64_t d) const {
    const VF read = load_kv(at + d * kv_bytes(dtype), dtype, width - d);
    return dtype == NYBBLE_S8 ? vf_mul(read, scale) : read;
  }
};

// The largest magnitude of a row less `center`; NaN if any is NaN or infinite.
inline float largest(const StoredRow& row, const float* center, float* rest) {
  VF most = vf_set1(0.0f), nan = vf_set1(0.0f);
  for (int64_t d = 0; d < row.width; d += W) {
    VF x = row.load(d);
    nan = vf_fma(x, vf_set1(0.0f), nan);
    if (center) x = vf_sub(x, vf_load(center + d));
    vf_store(rest + d, x);
    most = vf_max(magnitude(x), most);
  }
  return vf_has_nan(nan) ? NAN : vf_most(most);
}

inline void find_center(const NybbleAttentionArgs* a, const Stored& keys, float* center, float* rest) {
  const int64_t row = nybble_attention_row(a->head_dim);
  for (int64_t d = 0; d < row; d++) center[d] = 0.0f;
  float total = 0.0f;
  for (int64_t key = 0; key < a->keys; key++) {
    const float most = largest(StoredRow(keys, kv_dtype(a), key), nullptr, rest);
    if (!(most >= kLeastScaled)) continue;
    const float weight = 1.0f / most;
    total += weight;
    for (int64_t d = 0; d < a->head_dim; d += W)
      vf_store(center + d, vf_fma(vf_load(rest + d), vf_set1(weight), vf_load(center + d)));
  }
  const VF part = vf_set1(total > 0.0f ? 1.0f / total : 0.0f);
  for (int64_t d = 0; d < row; d += W)
    vf_store(center + d, d < a->head_dim ? vf_mul(vf_load(center + d), part) : vf_set1(0.0f));
}

// Codes of `width` floats; returns their sum.
template <int kFormat>
inline int32_t store_row(const float* from, int64_t width, float factor, uint8_t* to) {
  VI sum = vi_set1(0);
  for (int64_t d = 0; d < width; d += W) {
    const VI codes = vi_first(vi_round(vf_mul(vf_load(from + d), vf_set1(factor))), width - d);
    store_codes<kFormat>(to + d * nybble_panel_element(kFormat), codes);
    sum = vi_add(sum, codes);
  }
  return vi_sum(sum);
}

inline void pack_keys(const NybbleAttentionArgs* a, const Stored& keys, const float* center, float* rest, int64_t begin,
                      int64_t end, const Block& to) {
  memset(to.keys, 0, static_cast<size_t>(kKeys * Block::key_row(a)));
  *to.nan = 0;
  for (int64_t i = 0; i < end - begin; i++) {
    const float most = largest(StoredRow(keys, kv_dtype(a), begin + i), center, rest);
    to.key_scale[i] = most / 127.0f;
    to.key_sum[i] = 0;
    if (isnan(most))
      *to.nan = 1;
    else
      to.key_sum[i] = -Codes::kOffset *
                      store_row<Codes::kKeysAs>(rest, a->head_dim, to_codes(most), to.keys + i * Block::key_row(a));
  }
}

inline void pack_values(const NybbleAttentionArgs* a, const Stored& values, int64_t begin, int64_t end,
                        const Block& to) {
  const int64_t row = Block::value_row(a);
  for (int64_t d = 0; d < a->value_dim; d += W) {
    VF most = vf_set1(0.0f);
    for (int64_t i = 0; i < end - begin; i++) {
      const VF x = StoredRow(values, kv_dtype(a), begin + i).load(d), known = finite(x);
      most = vf_max(magnitude(known), most);
      if (vf_any_unlike(known, x)) {
        to.key_scale[i] = NAN;
        *to.nan = 1;
      }
    }
    vf_store(to.value_scale + d, vf_div(most, vf_set1(127.0f)));
    const VF small = vf_set1(kLeastScaled), zero = vf_set1(0.0f);
    const VF factor =
        vf_where_less(vi_of_bits(most), vi_of_bits(small), zero, vf_div(vf_set1(127.0f), vf_max(most, small)));
    for (int64_t i = 0; i < kKeys; i += Codes::kCodes) {
      VI codes[Codes::kCodes];
      for (int j = 0; j < Codes::kCodes; j++)
        codes[j] = i + j < end - begin
                       ? vi_round(vf_mul(finite(StoredRow(values, kv_dtype(a), begin + i + j).load(d)), factor))
                       : vi_set1(0);
      vi_store(to.values + (i / Codes::kCodes * row + d) * 4, Codes::word(codes));
    }
  }
  to.value_scale[a->value_dim] = 1.0f;
  for (int64_t i = 0; i < kKeys / Codes::kCodes; i++)
    memcpy(to.values + (i * row + a->value_dim) * 4, &Codes::kOnes, 4);
}

inline NybbleStatus pack(const NybbleAttentionArgs* a) {
  Carver carver{static_cast<float*>(a->scratch)};
  const int64_t row = nybble_attention_row(a->head_dim);
  float *center = carver.take(row), *rest = carver.take(row);
  const Stored keys{a->k, a->k_token, a->head_dim, a->k_scale, a->k_scale_token};
  const Stored values{a->v, a->v_token, a->value_dim, a->v_scale, a->v_scale_token};
  find_center(a, keys, center, rest);
  for (int64_t begin = 0; begin < a->keys; begin += kKeys) {
    const int64_t end = begin + kKeys < a->keys ? begin + kKeys : a->keys;
    const Block to(a, begin / kKeys);
    pack_keys(a, keys, center, rest, begin, end, to);
    pack_values(a, values, begin, end, to);
  }
  return NYBBLE_OK;
}

// The codes of a tile's queries, [depth][V][W] words, and their scales times `scale`.
template <int V>
inline void pack_queries(const NybbleAttentionArgs* a, const Tile& tile, float scale, float* scales, float* memory) {
  const int64_t words = (a->head_dim + 15) / 16 * 16 / Codes::kCodes, padded = words + W;
  float *rest = memory, *rows = memory + nybble_attention_row(a->head_dim);
  memset(rows, 0, static_cast<size_t>(V * W * padded * 4));
  Column at(a, tile.column);
  for (int i = 0; i < V * W; i++) {
    scales[i] = 0.0f;
    if (i >= tile.count) continue;
    const Stored queries{element(a->q, at.head * a->q_head + at.query * a->q_token, element_bytes(a)), 0, a->head_dim,
                         nullptr, 0};
    const float most = largest(StoredRow(queries, a->dtype, 0), nullptr, rest);
    scales[i] = most / 127.0f * scale;
    if (!isnan(most))
      store_row<Codes::kQueries>(rest, a->head_dim, to_codes(most), reinterpret_cast<uint8_t*>(rows + i * padded));
    if (i + 1 < tile.count) at.next(a);
  }
  for (int v = 0; v < V; v++)
    for (int64_t word = 0; word < words; word += W) {
      VF block[W];
      for (int i = 0; i < W; i++) block[i] = vf_load(rows + (v * W + i) * padded + word);
      vf_transpose(block);
      for (int i = 0; i < W && word + i < words; i++) vf_store(tile.q + ((word + i) * V + v) * W, block[i]);
    }
}

}  // namespace
