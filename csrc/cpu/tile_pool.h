// Pools of images whose channels are adjacent: the largest or the mean of the
// pixels of a window; of codes, the largest byte. Bound by reading x. Include
// after tile_conv.h.
#pragma once

#include "tile_conv.h"

namespace {

template <int kDtype, bool kMax>
inline void pool_pixel(const NybblePoolArgs& a, const uint8_t* x, uint8_t* y, Seen& seen) {
  constexpr int64_t bytes = kDtype == NYBBLE_F32 ? 4 : 2;
  for (int64_t c = 0; c < a.channels; c += W) {
    const int64_t lanes = a.channels - c < W ? a.channels - c : W;
    VF v = kMax ? vf_load_as(x + c * bytes, kDtype, lanes) : vf_set1(0.0f);
    for (int64_t i = 0; i < a.rows; i++)
      for (int64_t j = 0; j < a.columns; j++) {
        const VF one = vf_load_as(x + (i * a.row + j * a.column + c) * bytes, kDtype, lanes);
        v = kMax ? vf_max(v, one) : vf_add(v, one);
      }
    store_seen<kDtype>(kMax ? v : vf_mul(v, vf_set1(a.factor)), y + c * bytes, lanes, seen);
  }
}

template <int kDtype, bool kMax>
inline NybbleStatus pool_pixels(const NybblePoolArgs& a) {
  constexpr int64_t bytes = kDtype == NYBBLE_F32 ? 4 : 2;
  Seen seen;
  for (int64_t i = 0; i < a.count; i++)
    pool_pixel<kDtype, kMax>(a, static_cast<const uint8_t*>(a.x) + i * a.step * bytes,
                             static_cast<uint8_t*>(a.y) + i * a.channels * bytes, seen);
  if (a.range) extend_by(seen, *a.range);
  return NYBBLE_OK;
}

// Vectors of bytes, which the compiler splits where they are shorter.
typedef uint8_t Bytes __attribute__((vector_size(64)));

template <class T>
inline void most_codes(const NybblePoolArgs& a, const uint8_t* x, uint8_t* y) {
  T most;
  memcpy(&most, x, sizeof(T));
  for (int64_t i = 0; i < a.rows; i++)
    for (int64_t j = 0; j < a.columns; j++) {
      T one;
      memcpy(&one, x + i * a.row + j * a.column, sizeof(T));
      most = one > most ? one : most;
    }
  memcpy(y, &most, sizeof(T));
}

inline NybbleStatus pool_codes(const NybblePoolArgs& a) {
  constexpr int64_t step = sizeof(Bytes);
  if (a.pool != NYBBLE_POOL_MAX) return NYBBLE_UNSUPPORTED;
  for (int64_t i = 0; i < a.count; i++) {
    const uint8_t* x = static_cast<const uint8_t*>(a.x) + i * a.step;
    uint8_t* y = static_cast<uint8_t*>(a.y) + i * a.channels;
    int64_t c = 0;
    for (; c + step <= a.channels; c += step) most_codes<Bytes>(a, x + c, y + c);
    for (; c < a.channels; c++) most_codes<uint8_t>(a, x + c, y + c);
  }
  return NYBBLE_OK;
}

template <int kDtype>
inline NybbleStatus pool_dtype(const NybblePoolArgs& a) {
  return a.pool == NYBBLE_POOL_MAX ? pool_pixels<kDtype, true>(a) : pool_pixels<kDtype, false>(a);
}

inline NybbleStatus pool(const NybblePoolArgs* a) {
  if (a->dtype == NYBBLE_U8) return pool_codes(*a);
  if (a->dtype == NYBBLE_F32) return pool_dtype<NYBBLE_F32>(*a);
  if (a->dtype == NYBBLE_BF16) return pool_dtype<NYBBLE_BF16>(*a);
  return a->dtype == NYBBLE_F16 ? pool_dtype<NYBBLE_F16>(*a) : NYBBLE_UNSUPPORTED;
}

}  // namespace
