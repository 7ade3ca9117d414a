// What the kernels of rows share: elements of a float dtype, and loops over a row. Include after a target's tile
// header.
#pragma once

#include <math.h>

#include "../abi.h"

namespace {

constexpr int64_t dtype_bytes(int dtype) { return dtype == NYBBLE_F32 ? 4 : 2; }

// The row `row` of a matrix; null if there is none.
template <int kDtype>
inline uint8_t* row_at(const NybbleMatrix& matrix, int64_t row) {
  return matrix.at ? static_cast<uint8_t*>(matrix.at) + row * matrix.stride * dtype_bytes(kDtype) : nullptr;
}

template <int kDtype>
inline VF load_at(const void* row, int64_t column, int64_t count) {
  return vf_load_as(static_cast<const uint8_t*>(row) + column * dtype_bytes(kDtype), kDtype, count);
}

template <int kDtype>
inline void store_at(void* row, int64_t column, VF v, int64_t count) {
  vf_store_as(static_cast<uint8_t*>(row) + column * dtype_bytes(kDtype), kDtype, v, count);
}

// Elements of a dtype that is known only when it runs.
inline VF load_any(const void* row, int32_t dtype, int64_t column, int64_t count) {
  return vf_load_as(static_cast<const uint8_t*>(row) + column * dtype_bytes(dtype), dtype, count);
}

// Rounds to the dtype and back.
template <int kDtype>
inline VF round_to(VF v) {
  if (kDtype == NYBBLE_F32) return v;
  uint16_t held[W];
  vf_store_as(held, kDtype, v, W);
  return vf_load_as(held, kDtype, W);
}

inline VF first_lanes(VF v, int64_t count) { return vf_of_bits(vi_first(vi_of_bits(v), count)); }

// Calls fn(i, column, lanes) for a row's vectors; i < kWays tells accumulators apart, which hide the latency.
constexpr int kWays = 4;
template <class Fn>
inline void each_vector(int64_t columns, const Fn& fn) {
  int64_t c = 0;
  for (; c + kWays * W <= columns; c += kWays * W) {
#pragma GCC unroll 4
    for (int i = 0; i < kWays; i++) fn(i, c + i * W, int64_t{W});
  }
  for (; c + W <= columns; c += W) fn(0, c, int64_t{W});
  if (c < columns) fn(0, c, columns - c);
}

// The sum of value(column, lanes) over a row; lanes beyond its end must be 0.
template <class Value>
inline float sum_of(int64_t columns, const Value& value) {
  VF sums[kWays];
  for (VF& sum : sums) sum = vf_set1(0.0f);
  each_vector(columns, [&](int i, int64_t c, int64_t lanes)
                           __attribute__((always_inline)) { sums[i] = vf_add(sums[i], value(c, lanes)); });
  return vf_sum(vf_add(vf_add(sums[0], sums[1]), vf_add(sums[2], sums[3])));
}

// 1 / sqrt(mean of the squares + eps).
template <class Value>
inline float inverse_rms(int64_t columns, float eps, const Value& value) {
  const float squares = sum_of(columns, [&](int64_t c, int64_t lanes) __attribute__((always_inline)) {
    const VF v = value(c, lanes);
    return vf_mul(v, v);
  });
  return 1.0f / sqrtf(squares / static_cast<float>(columns) + eps);
}

// v / rms, rounded to the dtype, times the weight; with an offset, v / rms * (weight + offset), rounded once.
template <int kDtype>
inline VF rms_scaled(VF v, float inverse, const NybbleScale& s, int64_t c, int64_t lanes) {
  v = vf_mul(v, vf_set1(inverse));
  if (!s.weight) return v;
  const VF weight = load_any(s.weight, s.weight_dtype, c, lanes);
  if (s.weight_offset != 0.0f) return vf_mul(v, vf_add(weight, vf_set1(s.weight_offset)));
  return vf_mul(round_to<kDtype>(v), weight);
}

}  // namespace
