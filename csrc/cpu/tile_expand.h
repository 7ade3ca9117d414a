// Lines of the dense layouts from the mask layout. Include after a definition of
//   template <int kPlanes> void expand_line(const uint64_t* mask, const uint8_t* (&values)[kPlanes], uint8_t* to);
// which moves the values on by what the masks keep.
#pragma once

#include "../abi.h"

namespace {

template <int kPlanes>
inline void expand_tiles(const NybbleExpandArgs* a) {
  uint8_t* to = a->to;
  for (int64_t tile = a->tile_begin; tile < a->tile_end; tile++) {
    const uint64_t* mask = a->mask + tile * a->lines * kPlanes;
    const uint8_t* values[kPlanes];
    for (auto& plane : values) plane = a->codes + a->start[tile];
    for (int64_t line = 0; line < a->lines; line++, mask += kPlanes, to += 64) {
      if (line % 8 == 0) {
        __builtin_prefetch(reinterpret_cast<const uint8_t*>(mask) + 1024);
        for (int i = 0; i < 4; i++) __builtin_prefetch(values[0] + 1024 + i * 64);
      }
      expand_line<kPlanes>(mask, values, to);
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
