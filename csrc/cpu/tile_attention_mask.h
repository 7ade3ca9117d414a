// The mask of a tile of columns and a block of keys: as numbers to add to the scores. Keys at the ends of a block that
// no column sees are left out of it, so that padding costs nothing.
#pragma once

#include "tile_columns.h"

namespace {

// Bytes of an element of the mask; the dtype of an additive one.
inline int64_t mask_bytes(int kind) { return kind == NYBBLE_MASK_BOOL ? 1 : kind == NYBBLE_MASK_F32 ? 4 : 2; }
inline int mask_dtype(int kind) { return kind - NYBBLE_MASK_F32 + NYBBLE_F32; }

// The first min(count, W) elements, `stride` apart, as numbers to add; the other lanes are not defined.
inline VF mask_at(const uint8_t* from, int kind, int64_t stride, int64_t count) {
  const int64_t bytes = mask_bytes(kind);
  uint8_t copied[W * 4] = {};
  if (stride != 1 || (kind == NYBBLE_MASK_BOOL && count < W)) {
    for (int64_t i = 0; i < count && i < W; i++) memcpy(copied + i * bytes, from + i * stride * bytes, bytes);
    from = copied;
  }
  if (kind != NYBBLE_MASK_BOOL) return vf_load_as(from, mask_dtype(kind), count);
  const VI hidden = vi_sub(vi_min(vi_load_u8(from), vi_set1(1)), vi_set1(1));  // -1 where the key is not seen
  return vf_of_bits(vi_and(hidden, vi_of_bits(vf_set1(-INFINITY))));
}

template <int V>
struct Mask {
  const NybbleAttentionArgs* a;
  float* bias;  // [keys] if all columns have the same, else [keys][V * W]
  bool same;
  const uint8_t* rows[V * W];  // of each column

  Mask(const NybbleAttentionArgs* args, const Tile& tile, float* scratch) : a(args), bias(scratch), same(true), rows() {
    if (!a->mask_kind) return;
    Column at(a, tile.column);
    for (int i = 0; i < V * W; i++) {
      rows[i] = element(a->mask, at.head * a->mask_head + at.query * a->mask_query, mask_bytes(a->mask_kind));
      same &= rows[i] == rows[0];
      if (i + 1 < tile.count) at.next(a);
    }
  }

  // Whether any column sees the key that is `at` keys after the first of the block.
  bool seen(int64_t at) const {
    if (same) return !(bias[at] == -INFINITY);
    bool any = false;
    for (int v = 0; v < V; v++) any |= vf_any_unlike(vf_load(bias + (at * V + v) * W), vf_set1(-INFINITY));
    return any;
  }

  // Loads the block from `begin` to before `end`, and leaves out keys at its ends; false if none is left.
  bool load(int64_t& begin, int64_t& end) {
    const int64_t from = begin * a->mask_key * mask_bytes(a->mask_kind);
    const int64_t step = W * a->mask_key * mask_bytes(a->mask_kind), keys = end - begin;
    for (int64_t key = 0, at = from; key < keys; key += W, at += step) {
      if (same) {
        vf_store(bias + key, mask_at(rows[0] + at, a->mask_kind, a->mask_key, keys - key));
        continue;
      }
      for (int v = 0; v < V; v++) {
        VF block[W];
        for (int i = 0; i < W; i++) block[i] = mask_at(rows[v * W + i] + at, a->mask_kind, a->mask_key, keys - key);
        vf_transpose(block);
        for (int i = 0; i < W && key + i < keys; i++) vf_store(bias + ((key + i) * V + v) * W, block[i]);
      }
    }
    int64_t first = 0, last = keys;
    while (first < last && !seen(first)) first++;
    while (first < last && !seen(last - 1)) last--;
    bias += same ? first : first * V * W;
    end = begin + last;
    begin += first;
    return begin < end;
  }

  void add(int64_t keys, float* scores) const {
    for (int64_t key = 0; key < keys; key++)
      for (int v = 0; v < V; v++) {
        float* to = scores + (key * V + v) * W;
        vf_store(to, vf_add(vf_load(to), same ? vf_set1(bias[key]) : vf_load(bias + (key * V + v) * W)));
      }
  }
};

}  // namespace
