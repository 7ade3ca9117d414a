// Weights of 3 bits in planes, for the register tiles of 4-bit weights. Include after a target's vector header.
#pragma once

#include "../abi.h"
#include "tile_inline.h"

namespace {

constexpr int64_t kLine = 64;

// Whether codes have 3 bits, in planes (the layout n16k32): a kernel file defines NYBBLE_PLANES before its first
// include.
#ifdef NYBBLE_PLANES
constexpr bool kPlanes = true;
#else
constexpr bool kPlanes = false;
#endif

// The code of the weight 0 without zero points or minimums.
constexpr int kMiddle = kPlanes ? 4 : 8;

// In place of a Prefetcher, where it was told before what is used.
struct NoPrefetcher {
  template <int V>
  void used(const uint8_t* const (&)[V], int64_t, bool) const {}
};

#ifdef NYBBLE_PLANES
constexpr int64_t kMostGroup = 128, kPlanesLine = 32;  // k of a group at most, and of a line of each plane

// Nibbles of the two low bits of each of a's and the third of b's; their fourth is 0, or if not kClean anything.
template <bool kClean>
NYBBLE_INLINE VI join_bits(VI a, VI b) {
  const VI low = vi_set1(0x33333333), high = vi_set1(0x44444444);
  return kClean ? vi_or(vi_and(a, low), vi_and(b, high)) : vi_pick(low, a, b);
}

// The lines of n16k8 of so many k, of W columns.
template <bool kClean>
NYBBLE_INLINE void join_planes(const uint8_t* from, int64_t ks, uint8_t* to) {
  for (int64_t k = 0; k < ks; k += kPlanesLine, from += 3 * kLine, to += 4 * kLine) {
    const VI first = vi_load(from), second = vi_load(from + kLine), third = vi_load(from + 2 * kLine);
    vi_store(to, join_bits<kClean>(first, vi_shift_left_32<2>(third)));
    vi_store(to + kLine, join_bits<kClean>(vi_shift_right_32<2>(first), vi_shift_left_32<1>(third)));
    vi_store(to + 2 * kLine, join_bits<kClean>(second, third));
    vi_store(to + 3 * kLine, join_bits<kClean>(vi_shift_right_32<2>(second), vi_shift_right_32<1>(third)));
  }
}
#endif

// Calls inner(streams, prefetcher) to use the nibbles of a group, and advances the streams w by it. Planes are joined
// to lines of nibbles first, which stay in the L1 cache; kClean: with a fourth bit of 0, which takes longer.
template <bool kClean = true, int V, class Fetch, class Inner>
NYBBLE_INLINE void with_nibbles(const NybbleLinearArgs* a, const uint8_t* (&w)[V], Fetch& prefetcher,
                                const Inner& inner) {
#ifdef NYBBLE_PLANES
  alignas(64) uint8_t held[V][kMostGroup / 8 * kLine];
  const uint8_t* lines[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; v++) {
    join_planes<kClean>(w[v], a->group, held[v]);
    lines[v] = held[v];
    w[v] += a->group / kPlanesLine * 3 * kLine;
  }
  prefetcher.used(w, a->group / kPlanesLine * 3, false);
  NoPrefetcher none;
  inner(lines, none);
#else
  (void)a;
  inner(w, prefetcher);
#endif
}

}  // namespace
