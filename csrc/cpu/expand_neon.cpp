// Expands the mask layout to dense lines by tbl, see tile_spread.h. Bound by loading the patterns.
#include <arm_neon.h>
#include <stdint.h>

namespace {

using Eight = uint8x8_t;

inline Eight eight(const uint8_t* bytes) { return vld1_u8(bytes); }

inline uint64_t shuffle(Eight bytes, Eight by) { return vget_lane_u64(vreinterpret_u64_u8(vtbl1_u8(bytes, by)), 0); }

inline uint64_t moved(Eight by) { return vget_lane_u64(vreinterpret_u64_u8(vcgez_s8(vreinterpret_s8_u8(by))), 0); }

}  // namespace

// clang-format off
#include "tile_spread.h"
// clang-format on

extern "C" NybbleStatus nybble_expand_neon(const NybbleExpandArgs* args) { return expand(args); }
