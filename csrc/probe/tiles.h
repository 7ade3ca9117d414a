// The loop of the probes of AMX: tiles that are configured, multiplied and released.
#pragma once

#include "../cpu/tile_amx.h"

namespace {

// Multiplies `rounds` times into each of four accumulators, as many as a kernel has: enough to hide the latency of a
// multiply. Returns the operations, kPairs products for each 4 bytes.
template <class Op, int kPairs>
inline uint64_t multiply_in_tiles(uint64_t rounds) {
  alignas(64) uint8_t ones[kTileRows * 64];
  memset(ones, 0x3f, sizeof ones);  // 63; 0.747 as bf16
  TileScope tiles;
  tiles.set(kMostRows, 64);
  zero_tiles<2, 2>();
  tile_load<4>(ones, 64);
  tile_load<5>(ones, 64);
  tile_load<6>(ones, 64);
  tile_load<7>(ones, 64);
  for (uint64_t round = 0; round < rounds; round++) {
    Op::template dot<0, 4, 6>();
    Op::template dot<1, 4, 7>();
    Op::template dot<2, 5, 6>();
    Op::template dot<3, 5, 7>();
  }
  return rounds * 4 * 16 * 16 * 16 * kPairs * 2;
}

}  // namespace
