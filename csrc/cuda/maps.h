// Index maths of the CUDA kernels: memory layouts and the work of each lane, as functions for device and host.
//
// A warp multiplies tiles of 64 output features x 64 inputs, as four fragments of mma.sync's left operand. Lane 4 g + t
// holds rows 8 g + 2 f and 8 g + 2 f + 1 of fragment f (the fragment's rows g and g + 8), so that its eight rows are
// adjacent. Its inputs, by half h of the tile:
//
//   frag4  8 inputs from 32 h + 8 t   two steps of m16n8k16, or one of m16n8k32; a half is a group of 32
//   rows8  8 inputs from 16 t + 8 h   so that 16 contiguous bytes of a row belong to one lane
//   quads  two of each four inputs: quad q of mma.sp m16n8k32 is quad 4 (q % 2) + q / 2 of the half, so that the chunks
//          of a pair of lanes hold the activations of both
//
// A chunk is 16 bytes of an activation row: the eight 16-bit inputs of a lane in one half. The right operand's
// fragments are read from chunks: step s of a half takes words 2 s and 2 s + 1.
#pragma once

#include <stdint.h>

#include "abi.h"

#if defined(__CUDACC__)
#define NYBBLE_HD __host__ __device__ __forceinline__
#else
#define NYBBLE_HD inline
#endif

namespace nybble {
namespace cuda {

constexpr int kTile = 64;  // rows and inputs of a tile
constexpr int kLanes = 32;
constexpr int kWarps = 4;  // per block
constexpr int kThreads = kWarps * kLanes;
constexpr int kMostShared = 99 << 10;  // shared memory of a block, in bytes, on compute capability 8.6, 8.9 and 12.0
constexpr int kTokens = 8;             // columns of an mma
constexpr int kMaxSplits = NYBBLE_MAX_SPLITS;  // largest portable cluster size
constexpr int kMinBlocks = 8;                  // fewest tiles along K per split
constexpr int kPad = 4;                        // padding after each token's sums, in floats

struct alignas(16) Vector {
  uint32_t w[4];
};

NYBBLE_HD constexpr int group_of_lane(int lane) { return lane >> 2; }
NYBBLE_HD constexpr int thread_in_group(int lane) { return lane & 3; }

// Byte offset of a lane's first vector of a tile that has `vectors` 16-byte vectors per lane: 4 for the codes of frag4
// and quads8 (one per fragment), 2 for quads4 (one per half), 8 for quads16, 1 for the positions.
NYBBLE_HD constexpr int64_t tile_offset(int64_t tile, int64_t block, int64_t blocks, int vectors, int lane) {
  return ((tile * blocks + block) * vectors * kLanes + lane) * 16;
}

// Byte offset in rows8 of a lane's 16 codes of row 8 g + v.
NYBBLE_HD constexpr int64_t rows8_offset(int64_t tile, int64_t block, int64_t k_padded, int v, int lane) {
  return (tile * kTile + 8 * group_of_lane(lane) + v) * k_padded + block * kTile + 16 * thread_in_group(lane);
}

// Index (0 to 7) of the chunk with a lane's inputs of a half.
NYBBLE_HD constexpr int frag4_chunk(int half, int lane) { return 4 * half + thread_in_group(lane); }
NYBBLE_HD constexpr int rows8_chunk(int half, int lane) { return 2 * thread_in_group(lane) + half; }

// Position of a token's chunk among its eight in shared memory: eight lanes read chunks of two tokens at a time, which
// must fall into different banks.
NYBBLE_HD constexpr int swizzle(int token, int chunk) { return chunk ^ (5 * (token & 1)); }

// Bytes of the chunk starting at input `at` that are within a row of k inputs; the rest of the 16 are read as 0.
NYBBLE_HD constexpr int chunk_bytes(int k, int at, int element_bytes) {
  const int most = 16 / element_bytes, left = k - at < 0 ? 0 : k - at;
  return (left < most ? left : most) * element_bytes;
}

// Position of input k in activation codes for frag4 with mma.sync: in a block of 64 inputs, a lane's 16 codes of both
// halves are contiguous, each four in the order of the weights in a frag4 word. Eight adjacent inputs stay within eight
// bytes.
NYBBLE_HD constexpr int64_t permuted_code(int64_t k) {
  const int half = static_cast<int>(k >> 5 & 1), t = static_cast<int>(k >> 3 & 3), u = static_cast<int>(k >> 2 & 1);
  const int place = static_cast<int>((k & 1) << 1 | (k >> 1 & 1));
  return (k & ~int64_t{63}) + 16 * t + 8 * half + 4 * u + place;
}

// Position of input k in activation codes for frag4 with wgmma: word (half, u) of a lane is multiplied with the four
// codes from 32 half + 16 u + 4 t on, in the order of the weights in the word.
NYBBLE_HD constexpr int64_t wgmma_code(int64_t k) {
  const int t = static_cast<int>(k >> 3 & 3), u = static_cast<int>(k >> 2 & 1);
  const int place = static_cast<int>((k & 1) << 1 | (k >> 1 & 1));
  return (k & ~int64_t{31}) + 16 * u + 4 * t + place;
}

// The steps along K of a split: [begin, end).
struct Range {
  int begin, end;
};
NYBBLE_HD constexpr Range split_range(int64_t steps, int splits, int split) {
  return {static_cast<int>(steps * split / splits), static_cast<int>(steps * (split + 1) / splits)};
}

// Four adjacent outputs of a token in a block's sums.
struct Item {
  int token, row;
};
NYBBLE_HD constexpr Item item_of(int index, int rows) { return {index / (rows / 4), 4 * (index % (rows / 4))}; }
NYBBLE_HD constexpr int sum_offset(int token, int row, int rows) { return token * (rows + kPad) + row; }

// Groups of 8 tokens per block: the smallest of least, 2 least, 4 least, ... that covers m, at most `most`.
constexpr int token_groups(int64_t m, int least, int most) {
  int groups = least;
  while (groups < most && groups * kTokens < m) groups *= 2;
  return groups;
}

// Fixed time of a block, in units of a tile along K: to start, to fill the pipeline, to reduce its sums.
constexpr int64_t kBlockCost = 4;

// The grid of a product for blocks of `rows` outputs and `tokens` tokens. slots[s]: blocks that run at the same time
// with K split in s. Chooses the split with the shortest time: waves of blocks times tiles per block. The split depends
// on N and K only, so that a token's result does not depend on its batch.
constexpr NybbleCudaPlan plan(int64_t m, int64_t n_padded, int64_t k_padded, const int32_t* slots, int rows,
                              int tokens) {
  const int64_t columns = (n_padded + rows - 1) / rows, blocks = k_padded / kTile;
  const int64_t token_tiles = (m + tokens - 1) / tokens;
  int64_t best = 0, splits = 1;
  for (int64_t s = 1; s <= kMaxSplits && (s == 1 || blocks / s >= kMinBlocks); s++) {
    if (slots[s] < s) continue;
    const int64_t waves = (columns * s + slots[s] - 1) / slots[s];
    const int64_t time = waves * ((blocks + s - 1) / s + kBlockCost);
    if (best == 0 || time < best) {
      best = time;
      splits = s;
    }
  }
  const int64_t parts = splits == 1 ? 0 : splits * columns * token_tiles * rows * tokens * 4;
  return {static_cast<int32_t>(columns), static_cast<int32_t>(token_tiles), static_cast<int32_t>(splits), parts};
}

}  // namespace cuda
}  // namespace nybble
