// From a block's sums to y: the warps' parts are added, then the splits', each in order, so that the same shape always
// gives the same bits; then scales that do not depend on k, bias and rounding.
#pragma once

#include "operands.cuh"

namespace nybble {
namespace cuda {

__device__ __forceinline__ float read(const void* p, int dtype, int64_t at) {
  if (dtype == NYBBLE_F32) return static_cast<const float*>(p)[at];
  const uint16_t bits = static_cast<const uint16_t*>(p)[at];
  return dtype == NYBBLE_BF16 ? float_of_bf16(bits) : float_of_f16(bits);
}

__device__ __forceinline__ void write(void* p, int dtype, int64_t at, float value) {
  if (dtype == NYBBLE_F32)
    static_cast<float*>(p)[at] = value;
  else
    static_cast<uint16_t*>(p)[at] = dtype == NYBBLE_BF16 ? bf16_of_float(value) : f16_of_float(value);
}

__device__ __forceinline__ Vector add(const Vector& a, const Vector& b) {
  Vector sum;
#pragma unroll
  for (int i = 0; i < 4; i++) sum.w[i] = as_bits(as_float(a.w[i]) + as_float(b.w[i]));
  return sum;
}

// Four neighbouring outputs of a token.
template <class W, class X>
__device__ __forceinline__ void finish(const NybbleCudaProduct& p, int64_t token, int64_t row, const Vector& sums) {
  if (token >= p.m) return;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int64_t n = row + i;
    if (n >= p.n) return;
    float y = as_float(sums.w[i]);
    if (!W::kGrouped) y *= p.row_scale[n];
    const float bias = p.bias ? read(p.bias, p.bias_dtype, n) : 0.0f;
    if (X::kElementBytes == 1) {
      const float zero = static_cast<float>(p.act_zero[token]);
      y = fused(fused(-zero, p.weight_sum[n], y * 0.0625f), p.act_scale[token], bias);
    } else {
      y += bias;
    }
    write(p.y, p.y_dtype, token * p.n + n, y);
  }
}

// The first output and the first token of a block.
struct Corner {
  int64_t row, token;
};

// sums: `Parts` areas of [Tokens][Rows + kPad] floats in shared memory, written by this block.
template <class W, class X, int Rows, int Tokens, int Parts>
__device__ __forceinline__ void reduce(const NybbleCudaProduct& p, float* sums, const Corner& at) {
  constexpr int kItems = Rows * Tokens / 4, kArea = Tokens * (Rows + kPad);
  __syncthreads();
  const bool through_cluster = kClusters && p.splits > 1;
  const int split = blockIdx.y;
  const int64_t block = blockIdx.z * static_cast<int64_t>(gridDim.x) + blockIdx.x;
  for (int i = threadIdx.x; i < kItems; i += kThreads) {
    const Item item = item_of(i, Rows);
    float* own = sums + sum_offset(item.token, item.row, Rows);
    Vector sum = load_shared(reinterpret_cast<const Vector*>(own));
#pragma unroll
    for (int part = 1; part < Parts; part++)
      sum = add(sum, load_shared(reinterpret_cast<const Vector*>(own + part * kArea)));
    if (p.splits == 1)
      finish<W, X>(p, at.token + item.token, at.row + item.row, sum);
    else if (through_cluster)
      store_shared(own, sum);
    else
      *reinterpret_cast<Vector*>(p.parts + ((block * p.splits + split) * kItems + i) * 4) = sum;
  }
  if (!through_cluster) return;
  sync_cluster();
  // Each block of the cluster finishes every splits-th item.
  for (int i = threadIdx.x * p.splits + split; i < kItems; i += kThreads * p.splits) {
    const Item item = item_of(i, Rows);
    const float* own = sums + sum_offset(item.token, item.row, Rows);
    Vector sum = load_cluster(own, 0);
    for (int other = 1; other < p.splits; other++) sum = add(sum, load_cluster(own, other));
    finish<W, X>(p, at.token + item.token, at.row + item.row, sum);
  }
  sync_cluster();  // nobody leaves while others read
}

// Adds the splits' parts where they went through memory. One thread an item; grid (blocks, items / kThreads).
template <class W, class X, int Rows, int Tokens>
__global__ void __launch_bounds__(kThreads) finish_kernel(const NybbleCudaProduct p, int columns) {
  constexpr int kItems = Rows * Tokens / 4;
  const int i = blockIdx.y * kThreads + threadIdx.x;
  if (i >= kItems) return;
  const int64_t block = blockIdx.x;
  const Vector* parts = reinterpret_cast<const Vector*>(p.parts) + block * p.splits * kItems + i;
  Vector sum = parts[0];
  for (int split = 1; split < p.splits; split++) sum = add(sum, parts[static_cast<int64_t>(split) * kItems]);
  const Item item = item_of(i, Rows);
  finish<W, X>(p, block / columns * Tokens + item.token, block % columns * Rows + item.row, sum);
}

}  // namespace cuda
}  // namespace nybble
