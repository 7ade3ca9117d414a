// The epilogue, from a block's accumulators to y: adds the warps' partial sums, then those of split-K, both in a fixed
// order, so that a shape always gives the same bits; then applies scales that do not depend on k, and the bias.
#pragma once

#include "multiply.cuh"

namespace nybble {
namespace cuda {

__device__ __forceinline__ float read(const void* p, int dtype, int64_t at) {
  if (dtype == NYBBLE_F32) return static_cast<const float*>(p)[at];
  const uint16_t bits = static_cast<const uint16_t*>(p)[at];
  return dtype == NYBBLE_BF16 ? float_of_bf16(bits) : float_of_f16(bits);
}

// The bits of a value in a 16-bit type.
__device__ __forceinline__ uint32_t half_bits(int dtype, float value) {
  return dtype == NYBBLE_BF16 ? bf16_of_float(value) : f16_of_float(value);
}

__device__ __forceinline__ void write(void* p, int dtype, int64_t at, float value) {
  if (dtype == NYBBLE_F32)
    static_cast<float*>(p)[at] = value;
  else
    static_cast<uint16_t*>(p)[at] = static_cast<uint16_t>(half_bits(dtype, value));
}

// Four adjacent elements; the address of the first is aligned to all four.
__device__ __forceinline__ void write_four(void* p, int dtype, int64_t at, const float (&y)[4]) {
  if (dtype == NYBBLE_F32) {
    store_global(static_cast<float*>(p) + at, Vector{{as_bits(y[0]), as_bits(y[1]), as_bits(y[2]), as_bits(y[3])}});
    return;
  }
  store_global_8(static_cast<uint16_t*>(p) + at, half_bits(dtype, y[0]) | half_bits(dtype, y[1]) << 16,
                 half_bits(dtype, y[2]) | half_bits(dtype, y[3]) << 16);
}

template <bool Exact>
__device__ __forceinline__ Vector add(const Vector& a, const Vector& b) {
  Vector sum;
#pragma unroll
  for (int i = 0; i < 4; i++) sum.w[i] = Exact ? a.w[i] + b.w[i] : as_bits(as_float(a.w[i]) + as_float(b.w[i]));
  return sum;
}

// Selects the epilogue: exact integer sums (kExact); 8-bit activations with group scales, 16 times too large if
// Symmetric; float activations with a scale per row; float activations with group scales.
template <int ElementBytes, bool Grouped, bool Symmetric>
struct Ending {
  static constexpr bool kCodes = ElementBytes == 1, kGrouped = Grouped, kSymmetric = Symmetric;
  static constexpr bool kExact = kCodes && !kGrouped;
};
template <class W, class X>
using EndingOf = Ending<X::kElementBytes, W::kGrouped, W::kSymmetric || X::kElementBytes != 1>;

// The output n of a token.
template <class End>
__device__ __forceinline__ float finished(const NybbleCudaProduct& p, int64_t token, int64_t n, uint32_t sum) {
  const float bias = p.bias ? read(p.bias, p.bias_dtype, n) : 0.0f;
  if (End::kExact) {
    // The operations and order of the CPU kernels, to give the same bits.
    const int32_t centred = static_cast<int32_t>(sum) - p.act_zero[token] * p.column_sum[n];
    return fused(static_cast<float>(centred), p.act_scale[token] * p.row_scale[n], bias);
  }
  float y = as_float(sum);
  if (End::kCodes) {
    const float zero = static_cast<float>(p.act_zero[token]);
    return fused(fused(-zero, p.weight_sum[n], y * (End::kSymmetric ? 0.0625f : 1.0f)), p.act_scale[token], bias);
  }
  if (!End::kGrouped) y *= p.row_scale[n];
  return y + bias;
}

// Computes and stores four adjacent outputs of a token.
template <class End>
__device__ __forceinline__ void finish(const NybbleCudaProduct& p, int64_t token, int64_t row, const Vector& sums) {
  if (token >= p.m || row >= p.n) return;
  const bool together = p.n % 4 == 0;
  float y[4];
#pragma unroll
  for (int i = 0; i < 4; i++)
    if (together || row + i < p.n) y[i] = finished<End>(p, token, row + i, sums.w[i]);
  if (together) return write_four(p.y, p.y_dtype, token * p.n + row, y);
#pragma unroll
  for (int i = 0; i < 4; i++)
    if (row + i < p.n) write(p.y, p.y_dtype, token * p.n + row + i, y[i]);
}

// Stores a lane's accumulators for 8 tokens to [token][rows + kPad] in shared memory.
template <class T>
__device__ __forceinline__ void store_sums(const T (&acc)[4][4], float* sums, int token, int row, int rows, int lane) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    // acc[f][2 h + i]: row 8 g + 2 f + h of token 2 t + i.
    float* at = sums + sum_offset(token + 2 * thread_in_group(lane) + i, row + 8 * group_of_lane(lane), rows);
    store_shared(at, {{as_bits(acc[0][i]), as_bits(acc[0][2 + i]), as_bits(acc[1][i]), as_bits(acc[1][2 + i])}});
    store_shared(at + 4, {{as_bits(acc[2][i]), as_bits(acc[2][2 + i]), as_bits(acc[3][i]), as_bits(acc[3][2 + i])}});
  }
}

// First output and first token of a block.
struct Corner {
  int64_t row, token;
};

// Adds the `Parts` arrays [Tokens][Rows + kPad] in shared memory, written by this block's `Threads`, and finishes y, or
// passes the sums on to the split-K reduction.
template <class End, int Rows, int Tokens, int Parts, int Threads>
__device__ __forceinline__ void reduce(const NybbleCudaProduct& p, float* sums, const Corner& at) {
  constexpr int kItems = Rows * Tokens / 4, kArea = Tokens * (Rows + kPad);
  __syncthreads();
  const bool through_cluster = kClusters && p.clusters && p.splits > 1;
  const int split = blockIdx.y;
#pragma unroll 1  // short code, which loads faster
  for (int i = threadIdx.x; i < kItems; i += Threads) {
    const Item item = item_of(i, Rows);
    float* own = sums + sum_offset(item.token, item.row, Rows);
    Vector sum = load_shared(reinterpret_cast<const Vector*>(own));
#pragma unroll
    for (int part = 1; part < Parts; part++)
      sum = add<End::kExact>(sum, load_shared(reinterpret_cast<const Vector*>(own + part * kArea)));
    if (p.splits == 1)
      finish<End>(p, at.token + item.token, at.row + item.row, sum);
    else if (through_cluster)
      store_shared(own, sum);
    else
      store_global(p.parts + ((static_cast<int64_t>(blockIdx.x) * p.splits + split) * kItems + i) * 4, sum);
  }
  if (!through_cluster) return;
  sync_cluster();
  // The blocks of the cluster take turns finishing runs of items.
#pragma unroll 1
  for (int i = split * Threads + threadIdx.x; i < kItems; i += Threads * p.splits) {
    const Item item = item_of(i, Rows);
    const float* own = sums + sum_offset(item.token, item.row, Rows);
    Vector sum = load_cluster(own, 0);
#pragma unroll 1
    for (int other = 1; other < p.splits; other++) sum = add<End::kExact>(sum, load_cluster(own, other));
    finish<End>(p, at.token + item.token, at.row + item.row, sum);
  }
  sync_cluster();  // a block's shared memory must stay until the others have read it
}

// The split-K reduction through global memory. One thread per item; grid (blocks, items / kThreads).
template <class End, int Rows, int Tokens>
__global__ void __launch_bounds__(kThreads) finish_kernel(const NybbleCudaProduct p) {
  constexpr int kItems = Rows * Tokens / 4;
  const int i = blockIdx.y * kThreads + threadIdx.x;
  if (i >= kItems) return;
  const int64_t block = blockIdx.x;
  const Vector* parts = reinterpret_cast<const Vector*>(p.parts) + block * p.splits * kItems + i;
  Vector sum = parts[0];
#pragma unroll 1
  for (int split = 1; split < p.splits; split++)
    sum = add<End::kExact>(sum, parts[static_cast<int64_t>(split) * kItems]);
  const Item item = item_of(i, Rows);
  finish<End>(p, block % p.token_tiles * Tokens + item.token, block / p.token_tiles * Rows + item.row, sum);
}

}  // namespace cuda
}  // namespace nybble
