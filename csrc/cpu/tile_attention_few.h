// Attention for a few columns, as when a model generates: keys and values are read once, head_dim in the lanes.
//
// Sums of W keys and columns together are added up over the lanes by one tree, so that a vector of scores holds W / N
// keys of N columns: lane r * N + n. With more columns than lanes, several vectors hold one key. The values of a key
// are multiplied with one weight for each column. Bound by reading keys and values; in the caches by the multiply-adds,
// 2 head_dim / W a key and column. Measured on one core of Zen 5, from the level-3 cache: 108 GB/s of 115 with one
// column, 87 to 95 with four (AVX2: 109, 44 to 48).
#pragma once

#include "tile_attention_mask.h"

namespace {

constexpr int64_t kFewKeys = 256;  // of a block
static_assert(kFewKeys * NYBBLE_ATTENTION_FEW <= kKeys * NYBBLE_ATTENTION_COLUMNS, "the scratch is too small");

// Keys that are multiplied with N columns at a time, and vectors of their scores.
constexpr int few_keys(int n) { return n < W ? W / n : 1; }
constexpr int few_vectors(int n) { return n < W ? 1 : n / W; }

// What is kept of the columns between blocks.
struct Few {
  float *q, *o, *most, *sum;  // [N][q_row], [N][o_row], [N], [N]
  int64_t q_row, o_row;
};

template <int kDtype>
NYBBLE_INLINE const uint8_t* row_of(const void* base, int64_t row, int64_t stride) {
  return element(base, row * stride, kv_bytes(kDtype));
}

// few_keys(N) keys by N columns; keys beyond `left` are read as the last one.
template <int kDtype, int N, int S>
NYBBLE_INLINE void few_scores(const NybbleAttentionArgs* a, const Few& few, int64_t key, int64_t left,
                              VF (&scores)[S]) {
  constexpr int R = few_keys(N), kBytes = kv_bytes(kDtype);
  const uint8_t* rows[R];
  VF acc[S][W];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) rows[r] = row_of<kDtype>(a->k, key + (r < left ? r : left - 1), a->k_token);
#pragma GCC unroll 16
  for (int i = 0; i < S * W; i++) acc[i / W][i % W] = vf_set1(0.0f);
  const auto step = [&](int64_t d, int64_t count) __attribute__((always_inline)) {
    VF q[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) q[n] = vf_load(few.q + n * few.q_row + d);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const VF k = load_kv(rows[r] + d * kBytes, kDtype, count);
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) {
        VF& sum = acc[(r * N + n) / W][(r * N + n) % W];
        sum = vf_fma_fast(q[n], k, sum);
      }
    }
  };
  int64_t d = 0;
  for (; d + W <= a->head_dim; d += W) step(d, W);
  if (d < a->head_dim) step(d, a->head_dim - d);
#pragma GCC unroll 2
  for (int s = 0; s < S; s++) scores[s] = vf_sum_each(acc[s]);
}

// o[n][d] = o[n][d] * keep[n] + sum_key p[key][n] v[key][d] for C vectors from d on, the last one `count` lanes wide.
template <int kDtype, int N, int C>
NYBBLE_INLINE void few_values(const NybbleAttentionArgs* a, const Few& few, const float* p, int64_t begin, int64_t end,
                              const float* keep, int64_t d, int64_t count) {
  constexpr int kBytes = kv_bytes(kDtype);
  VF acc[N][C];
#pragma GCC unroll 8
  for (int n = 0; n < N; n++)
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) acc[n][c] = vf_set1(0.0f);
  const uint8_t* from = row_of<kDtype>(a->v, begin, a->v_token) + d * kBytes;
  for (int64_t key = begin; key < end; key++, p += N, from += a->v_token * kBytes) {
    VF x[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) x[c] = load_kv(from + c * W * kBytes, kDtype, C == 1 ? count : W);
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) {
      const VF one = vf_set1(p[n]);
#pragma GCC unroll 8
      for (int c = 0; c < C; c++) acc[n][c] = vf_fma_fast(one, x[c], acc[n][c]);
    }
  }
#pragma GCC unroll 8
  for (int n = 0; n < N; n++)
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) {
      float* to = few.o + n * few.o_row + d + c * W;
      vf_store(to, vf_fma_fast(vf_load(to), vf_set1(keep[n]), acc[n][c]));
    }
}

template <int kDtype, int N, int C>
inline void all_few_values(const NybbleAttentionArgs* a, const Few& few, const float* p, int64_t begin, int64_t end,
                           const float* keep, int64_t d) {
  for (; a->value_dim - d >= C * W; d += C * W) few_values<kDtype, N, C>(a, few, p, begin, end, keep, d, W);
  if constexpr (C > 1)
    all_few_values<kDtype, N, C / 2>(a, few, p, begin, end, keep, d);
  else if (d < a->value_dim)
    few_values<kDtype, N, 1>(a, few, p, begin, end, keep, d, a->value_dim - d);
}

// Adds mask, slopes and -inf for keys that a column does not see to the scores of keys from begin to before end.
template <int N>
struct FewHiding {
  static constexpr int R = few_keys(N), kLanes = R * N;
  const NybbleAttentionArgs* a;
  const Tile& tile;
  float* bias;                         // [kFewKeys][N]
  int32_t low[kLanes], limit[kLanes];  // of each lane, less its key's place among R
  float slopes[kLanes], places[kLanes];

  // last: the keys of this call end before it.
  FewHiding(const NybbleAttentionArgs* args, const Tile& of, int64_t last, float* scratch)
      : a(args), tile(of), bias(scratch), low(), limit(), slopes(), places() {
    Column at(a, tile.column);
    for (int n = 0; n < N; n++) {
      for (int r = 0; r < R; r++) {
        low[r * N + n] = tile.low[n] - r;
        limit[r * N + n] = static_cast<int32_t>(tile.limit[n] < last ? tile.limit[n] : last) - r;
        slopes[r * N + n] = a->slopes ? a->slopes[at.head] : 0.0f;
        places[r * N + n] = static_cast<float>(a->keys - a->queries + at.query - r);
      }
      if (n + 1 < tile.count) at.next(a);
    }
  }

  void load(int64_t begin, int64_t end) {
    if (!a->mask_kind) return;
    const int64_t bytes = mask_bytes(a->mask_kind), keys = end - begin;
    Column at(a, tile.column);
    for (int n = 0; n < N; n++) {
      const uint8_t* from =
          element(a->mask, at.head * a->mask_head + at.query * a->mask_query + begin * a->mask_key, bytes);
      for (int64_t key = 0; key < keys; key += W) {
        float lanes[W];
        vf_store(lanes, mask_at(from + key * a->mask_key * bytes, a->mask_kind, a->mask_key, keys - key));
        for (int i = 0; i < W && key + i < keys; i++) bias[(key + i) * N + n] = lanes[i];
      }
      if (n + 1 < tile.count) at.next(a);
    }
  }

  // The s-th vector of R keys from `key` on, `at` keys after the first of the block.
  VF hide(VF scores, int s, int64_t key, int64_t at) const {
    const VI here = vi_set1(static_cast<int32_t>(key));
    if (a->mask_kind) scores = vf_add(scores, vf_load(bias + at * N + s * W));
    if (a->slopes) {
      const VF distance = vf_sub(vf_set1(static_cast<float>(key)), vf_load(places + s * W));
      scores = vf_fma_fast(vf_load(slopes + s * W), distance, scores);
    }
    scores = vf_where_less(here, vi_load(limit + s * W), scores, vf_set1(-INFINITY));
    return vf_where_less(here, vi_load(low + s * W), vf_set1(-INFINITY), scores);
  }
};

// The largest, or the sum, of the lanes of each column.
template <int N, int S>
NYBBLE_INLINE void fold_most(const VF (&lanes)[S], float* most) {
  float each[S * W];
  for (int s = 0; s < S; s++) vf_store(each + s * W, lanes[s]);
  for (int i = 0; i < S * W; i++) most[i % N] = each[i] > most[i % N] ? each[i] : most[i % N];
}
template <int N, int S>
NYBBLE_INLINE void fold_sum(const VF (&lanes)[S], float* sum) {
  float each[S * W];
  for (int s = 0; s < S; s++) vf_store(each + s * W, lanes[s]);
  for (int i = 0; i < S * W; i++) sum[i % N] += each[i];
}
template <int N, int S>
NYBBLE_INLINE void repeat(const float* of, VF (&lanes)[S]) {
  float each[S * W];
  for (int i = 0; i < S * W; i++) each[i] = of[i % N];
  for (int s = 0; s < S; s++) lanes[s] = vf_load(each + s * W);
}

// The scales of int8 keys or values of a block, each N times.
template <int N>
struct FewScales {
  float of[kFewKeys * N + W];
  void load(const float* scale, int64_t stride, int64_t begin, int64_t keys) {
    for (int64_t key = 0; key < keys; key++)
      for (int n = 0; n < N; n++) of[key * N + n] = scale[(begin + key) * stride];
    vf_store(of + keys * N, vf_set1(0.0f));
  }
  VF at(int64_t key, int s) const { return vf_load(of + key * N + s * W); }
};

// Scores to weights of the values; `top` has the largest of each lane. What earlier sums are to be multiplied with is
// left in `keep`.
template <int N, int S>
NYBBLE_INLINE void weigh_few(const Few& few, int64_t keys, const VF (&top)[S], float* scores, float (&keep)[S * W]) {
  VF before[S], most[S], sum[S];
  repeat<N>(few.most, before);
  fold_most<N>(top, few.most);
  repeat<N>(few.most, most);
#pragma GCC unroll 2
  for (int s = 0; s < S; s++) sum[s] = vf_set1(0.0f);
  for (int64_t at = 0; at < keys * N; at += S * W)
#pragma GCC unroll 2
    for (int s = 0; s < S; s++) {
      const VF p = exp_of_difference(vf_load(scores + at + s * W), most[s]);
      vf_store(scores + at + s * W, p);
      sum[s] = vf_add(sum[s], p);
    }
  for (int s = 0; s < S; s++) vf_store(keep + s * W, exp_of_difference(before[s], most[s]));
  for (int n = 0; n < N; n++) few.sum[n] *= keep[n];
  fold_sum<N>(sum, few.sum);
}

template <int kDtype, int N>
inline void run_few(const NybbleAttentionArgs* a, const Shared& shared, const Tile& tile, const Few& few) {
  constexpr int R = few_keys(N), S = few_vectors(N), kMost = kRegisters / 2 / N, C = kMost > 8 ? 8 : kMost;
  constexpr bool kCodes = kDtype == NYBBLE_S8;
  const int64_t first = a->key_begin > tile.first ? a->key_begin : tile.first;
  const int64_t last = a->key_end < tile.last ? a->key_end : tile.last;
  FewHiding<N> hiding(a, tile, last, shared.bias);
  [[maybe_unused]] FewScales<N> scales;
  for (int64_t begin = first; begin < last; begin += kFewKeys) {
    const int64_t end = begin + kFewKeys < last ? begin + kFewKeys : last, keys = end - begin;
    hiding.load(begin, end);
    if constexpr (kCodes) scales.load(a->k_scale, a->k_scale_token, begin, keys);
    VF top[S], scores[S];
#pragma GCC unroll 2
    for (int s = 0; s < S; s++) top[s] = vf_set1(kLowest);
    for (int64_t at = 0; at < keys; at += R) {
      few_scores<kDtype, N>(a, few, begin + at, keys - at, scores);
#pragma GCC unroll 2
      for (int s = 0; s < S; s++) {
        if constexpr (kCodes) scores[s] = vf_mul(scores[s], scales.at(at, s));
        scores[s] = hiding.hide(scores[s], s, begin + at, at);
        top[s] = vf_max(scores[s], top[s]);
        vf_store(shared.scores + at * N + s * W, scores[s]);
      }
    }
    float keep[S * W];
    weigh_few<N>(few, keys, top, shared.scores, keep);
    if constexpr (kCodes) {
      scales.load(a->v_scale, a->v_scale_token, begin, keys);
      for (int64_t at = 0; at < keys; at += R)
#pragma GCC unroll 2
        for (int s = 0; s < S; s++) {
          float* of = shared.scores + at * N + s * W;
          vf_store(of, vf_mul(vf_load(of), scales.at(at, s)));
        }
    }
    all_few_values<kDtype, N, C>(a, few, shared.scores, begin, end, keep, 0);
  }
}

template <int N>
inline void run_few_as(const NybbleAttentionArgs* a, const Shared& shared, const Tile& tile, const Few& few) {
  switch (kv_dtype(a)) {
    case NYBBLE_F32:
      return run_few<NYBBLE_F32, N>(a, shared, tile, few);
    case NYBBLE_BF16:
      return run_few<NYBBLE_BF16, N>(a, shared, tile, few);
    case NYBBLE_F16:
      return run_few<NYBBLE_F16, N>(a, shared, tile, few);
    default:
      return run_few<NYBBLE_S8, N>(a, shared, tile, few);
  }
}

// Columns rounded up to a number that a kernel is made for.
inline int few_width(int64_t columns) { return columns > 4 ? 8 : columns > 2 ? 4 : static_cast<int>(columns); }

// Where `n` columns keep their sums in a part's memory.
NYBBLE_INLINE Few few_in(const NybbleAttentionArgs* a, int n, float* memory) {
  const int64_t row = nybble_attention_row(a->value_dim);
  return {nullptr, memory, memory + n * row, memory + n * row + n, 0, row};
}

inline void start_few(const NybbleAttentionArgs* a, int n, Few& few) {
  const int64_t bytes = element_bytes(a);
  Column at(a, a->column_begin);
  for (int i = 0; i < n; i++) {
    const uint8_t* from = element(a->q, at.head * a->q_head + at.query * a->q_token, bytes);
    for (int64_t d = 0; d < a->head_dim; d += W)
      vf_store(few.q + i * few.q_row + d,
               vf_mul(vf_load_as(from + d * bytes, a->dtype, a->head_dim - d), vf_set1(a->scale)));
    for (int64_t d = 0; d < few.o_row; d++) few.o[i * few.o_row + d] = 0.0f;
    few.most[i] = kLowest;
    few.sum[i] = 0.0f;
    if (a->column_begin + i + 1 < a->column_end) at.next(a);
  }
}

inline void store_few(const NybbleAttentionArgs* a, const Few& few) {
  const int64_t bytes = element_bytes(a);
  Column at(a, a->column_begin);
  for (int64_t i = 0; i < a->column_end - a->column_begin; i++, at.next(a)) {
    uint8_t* to = static_cast<uint8_t*>(a->y) + (at.head * a->y_head + at.query * a->y_token) * bytes;
    const VF part = vf_div(vf_set1(1.0f), vf_max(vf_set1(0x1p-126f), vf_set1(few.sum[i])));
    for (int64_t d = 0; d < a->value_dim; d += W)
      vf_store_as(to + d * bytes, a->dtype, vf_mul(vf_load(few.o + i * few.o_row + d), part), a->value_dim - d);
  }
}

// Adds up what the parts of the keys left, in their order.
inline NybbleStatus merge_few(const NybbleAttentionArgs* a) {
  const int n = few_width(a->column_end - a->column_begin);
  const auto part = [&](int64_t i) {
    return few_in(a, n, static_cast<float*>(a->partial) + i * (nybble_attention_partial(a->value_dim) / 4));
  };
  const Few all = part(0);
  for (int64_t i = 1; i < a->parts; i++) {
    const Few one = part(i);
    for (int c = 0; c < n; c++) {
      const VF before = vf_set1(all.most[c]), other = vf_set1(one.most[c]), most = vf_max(before, other);
      const VF keep = exp_of_difference(before, most), add = exp_of_difference(other, most);
      float lanes[W];
      vf_store(lanes, vf_add(vf_mul(vf_set1(all.sum[c]), keep), vf_mul(vf_set1(one.sum[c]), add)));
      all.sum[c] = lanes[0];
      vf_store(lanes, most);
      all.most[c] = lanes[0];
      for (int64_t d = 0; d < a->value_dim; d += W) {
        float* to = all.o + c * all.o_row + d;
        vf_store(to, vf_fma_fast(vf_load(to), keep, vf_mul(vf_load(one.o + c * one.o_row + d), add)));
      }
    }
  }
  store_few(a, all);
  return NYBBLE_OK;
}

inline NybbleStatus attention_few(const NybbleAttentionArgs* a) {
  Carver carver{static_cast<float*>(a->scratch)};
  const Shared shared{carver.take(kKeys * NYBBLE_ATTENTION_COLUMNS), carver.take(kKeys * NYBBLE_ATTENTION_COLUMNS)};
  const int64_t columns = a->column_end - a->column_begin, q_row = nybble_attention_row(a->head_dim);
  const int n = few_width(columns);
  Few few = few_in(
      a, n, a->partial ? static_cast<float*>(a->partial) : carver.take(nybble_attention_partial(a->value_dim) / 4));
  few.q = carver.take(n * q_row);
  few.q_row = q_row;
  start_few(a, n, few);
  Tile tile{};
  tile.column = a->column_begin;
  tile.count = static_cast<int>(columns);
  tile.see(a);
  switch (n) {
    case 1:
      run_few_as<1>(a, shared, tile, few);
      break;
    case 2:
      run_few_as<2>(a, shared, tile, few);
      break;
    case 4:
      run_few_as<4>(a, shared, tile, few);
      break;
    default:
      run_few_as<8>(a, shared, tile, few);
  }
  if (!a->partial) store_few(a, few);
  return NYBBLE_OK;
}

}  // namespace
