// Expands the mask layout to dense lines by pshufb, see tile_spread.h. Bound by loading the patterns, about 2
// instructions per mask byte.
#include <immintrin.h>
#include <stdint.h>

namespace {

using Eight = __m128i;

inline Eight eight(const uint8_t* bytes) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)); }

inline uint64_t shuffle(Eight bytes, Eight by) {
  return static_cast<uint64_t>(_mm_cvtsi128_si64(_mm_shuffle_epi8(bytes, by)));
}

inline uint64_t moved(Eight by) {
  return static_cast<uint64_t>(_mm_cvtsi128_si64(_mm_cmpgt_epi8(by, _mm_set1_epi8(-1))));
}

}  // namespace

// clang-format off
#include "tile_spread.h"
// clang-format on

extern "C" NybbleStatus nybble_expand_avx2(const NybbleExpandArgs* args) { return expand(args); }
