// The epilogues of float activations, of which all K has been summed. Include after a target's vector header.
#pragma once

#include "tile_run.h"

namespace {

// y = acc * scale + bias
template <int R, int N, int V>
NYBBLE_INLINE void finish_w8a16(const NybbleLinearArgs* a, int64_t row, int64_t column, const VF (&acc)[N][V], int v) {
  const VF scale = vf_load(static_cast<const float*>(a->scale) + column), bias = bias_at(a, column);
  store_rows<R>(a, row, column, [&](int r) __attribute__((always_inline)) { return vf_fma(acc[r][v], scale, bias); });
}

// y = sum + bias; the sum has the scales of all groups.
template <int R, int V>
NYBBLE_INLINE void finish_w4a16(const NybbleLinearArgs* a, int64_t row, int64_t column, const VF (&sum)[R][V], int v) {
  const VF bias = bias_at(a, column);
  store_rows<R>(a, row, column, [&](int r) __attribute__((always_inline)) { return vf_add(sum[r][v], bias); });
}

}  // namespace
