// Adds the int8 matrix instructions of Armv8.6 (I8MM) to tile_neondot.h.
#pragma once

#include "tile_neondot.h"

namespace {

// Of two rows by two columns, each of eight k: acc += s8 x s8, wrapping. Lanes: both columns of the first row, then
// those of the second. Inline asm for the reason given in tile_neondot.h.
inline void mmla_s8(VI& acc, VI rows, VI columns) {
#if defined(__GNUC__) && !defined(__clang__)
  __asm__("smmla %0.4s, %1.16b, %2.16b" : "+w"(acc) : "w"(rows), "w"(columns));
#else
  acc = vmmlaq_s32(acc, vreinterpretq_s8_s32(rows), vreinterpretq_s8_s32(columns));
#endif
}

// The same of u8 x s8, of two columns by two rows. Lanes: both rows of the first column, then those of the second.
inline void mmla_u8s8(VI& acc, VI columns, VI rows) {
#if defined(__GNUC__) && !defined(__clang__)
  __asm__("usmmla %0.4s, %1.16b, %2.16b" : "+w"(acc) : "w"(columns), "w"(rows));
#else
  acc = vusmmlaq_s32(acc, vreinterpretq_u8_s32(columns), vreinterpretq_s8_s32(rows));
#endif
}

// acc += u8 x s8, four products per lane, wrapping.
inline void dot_u8s8(VI& acc, VI u, VI s) { acc = vusdotq_s32(acc, vreinterpretq_u8_s32(u), vreinterpretq_s8_s32(s)); }

}  // namespace
