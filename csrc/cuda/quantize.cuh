// Dynamic per-token quantization of activations to 8 bits, bit-identical to reference.quantize_activations.
#pragma once

#include "finish.cuh"

namespace nybble {
namespace cuda {

struct Rounding {
  float factor, inverse, zero, scale;  // zero: the zero point
};

// From the range [low, high] of a row, extended to 0. The factor, a power of two, prevents overflow and underflow.
NYBBLE_HD Rounding rounding_of(float low, float high) {
  const float magnitude = -low > high ? -low : high;
  if (!(magnitude > 0)) return {1, 0, 0, 0};
  const float factor = magnitude < 0x1p-100f ? 0x1p100f : magnitude > 0x1p126f ? 0x1p-4f : 1.0f;
  const float width = high * factor - low * factor;
  const float inverse = 255.0f / width;
  return {factor, inverse, rintf(-(low * factor) * inverse) - 128.0f, width / 255.0f / factor};
}

NYBBLE_HD int code_of(float value, const Rounding& r) {
  const float code = rintf(value * r.factor * r.inverse) + r.zero;
  return static_cast<int>(code < 127.0f ? code : 127.0f);
}

// Loads eight adjacent values of a row from k on, 0 beyond the end. vectors: all rows are aligned to 16 bytes.
__device__ __forceinline__ void load_eight(const NybbleCudaRows& rows, int64_t row, int64_t k, bool vectors,
                                           float (&values)[8]) {
  const int64_t at = row + k;
  if (vectors && k + 8 <= rows.k) {
    if (rows.dtype == NYBBLE_F32) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const Vector v = load_global(static_cast<const float*>(rows.x) + at + 4 * half);
#pragma unroll
        for (int i = 0; i < 4; i++) values[4 * half + i] = as_float(v.w[i]);
      }
      return;
    }
    const Vector v = load_global(static_cast<const uint16_t*>(rows.x) + at);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const uint16_t bits = static_cast<uint16_t>(v.w[i / 2] >> (16 * (i % 2)));
      values[i] = rows.dtype == NYBBLE_BF16 ? float_of_bf16(bits) : float_of_f16(bits);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; i++) values[i] = k + i < rows.k ? read(rows.x, rows.dtype, at + i) : 0.0f;
}

// Stores the codes of eight inputs from k on in the order of `rows`: contiguous, or for wgmma in two runs of four.
__device__ __forceinline__ void store_eight(const NybbleCudaRows& rows, int8_t* codes, int64_t k,
                                            const int (&code)[8]) {
  const bool permuted = rows.order != NYBBLE_PLAIN_ORDER;
  uint32_t words[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const int place = permuted ? static_cast<int>(permuted_code(i) & 7) : i;
    words[place / 4] |= static_cast<uint32_t>(code[i] & 255) << (8 * (place % 4));
  }
  if (rows.order == NYBBLE_WGMMA_ORDER) {
    store_global_4(codes + wgmma_code(k), words[0]);
    store_global_4(codes + wgmma_code(k + 4), words[1]);
  } else {
    store_global_8(codes + (permuted ? permuted_code(k) : k), words[0], words[1]);
  }
}

// One block per token.
__global__ void __launch_bounds__(kThreads) quantize_kernel(const NybbleCudaRows rows) {
  float* low = reinterpret_cast<float*>(shared_memory());
  float* high = low + kThreads;
  float* bad = high + kThreads;
  const int thread = threadIdx.x;
  const int64_t token = blockIdx.x, row = token * rows.ldx;
  const int64_t row_bytes = rows.ldx * (rows.dtype == NYBBLE_F32 ? 4 : 2);
  const bool vectors = (reinterpret_cast<uintptr_t>(rows.x) | static_cast<uintptr_t>(row_bytes)) % 16 == 0;
  float least = 0, most = 0, wrong = 0;
#pragma unroll 4
  for (int64_t k = 8 * thread; k < rows.k; k += 8 * kThreads) {
    float values[8];
    load_eight(rows, row, k, vectors, values);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (!(values[i] - values[i] == 0)) wrong = 1;
      least = values[i] < least ? values[i] : least;
      most = values[i] > most ? values[i] : most;
    }
  }
  low[thread] = least;
  high[thread] = most;
  bad[thread] = wrong;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread >= half) continue;
    low[thread] = low[thread + half] < low[thread] ? low[thread + half] : low[thread];
    high[thread] = high[thread + half] > high[thread] ? high[thread + half] : high[thread];
    bad[thread] += bad[thread + half];
  }
  __syncthreads();
  const bool finite = bad[0] == 0;
  const Rounding rounding = finite ? rounding_of(low[0], high[0]) : rounding_of(0, 0);
  int8_t* codes = rows.codes + token * rows.k_padded;
#pragma unroll 4
  for (int64_t k = 8 * thread; k < rows.k_padded; k += 8 * kThreads) {
    float values[8];
    load_eight(rows, row, k, vectors, values);
    int code[8];
#pragma unroll
    for (int i = 0; i < 8; i++) code[i] = finite && k + i < rows.k ? code_of(values[i], rounding) : 0;
    store_eight(rows, codes, k, code);
  }
  if (thread) return;
  rows.act_scale[token] = finite ? rounding.scale : as_float(0x7FC00000u);
  rows.act_zero[token] = static_cast<int32_t>(rounding.zero);
}

}  // namespace cuda
}  // namespace nybble
