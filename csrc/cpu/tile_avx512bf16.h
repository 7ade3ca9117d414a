// Adds AVX512-BF16 to tile_avx512vnni.h: products of bfloat16 pairs, summed in float32.
#pragma once

#include "tile_avx512vnni.h"

namespace {

// acc += the two products of each lane. Inline asm for the same reason as dot_u8s8.
inline void dot_bf16(VF& acc, VI a, VI b) {
#if defined(__GNUC__) && !defined(__clang__) && !defined(NYBBLE_EMULATE)
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
#else
  acc = _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
#endif
}

// A lookup table with entries value_of(i), which must be exact in bfloat16.
template <class ValueOf>
inline VI bf16_table(const ValueOf& value_of) {
  alignas(64) uint16_t entries[32];
  for (int i = 0; i < 32; i++) {
    const float value = static_cast<float>(value_of(i));
    uint32_t bits;
    memcpy(&bits, &value, 4);
    entries[i] = static_cast<uint16_t>(bits >> 16);
  }
  return vi_load(entries);
}

// Looks up the low five bits of each 16-bit lane in a table of 32 entries.
inline VI vi_lookup16(VI table, VI index) { return _mm512_permutexvar_epi16(index, table); }
inline VI vi_sub8(VI a, VI b) { return _mm512_sub_epi8(a, b); }
inline VI vi_add16(VI a, VI b) { return _mm512_add_epi16(a, b); }

}  // namespace
