// Where things lie and who does what: the index maths of the CUDA kernels, as functions that the host can run too.
//
// A warp multiplies tiles of 64 output features x 64 inputs, as four fragments of mma.sync's left operand. Lane 4 g + t
// holds of fragment f the rows 8 g + 2 f and 8 g + 2 f + 1 (the fragment's rows g and g + 8), so that its eight rows
// are neighbours. Its inputs, by half h of the tile:
//
//   frag4  32 h + 8 t ..+ 7     two steps of m16n8k16, or one of m16n8k32; groups of 32 are halves
//   rows8  16 t + 8 h ..+ 7     so that 16 bytes of a row are one lane's
//   quads  two of each four: mma.sp's quad q of m16n8k32 is the half's quad 4 (q % 2) + q / 2, so that the chunks of
//          two lanes hold what both need
//
// A chunk is 16 bytes of an activation row: eight 16-bit inputs, a lane's of one half. The right operand's fragments
// are read from chunks: step s of a half takes words 2 s and 2 s + 1.
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

constexpr int kTile = 64;  // rows, and inputs, of a tile
constexpr int kLanes = 32;
constexpr int kWarps = 4;  // of a block
constexpr int kThreads = kWarps * kLanes;
constexpr int kMostShared = 99 << 10;  // bytes of shared memory of a block on compute capability 8.6, 8.9 and 12.0
constexpr int kTokens = 8;             // columns of an mma
constexpr int kMaxSplits = NYBBLE_MAX_SPLITS;  // blocks of a portable cluster
constexpr int kMinBlocks = 8;                  // tiles along K that a split should have
constexpr int kPad = 4;                        // floats after each token's sums

struct alignas(16) Vector {
  uint32_t w[4];
};

NYBBLE_HD constexpr int group_of_lane(int lane) { return lane >> 2; }
NYBBLE_HD constexpr int thread_in_group(int lane) { return lane & 3; }

// Byte at which a lane's first vector of a tile lies, where a tile is `vectors` rows of one 16-byte vector a lane: four
// of frag4's and quads8's codes, one a fragment; two of quads4's, one a half; eight of quads16's; one of places.
NYBBLE_HD constexpr int64_t tile_offset(int64_t tile, int64_t block, int64_t blocks, int vectors, int lane) {
  return ((tile * blocks + block) * vectors * kLanes + lane) * 16;
}

// Byte of rows8's codes: 16 of a lane's row 8 g + v.
NYBBLE_HD constexpr int64_t rows8_offset(int64_t tile, int64_t block, int64_t k_padded, int v, int lane) {
  return (tile * kTile + 8 * group_of_lane(lane) + v) * k_padded + block * kTile + 16 * thread_in_group(lane);
}

// Chunk of a tile's eight that holds a lane's inputs of a half.
NYBBLE_HD constexpr int frag4_chunk(int half, int lane) { return 4 * half + thread_in_group(lane); }
NYBBLE_HD constexpr int rows8_chunk(int half, int lane) { return 2 * thread_in_group(lane) + half; }

// Where a chunk of a token lies among the token's eight in shared memory: eight lanes read two tokens' at once, whose
// chunks must fill all banks.
NYBBLE_HD constexpr int swizzle(int token, int chunk) { return chunk ^ (5 * (token & 1)); }

// Bytes that an activation row of k inputs holds of the chunk from `at` on; the rest of its 16 are read as 0.
NYBBLE_HD constexpr int chunk_bytes(int k, int at, int element_bytes) {
  const int most = 16 / element_bytes, left = k - at < 0 ? 0 : k - at;
  return (left < most ? left : most) * element_bytes;
}

// Where the quantization puts input k for frag4: of a 64-input block, a lane's 16 codes of both halves lie together,
// each four in the order in which a word of frag4 has its weights. Eight neighbours keep to eight bytes.
NYBBLE_HD constexpr int64_t permuted_code(int64_t k) {
  const int half = static_cast<int>(k >> 5 & 1), t = static_cast<int>(k >> 3 & 3), u = static_cast<int>(k >> 2 & 1);
  const int place = static_cast<int>((k & 1) << 1 | (k >> 1 & 1));
  return (k & ~int64_t{63}) + 16 * t + 8 * half + 4 * u + place;
}

// Where the quantization puts input k for frag4 as wgmma's left operand: word (half, u) of a lane meets the four inputs
// from 32 half + 16 u + 4 t on, each four in the order in which the word has its weights.
NYBBLE_HD constexpr int64_t wgmma_code(int64_t k) {
  const int t = static_cast<int>(k >> 3 & 3), u = static_cast<int>(k >> 2 & 1);
  const int place = static_cast<int>((k & 1) << 1 | (k >> 1 & 1));
  return (k & ~int64_t{31}) + 16 * u + 4 * t + place;
}

// Steps along K of a split: [begin, end).
struct Range {
  int begin, end;
};
NYBBLE_HD constexpr Range split_range(int64_t steps, int splits, int split) {
  return {static_cast<int>(steps * split / splits), static_cast<int>(steps * (split + 1) / splits)};
}

// Four neighbouring outputs of a token among a block's sums.
struct Item {
  int token, row;
};
NYBBLE_HD constexpr Item item_of(int index, int rows) { return {index / (rows / 4), 4 * (index % (rows / 4))}; }
NYBBLE_HD constexpr int sum_offset(int token, int row, int rows) { return token * (rows + kPad) + row; }

// Eights of tokens of a block: the least of `least`, twice that and so on that takes m, at most `most`.
constexpr int token_groups(int64_t m, int least, int most) {
  int groups = least;
  while (groups < most && groups * kTokens < m) groups *= 2;
  return groups;
}

// Time that a block takes besides its tiles along K, in tiles: to start, to fill its ring, to add its sums.
constexpr int64_t kBlockCost = 4;

// The cut of a product into blocks of `rows` outputs and `tokens` tokens. slots[s]: blocks that the device runs at once
// where s of them share K. Splits are chosen by waves: the fewest tiles that follow each other. Only N and K decide
// along K, so that blocks of as many tokens give a token the same sum in every batch.
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
