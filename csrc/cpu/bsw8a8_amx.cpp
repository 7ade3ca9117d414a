// y = (x codes . w codes) * act_scale * scale + bias; layout blocks8, activations as lines of codes.
// Built on tdpbssd, with the register tile of w8a8 over the stored blocks of a strip. A step is the largest part of a
// block that no line of activations cuts: 32 k for blocks of 32, for which a multiply does half of what it could.
// Bound by the multiply: 1024 operations a cycle for blocks of 32 k, by Intel's manual.
// Tested, but not measured, on a CPU with AMX.
#include "tile_amx.h"
// clang-format off
#include "tile_amx_run.h"
#include "tile_blocks.h"
// clang-format on

namespace {

// K of a step: the largest power of two that divides a block's, up to a line.
inline int64_t step_of(const NybbleLinearArgs* a) {
  const int64_t power = a->block_k & -a->block_k, most = NYBBLE_LINE_K;
  return power < most ? power : most;
}

struct Codes {
  template <int T, int V>
  static void run(const NybbleLinearArgs* a, const KBlock& k, const TilePlace& at) {
    const Stored blocks(a, Place{at.row, at.column, k.begin, k.end});
    const int64_t step = step_of(a), block_k = a->block_k, line_bytes = at.rows * NYBBLE_LINE_K;
    // K that steps cover at equal distances: whole lines, or one step of each block.
    const int64_t even = step == NYBBLE_LINE_K || step == block_k ? block_k : step;
    if (k.begin == 0)
      zero_tiles<T, V>();
    else
      load_tiles<CodesOp, T, V>(slot_at<CodesOp>(a, at));
    for (uint64_t block = blocks.begin; block < blocks.end; block++) {
      const uint8_t *first = block_at(a, block, at.column), *second = V > 1 ? block_at(a, block, at.column + W) : first;
      for (int64_t i = 0; i < block_k; i += even) {
        TileOperands o{lines_at<CodesOp>(a, at, a->index[block] * block_k + i),
                       {first + i * NYBBLE_TILE_N, second + i * NYBBLE_TILE_N},
                       line_bytes,
                       step * NYBBLE_TILE_N};
        multiply_tiles<CodesOp, T, V>(o, even / step);
      }
    }
    if (k.end < a->k_padded) return store_tiles<CodesOp, T, V>(slot_at<CodesOp>(a, at));
    finish_tiles<Codes, CodesOp, T, V>(a, at);
  }

  template <int R>
  NYBBLE_INLINE void finish(const NybbleLinearArgs* a, int64_t row, int64_t column, const VI (&acc)[R][1]) {
    finish_w8a8<R, 1>(a, row, column, acc, 0);
  }
};

}  // namespace

extern "C" NybbleStatus nybble_bsw8a8_amx(const NybbleLinearArgs* a) {
  static_assert(block_rows::bsw8a8_amx == kMostRows);
  const int64_t ks = a->k_padded;
  if (a->block_rows > kMostRows || !holds_sums(a, most_strips(a) * slots_of(a->block_n))) return NYBBLE_UNSUPPORTED;
  TileScope tiles;
  each_pass(a, [&](int64_t strip, int64_t end, int64_t) {
    for (int64_t k = 0; k < ks; k += a->k_block) {
      int64_t slot = 0;
      for (int64_t block = a->block_begin; block < a->block_end; block++) {
        const TilePlace rows = enter_rows(a, tiles, block, step_of(a));
        for (int64_t s = strip; s < end; s++, slot += slots_of(a->block_n))
          run_row_block<Codes>(a,
                               KBlock{s * a->block_n, (s + 1) * a->block_n, k,
                                      k + a->k_block < ks ? k + a->k_block : ks, Streams(a->codes, 0), 0},
                               rows, slot);
      }
    }
  });
  return NYBBLE_OK;
}
