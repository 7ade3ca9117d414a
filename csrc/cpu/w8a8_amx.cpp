// y = (x codes . w codes) * act_scale * scale + bias; layout n16k4, activations as lines of codes.
// Built on tdpbssd: sixteen lines of n16k4 are a tile of weights as they lie in memory, and the codes are signed on
// both sides, so nothing is corrected. 32 rows by 32 columns: four multiplies of 16 x 16 sums by 64 k for four tile
// loads, two loads of lines a cycle. Bound by the multiply, 16 cycles by Intel's manual, that is 2048 operations a
// cycle; by the L2 cache, 4 KB for the 64 cycles of a step, where neither operand is in L1; and by memory up to about
// 32 rows. On 2 cores of Emerald Rapids: 3,500 GOP/s at 1024 x 4096 x 4096, 39 % of the multiply's peak. Loads and
// multiplies alone reach it from L1, and with one operand from L2, but 75 % of it with both from L2; L3 and memory,
// 20 GB/s a core, take most of the rest. Software prefetching of the next rows made it slower: its misses take the
// line buffers of the tile loads.
#include "tile_amx.h"
// clang-format off
#include "tile_amx_run.h"
// clang-format on

namespace {

struct Codes : WholeRows<Codes> {
  using Op = CodesOp;
  static constexpr bool kDecodes = false;
  static int64_t step(const NybbleLinearArgs*) { return 64; }

  template <int R>
  NYBBLE_INLINE void finish(const NybbleLinearArgs* a, int64_t row, int64_t column, const VI (&acc)[R][1]) {
    finish_w8a8<R, 1>(a, row, column, acc, 0);
  }
};

}  // namespace

extern "C" NybbleStatus nybble_w8a8_amx(const NybbleLinearArgs* args) {
  return run_amx<Codes, block_rows::w8a8_amx>(args);
}
