// The index maths of the kernels for wgmma, as functions that the host can run too.
//
// An operand tile in shared memory has rows of 128 bytes, of 128 8-bit inputs, as the TMA writes them with its 128-byte
// swizzle: the 16-byte chunk c of row r lies at chunk c ^ (r % 8). wgmma takes 32 inputs a step, so a step starts 32
// bytes after the last. Tiles start at multiples of 1024 bytes.
#pragma once

#include "maps.h"

namespace nybble {
namespace cuda {

constexpr int kWarpgroup = 4 * kLanes;
constexpr int kRowBytes = 128;    // of an operand tile
constexpr int kStepBytes = 32;    // that a wgmma takes of a row
constexpr int kAtomBytes = 1024;  // eight rows, after which the swizzle repeats
constexpr int kTallGroup = 8;     // rows of output tiles that are computed side by side

// What wgmma calls the descriptor of an operand in shared memory: the address of its first byte in units of 16, the
// bytes from eight rows to the next, the 128-byte swizzle. Adding n moves it by 16 n bytes.
NYBBLE_HD constexpr uint64_t operand(uint32_t shared_address) {
  return (shared_address >> 4 & 0x3FFF) | uint64_t{1} << 16 | uint64_t{kAtomBytes >> 4} << 32 | uint64_t{1} << 62;
}

// Bytes from an address to the next tile's.
NYBBLE_HD constexpr uint32_t to_atom(uint32_t shared_address) { return (0u - shared_address) & (kAtomBytes - 1); }

// Row and column of output tile i: down a few rows of tiles, then to the next column, so that tiles computed at the
// same time share what they read in the second-level cache.
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
