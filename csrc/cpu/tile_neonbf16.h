// Adds the bfloat16 matrix instruction of Armv8.6 (BF16) to tile_neon.h.
#pragma once

#include "tile_neon.h"

namespace {

// Of two rows by two columns, each of four k in bfloat16, summed in float32: acc += rows x columns. Lanes: both columns
// of the first row, then those of the second. Subnormal numbers count as 0. Inline asm for the reason given in
// tile_neondot.h.
inline void mmla_bf16(VF& acc, VI rows, VI columns) {
#if defined(__GNUC__) && !defined(__clang__)
  __asm__("bfmmla %0.4s, %1.8h, %2.8h" : "+w"(acc) : "w"(rows), "w"(columns));
#else
  acc = vbfmmlaq_f32(acc, vreinterpretq_bf16_s32(rows), vreinterpretq_bf16_s32(columns));
#endif
}

}  // namespace
