// y = sum_g scale_g * (x codes . u8 codes - zero_point * act_sum) * act_scale + bias; layout n16k4g, activations as
// lines of codes. Built on tdpbsud: lines of n16k4g are a tile of unsigned weights as they lie in memory, so nothing is
// decoded. Each group's 16 x 16 int32 sums pass through the stack to be corrected by the zero points and scaled in
// float32, which bounds it: of 256 x 4096 x 4096 on 2 threads of an Emerald Rapids 1.4 times the speed of
// w8a8_avx512vnni_groups with groups of 128, the same with 64, 0.7 times with 32. Groups must be 16, 32 or multiples
// of 64.
#include "tile_amx.h"
// clang-format off
#include "tile_amx_run.h"
// clang-format on

namespace {

struct Bytes : Grouped<Bytes> {
  using Op = UnsignedOp;
  static constexpr bool kDecodes = false, kStrips = false;  // strips were slower from 32 rows on
  static int64_t step(const NybbleLinearArgs* a) { return a->group < 64 ? a->group : 64; }

  NYBBLE_INLINE VI centred(const NybbleLinearArgs* a, int64_t row, int64_t column, int64_t g, VI sum) {
    return vi_add(sum, GroupStart(a, row, column, g).of_row(0));
  }

  template <int R>
  NYBBLE_INLINE void finish(const NybbleLinearArgs* a, int64_t row, int64_t column, const VF (&sum)[R][1]) {
    finish_w4a8<R, 1>(a, row, column, sum, 0);
  }
};

}  // namespace

extern "C" NybbleStatus nybble_w8a8_amx_groups(const NybbleLinearArgs* args) {
  const bool whole = args->group % (args->group < 64 ? 16 : 64) == 0;  // in steps of the tiles
  return whole ? run_amx<Bytes, block_rows::w8a8_amx_groups>(args) : NYBBLE_UNSUPPORTED;
}
