// Activations of a token to 8-bit codes, as reference.quantize_activations defines them: the steps of one value, and of
// a row's range.
#pragma once

#include "finish.cuh"

namespace nybble {
namespace cuda {

struct Rounding {
  float factor, inverse, zero, scale;  // zero: the code of 0
};

// From the least and the greatest of a row and 0. Powers of two keep float32 from over- and underflowing.
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

// A block a token.
__global__ void __launch_bounds__(kThreads) quantize_kernel(const NybbleCudaRows rows) {
  float* low = reinterpret_cast<float*>(shared_memory());
  float* high = low + kThreads;
  float* bad = high + kThreads;
  const int thread = threadIdx.x;
  const int64_t token = blockIdx.x, at = token * rows.ldx;
  float least = 0, most = 0, wrong = 0;
  for (int64_t k = thread; k < rows.k; k += kThreads) {
    const float value = read(rows.x, rows.dtype, at + k);
    if (!(value - value == 0)) wrong = 1;
    least = value < least ? value : least;
    most = value > most ? value : most;
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
  for (int64_t k = thread; k < rows.k_padded; k += kThreads) {
    const bool there = finite && k < rows.k;
    codes[permuted_code(k)] = static_cast<int8_t>(there ? code_of(read(rows.x, rows.dtype, at + k), rounding) : 0);
  }
  if (thread) return;
  rows.act_scale[token] = finite ? rounding.scale : as_float(0x7FC00000u);
  rows.act_zero[token] = static_cast<int32_t>(rounding.zero);
}

}  // namespace cuda
}  // namespace nybble
