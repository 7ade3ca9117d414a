// Scales of weights, which lie in memory as bfloat16, float16 or float32. Include after a target's vector header.
#pragma once

#include <string.h>

#include "../abi.h"

namespace {

inline const uint8_t* scale_place(const void* scales, int32_t dtype, int64_t place) {
  return static_cast<const uint8_t*>(scales) + place * (dtype == NYBBLE_F32 ? 4 : 2);
}

// A scale in every lane.
inline VF one_scale(const void* scales, int32_t dtype, int64_t place) {
  const uint8_t* at = scale_place(scales, dtype, place);
  if (dtype == NYBBLE_F16) return vf_set1(vf_sum(vf_load_as(at, dtype, 1)));
  uint32_t bits;
  uint16_t half;
  memcpy(&half, at, 2);
  bits = uint32_t{half} << 16;  // a bfloat16 is the upper half of a float32
  if (dtype == NYBBLE_F32) memcpy(&bits, at, 4);
  float scale;
  memcpy(&scale, &bits, 4);
  return vf_set1(scale);
}

}  // namespace
