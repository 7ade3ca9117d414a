// Expands the mask layout to dense lines, eight bytes at a time: a byte of the mask selects the pattern of a byte
// shuffle that moves the next values to its set bits. Include after definitions of
//   Eight, eight(const uint8_t*)             eight bytes
//   uint64_t shuffle(Eight bytes, Eight by)  the bytes; 0 where the pattern is 0x80
//   uint64_t moved(Eight by)                 bytes of ones where the pattern is not 0x80
#pragma once

#include <stdint.h>
#include <string.h>

namespace {

struct Spread {
  uint8_t of[256][8];
};

constexpr Spread spread_table() {
  Spread table{};
  for (int mask = 0; mask < 256; mask++)
    for (int bit = 0, next = 0; bit < 8; bit++)
      table.of[mask][bit] = static_cast<uint8_t>(mask >> bit & 1 ? next++ : 0x80);  // 0x80 gives 0
  return table;
}

constexpr Spread kSpread = spread_table();

template <int kPlanes>
inline void expand_line(const uint64_t (&mask)[kPlanes], const uint8_t* (&values)[kPlanes], uint8_t* to) {
  for (int i = 0; i < 64; i += 8) {
    uint64_t line = kPlanes == 1 ? 0 : 0x8888888888888888u;
    for (int p = 0; p < kPlanes; p++) {
      const uint8_t bits = static_cast<uint8_t>(mask[p] >> i);
      const Eight found = eight(values[p]), spread = eight(kSpread.of[bits]);
      uint64_t bytes = shuffle(found, spread);
      values[p] += __builtin_popcount(bits);
      if (kPlanes == 2) {  // zero weights keep the code 8: stored codes are merged by xor with it
        const uint64_t nibble = p ? 0xf0f0f0f0f0f0f0f0u : 0x0f0f0f0f0f0f0f0fu;
        bytes = ((bytes & nibble) ^ (0x8888888888888888u & nibble)) & moved(spread);
      }
      line ^= bytes;
    }
    memcpy(to + i, &line, 8);
  }
}

}  // namespace

#include "tile_expand.h"
