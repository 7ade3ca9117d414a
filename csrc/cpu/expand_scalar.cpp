// Expands the mask layout to dense lines, in plain C++.
#include <stdint.h>

namespace {

template <int kPlanes>
inline void expand_line(const uint64_t (&mask)[kPlanes], const uint8_t* (&values)[kPlanes], uint8_t* to) {
  for (int i = 0; i < 64; i++) {
    if (kPlanes == 1) {
      to[i] = mask[0] >> i & 1 ? *values[0]++ : 0;
      continue;
    }
    const int low = mask[0] >> i & 1 ? *values[0]++ & 15 : 8;
    const int high = mask[kPlanes - 1] >> i & 1 ? *values[kPlanes - 1]++ & 0xf0 : 0x80;
    to[i] = static_cast<uint8_t>(low | high);
  }
}

}  // namespace

// clang-format off
#include "tile_expand.h"
// clang-format on

extern "C" NybbleStatus nybble_expand_scalar(const NybbleExpandArgs* args) { return expand(args); }
