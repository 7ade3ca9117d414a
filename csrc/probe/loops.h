// The two loops of the probes. Includes C headers only, like every file compiled for one instruction set.
#pragma once

#include <stdint.h>
#include <string.h>

namespace {

// Runs Op::step(acc, a, b) `rounds` times on each of kCount accumulators in registers, enough to hide the latency of a
// step. Returns the number of steps. Op::hide(v) is an asm statement that takes and returns v, so that the compiler
// neither hoists nor drops the work.
template <class Op, int kCount>
inline uint64_t multiply(uint64_t rounds) {
  typename Op::Vector acc[kCount], a, b;
  memset(&a, 0x3f, sizeof a);  // 63; 0.747 as bf16 and as fp32
  memset(&b, 0x3f, sizeof b);
  Op::hide(a);
#pragma GCC unroll 32
  for (int i = 0; i < kCount; i++) acc[i] = a;  // not memset, which makes GCC keep them in memory
  for (uint64_t round = 0; round < rounds; round++) {
    Op::hide(b);
#pragma GCC unroll 32
    for (int i = 0; i < kCount; i++) Op::step(acc[i], a, b);
  }
#pragma GCC unroll 32
  for (int i = 0; i < kCount; i++) Op::hide(acc[i]);
  return rounds * kCount;
}

// Reads `bytes`, a multiple of 512, from memory aligned to 64, as four streams with software prefetch: the fastest of
// the variants tried, with small and with huge pages. Returns `bytes`.
template <class Op>
inline uint64_t read(const void* data, uint64_t bytes) {
  using V = typename Op::Vector;
  constexpr int kStreams = 4, kStep = 128, kAhead = 1024, kVectors = kStep / sizeof(V);
  const uint8_t* p = static_cast<const uint8_t*>(data);
  const uint64_t stream = bytes / kStreams;
  V acc[kStreams][2];
#pragma GCC unroll 4
  for (int s = 0; s < kStreams; s++) acc[s][0] = acc[s][1] = V{};
  for (const uint8_t* end = p + stream; p < end; p += kStep) {
#pragma GCC unroll 4
    for (int s = 0; s < kStreams; s++) {
      const uint8_t* from = p + s * stream;
      __builtin_prefetch(from + kAhead);
      __builtin_prefetch(from + kAhead + 64);
#pragma GCC unroll 16
      for (int i = 0; i < kVectors; i++) acc[s][i % 2] ^= reinterpret_cast<const V*>(from)[i];
    }
  }
#pragma GCC unroll 4
  for (int s = 0; s < kStreams; s++) {
    acc[s][0] ^= acc[s][1];
    Op::hide(acc[s][0]);
  }
  return bytes;
}

}  // namespace
