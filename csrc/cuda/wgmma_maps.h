// Index maths of the wgmma kernels, as functions for device and host.
//
// An operand tile in shared memory has rows of 128 bytes, which are 128 8-bit inputs, in the TMA's 128-byte swizzle:
// 16-byte chunk c of row r is stored at chunk c ^ (r % 8). A wgmma step takes 32 inputs, so steps are 32 bytes apart.
// Tiles are aligned to 1024 bytes.
#pragma once

#include "maps.h"

namespace nybble {
namespace cuda {

constexpr int kWarpgroup = 4 * kLanes;
constexpr int kRowBytes = 128;    // row of an operand tile
constexpr int kStepBytes = 32;    // part of a row that one wgmma takes
constexpr int kAtomBytes = 1024;  // eight rows: period of the swizzle
constexpr int kTallGroup = 8;     // rows of output tiles that are computed at the same time

// The wgmma descriptor of an operand in shared memory: start address in units of 16 bytes, distance between groups of
// eight rows, 128-byte swizzle. Adding n moves the operand by 16 n bytes.
NYBBLE_HD constexpr uint64_t operand(uint32_t shared_address) {
  return (shared_address >> 4 & 0x3FFF) | uint64_t{1} << 16 | uint64_t{kAtomBytes >> 4} << 32 | uint64_t{1} << 62;
}

// Bytes from an address to the next multiple of kAtomBytes.
NYBBLE_HD constexpr uint32_t to_atom(uint32_t shared_address) { return (0u - shared_address) & (kAtomBytes - 1); }

// Row and column of output tile i, ordered down kTallGroup rows of tiles, then to the next column, so that tiles
// computed at the same time share operands in the L2 cache.
struct OutputTile {
  int64_t row, column;
};
NYBBLE_HD constexpr OutputTile output_tile(int64_t i, int64_t tall, int64_t wide) {
  const int64_t first = i / (kTallGroup * wide) * kTallGroup, within = i % (kTallGroup * wide);
  const int64_t height = tall - first < kTallGroup ? tall - first : kTallGroup;
  return {first + within % height, within / height};
}

}  // namespace cuda
}  // namespace nybble
