// The loop that expands the mask layout to lines of a dense layout. Include after a definition of
//   template <int kPlanes> void expand_line(const uint64_t (&mask)[kPlanes], const uint8_t* (&values)[kPlanes],
//   uint8_t* to);
// which writes one line and advances each values pointer past the values it used.
#pragma once

#include <string.h>

#include "../abi.h"

namespace {

template <int kPlanes>
inline void expand_tiles(const NybbleExpandArgs* a) {
  constexpr int64_t kMaskBytes = NYBBLE_MASK_LINES * kPlanes * 8;
  uint8_t* to = a->to;
  for (int64_t tile = a->tile_begin; tile < a->tile_end; tile++) {
    const uint8_t* values[kPlanes];
    for (auto& plane : values) plane = a->codes + a->start[tile];
    for (int64_t line = 0; line < a->lines; line += NYBBLE_MASK_LINES) {
      const uint8_t* masks = values[0] > values[kPlanes - 1] ? values[0] : values[kPlanes - 1];
      for (int64_t ahead = 0; ahead < kMaskBytes + 256; ahead += 64) __builtin_prefetch(masks + 2048 + ahead);
      for (auto& plane : values) plane = masks + kMaskBytes;
      const int64_t left = a->lines - line, count = left < NYBBLE_MASK_LINES ? left : int64_t{NYBBLE_MASK_LINES};
      for (int64_t i = 0; i < count; i++, masks += kPlanes * 8, to += 64) {
        uint64_t mask[kPlanes];
        memcpy(mask, masks, sizeof mask);
        expand_line<kPlanes>(mask, values, to);
      }
    }
  }
}

inline NybbleStatus expand(const NybbleExpandArgs* a) {
  if (a->code_bits == 8)
    expand_tiles<1>(a);
  else
    expand_tiles<2>(a);
  return NYBBLE_OK;
}

}  // namespace
