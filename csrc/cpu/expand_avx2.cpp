// Expands the mask layout to dense lines, eight bytes at a time: a byte of the mask selects the pshufb pattern that
// moves the next values to its set bits. Bound by loading the patterns, about 2 instructions per mask byte.
#include <immintrin.h>
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
      const __m128i found = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(values[p]));
      const __m128i spread = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kSpread.of[bits]));
      uint64_t bytes = static_cast<uint64_t>(_mm_cvtsi128_si64(_mm_shuffle_epi8(found, spread)));
      values[p] += __builtin_popcount(bits);
      if (kPlanes == 2) {  // zero weights keep the code 8: stored codes are merged by xor with it
        const uint64_t kept = static_cast<uint64_t>(_mm_cvtsi128_si64(_mm_cmpgt_epi8(spread, _mm_set1_epi8(-1))));
        const uint64_t nibble = p ? 0xf0f0f0f0f0f0f0f0u : 0x0f0f0f0f0f0f0f0fu;
        bytes = ((bytes & nibble) ^ (0x8888888888888888u & nibble)) & kept;
      }
      line ^= bytes;
    }
    memcpy(to + i, &line, 8);
  }
}

}  // namespace

// clang-format off
#include "tile_expand.h"
// clang-format on

extern "C" NybbleStatus nybble_expand_avx2(const NybbleExpandArgs* args) { return expand(args); }
