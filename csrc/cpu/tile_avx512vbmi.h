// Adds the byte shuffles of VBMI and VBMI2 to tile_avx512vnni.h.
#pragma once

#include "tile_avx512vnni.h"

namespace {

// Moves the bytes of `from`, in order, to the lanes set in `mask`; the others are `otherwise`, or 0.
inline VI vi_expand(uint64_t mask, VI from, VI otherwise) { return _mm512_mask_expand_epi8(otherwise, mask, from); }
inline VI vi_expand(uint64_t mask, VI from) { return _mm512_maskz_expand_epi8(mask, from); }

// Keeps a loaded vector in its register: GCC would reload it for each use, and loads are the bottleneck.
inline void vi_keep(VI& a) {
#if defined(__GNUC__) && !defined(NYBBLE_EMULATE)
  __asm__("" : "+v"(a));
#else
  (void)a;
#endif
}

// Byte i of the result is byte index[i] % 128 of the concatenation of low and high.
inline VI vi_gather128(VI index, VI low, VI high) { return _mm512_permutex2var_epi8(low, index, high); }

}  // namespace
