// What the parts of attention share: columns, which are pairs of a head and a query, and the exponential.
#pragma once

#include <math.h>

#include "tile_inline.h"

namespace {

constexpr int64_t kKeys = NYBBLE_ATTENTION_KEYS;
constexpr int kTileVectors = W < 8 ? 16 / W : 2;  // at most: the scratch has place for tiles of 16 columns or more
// Rows of a register tile of so many vectors, beside those and one more register.
constexpr int tile_rows(int vectors) { return (kRegisters == 32 ? 24 : 12) / (vectors > 2 ? vectors : 2); }
constexpr float kLog2e = 0x1.715476p+0f;
constexpr float kLowest = -3.40282347e38f;

struct Rows {
  const float* at;
  int64_t stride;
};

// a b + c, in one rounding on every target if kFused.
template <bool kFused>
NYBBLE_INLINE VF product_and(VF a, VF b, VF c) {
  return kFused ? vf_fma(a, b, c) : vf_fma_fast(a, b, c);
}

// 2^x for x <= 0, within 2^-23; exactly 1 at 0, 0 below -126.5; NaN stays.
template <bool kFused>
NYBBLE_INLINE VF power_of_two(VF x) {
  const VF shift = vf_set1(0x1.8p23f + 127);
  x = vf_max(vf_set1(-127.0f), x);
  const VF moved = vf_add(x, shift);  // round(x) + 127 in the last bits
  const VF f = vf_sub(x, vf_sub(moved, shift));
  VF p = vf_set1(0x1.5bba14p-10f);
  p = product_and<kFused>(p, f, vf_set1(0x1.3cea88p-7f));
  p = product_and<kFused>(p, f, vf_set1(0x1.c6b752p-5f));
  p = product_and<kFused>(p, f, vf_set1(0x1.ebf9bcp-3f));
  p = product_and<kFused>(p, f, vf_set1(0x1.62e42ap-1f));
  p = product_and<kFused>(p, f, vf_set1(1.0f));
  return vf_mul(p, vf_of_bits(vi_shift_left_32<23>(vi_of_bits(moved))));
}

// e^(a - b) for a <= b.
template <bool kFused = false>
NYBBLE_INLINE VF exp_of_difference(VF a, VF b) {
  return power_of_two<kFused>(vf_mul(vf_sub(a, b), vf_set1(kLog2e)));
}

// A head and a query, in the order of columns.
struct Column {
  int64_t head, query;
  Column(const NybbleAttentionArgs* a, int64_t column) : head(column / a->queries), query(column % a->queries) {}
  void next(const NybbleAttentionArgs* a) {
    if (++query == a->queries) query = 0, head++;
  }
};

inline int64_t element_bytes(const NybbleAttentionArgs* a) { return a->dtype == NYBBLE_F32 ? 4 : 2; }

// Keys and values may be int8 codes, with a scale each.
inline int kv_dtype(const NybbleAttentionArgs* a) { return a->k_scale ? NYBBLE_S8 : a->dtype; }
constexpr int64_t kv_bytes(int dtype) { return dtype == NYBBLE_F32 ? 4 : dtype == NYBBLE_S8 ? 1 : 2; }
NYBBLE_INLINE VF load_kv(const void* p, int dtype, int64_t count) {
  return dtype == NYBBLE_S8 ? vf_load_s8(p, count) : vf_load_as(p, dtype, count);
}

inline const uint8_t* element(const void* base, int64_t index, int64_t bytes) {
  return static_cast<const uint8_t*>(base) + index * bytes;
}

// A tile of columns and what is kept of it between key blocks.
struct Tile {
  int64_t column;
  int count;                                               // columns
  int64_t first, last;                                     // keys that any of its columns sees, before the mask
  int64_t all_first, all_last;                             // keys that all of them see
  bool started;                                            // whether o holds anything
  float *q, *o, *most, *sum;                               // [head_dim][width], [value_dim][width], [width], [width]
  int32_t low[kTileVectors * W], limit[kTileVectors * W];  // a column sees the keys from low to before limit

  int vectors() const { return count <= W ? 1 : count <= 2 * W ? 2 : kTileVectors; }

  void see_all() {
    const VI begin = vi_set1(static_cast<int32_t>(first)), end = vi_set1(static_cast<int32_t>(last));
    for (int i = 0; i < kTileVectors * W; i += W) {
      vi_store(low + i, begin);
      vi_store(limit + i, end);
    }
  }

  void see(const NybbleAttentionArgs* a) {
    first = all_first = 0;
    last = all_last = a->keys;
    if (!a->causal) return see_all();
    Column at(a, column);
    first = all_last = a->keys;
    last = all_first = 0;
    for (int i = 0; i < kTileVectors * W; i++) {
      int64_t end = at.query + a->keys - a->queries + 1;
      end = end < 0 ? 0 : end;
      const int64_t begin = a->window && end > a->window ? end - a->window : 0;
      low[i] = static_cast<int32_t>(begin);
      limit[i] = static_cast<int32_t>(end);
      first = begin < first ? begin : first;
      all_first = begin > all_first ? begin : all_first;
      last = end > last ? end : last;
      all_last = end < all_last ? end : all_last;
      if (i + 1 < count) at.next(a);
    }
  }
};

// Calls run(Vectors<V>) for a tile of V vectors.
template <int V>
struct Vectors {
  static constexpr int count = V;
};
template <class Run>
inline void with_vectors(const Tile& tile, const Run& run) {
  const int vectors = tile.vectors();
  if (vectors == 1) return run(Vectors<1>{});
  if constexpr (kTileVectors > 2)
    if (vectors > 2) return run(Vectors<kTileVectors>{});
  run(Vectors<2>{});
}

constexpr int64_t kTileFloats = NYBBLE_ATTENTION_TILE / 4;
static_assert(sizeof(Tile) <= NYBBLE_ATTENTION_TILE, "the scratch is too small");

// Scratch shared by the tiles of a call.
struct Shared {
  float *scores, *bias;  // [kKeys][width]
};

// Memory of a call, taken piece by piece from its scratch.
struct Carver {
  float* free;
  float* take(int64_t count) {
    float* taken = free;
    free += count;
    return taken;
  }
};

}  // namespace
