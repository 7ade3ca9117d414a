// Expands the mask layout to dense lines with vpexpandb: about 2 cycles per line on Zen 5, bound by memory.
#include "tile_avx512vbmi.h"

namespace {

template <int kPlanes>
inline void expand_line(const uint64_t (&mask)[kPlanes], const uint8_t* (&values)[kPlanes], uint8_t* to) {
  VI planes[kPlanes];
  for (int p = 0; p < kPlanes; p++) {
    const VI found = vi_load(values[p]);
    values[p] += __builtin_popcountll(mask[p]);
    if (kPlanes == 1) {
      planes[p] = vi_expand(mask[p], found);
    } else {
      const VI nibbles = vi_set1(p ? static_cast<int32_t>(0xf0f0f0f0) : 0x0f0f0f0f);
      planes[p] =
          vi_expand(mask[p], vi_and(found, nibbles), vi_set1(p ? static_cast<int32_t>(0x80808080) : 0x08080808));
    }
  }
  vi_store(to, kPlanes == 1 ? planes[0] : _mm512_or_si512(planes[0], planes[kPlanes - 1]));
}

}  // namespace

// clang-format off
#include "tile_expand.h"
// clang-format on

extern "C" NybbleStatus nybble_expand_avx512vbmi(const NybbleExpandArgs* args) { return expand(args); }
