// Adds AVX512-VNNI to tile_avx512bw.h: vpdpbusd.
#pragma once

#include "tile_avx512bw.h"

namespace {

// acc += u8 x s8, four products per lane, wrapping. Inline asm, because GCC 12 copies the accumulator before and after
// the intrinsic, which halves the speed.
inline void dot_u8s8(VI& acc, VI u, VI s) {
#if defined(__GNUC__) && !defined(__clang__) && !defined(NYBBLE_EMULATE)
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(u), "v"(s));
#else
  acc = _mm512_dpbusd_epi32(acc, u, s);
#endif
}

}  // namespace
