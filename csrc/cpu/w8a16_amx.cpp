// y = x (s8 codes)^T * scale + bias, bfloat16 activations as lines; layout n16k4. Codes become bfloat16, which holds
// them exactly, once per K block of a pass; then as w8a8 on tdpbf16ps: 1024 operations a cycle by Intel's manual, for
// 32 k a step. Only the float32 sums are rounded: those of each 32 k in the tile, then added to the accumulator. Bound
// by the multiply, and by memory and the decoding up to about 32 rows. On 2 cores of Emerald Rapids: 1,600 GFLOP/s at
// 1024 x 4096 x 4096, 35 % of the multiply's peak.
#include "tile_amx.h"
// clang-format off
#include "tile_amx_run.h"
#include "tile_bf16_codes.h"
// clang-format on

namespace {

struct Codes : WholeRows<Codes> {
  using Op = Bf16Op;
  static constexpr bool kDecodes = true;
  static int64_t step(const NybbleLinearArgs*) { return 32; }

  static void decode(const NybbleLinearArgs* a, int64_t column, int64_t begin, int64_t end, uint8_t* to) {
    const uint8_t* w = codes_at(a, column) + begin / 4 * kLine;
    for (int64_t k = begin; k < end; k += 4, w += kLine, to += 2 * kLine) {
      const VI codes = vi_load(w);
      vi_store(to, bf16_pair<0>(codes));
      vi_store(to + kLine, bf16_pair<1>(codes));
    }
    memset(to, 0, static_cast<size_t>((whole_steps(end - begin, 32) - (end - begin)) / 2 * kLine));
  }

  template <int R>
  NYBBLE_INLINE void finish(const NybbleLinearArgs* a, int64_t row, int64_t column, const VF (&acc)[R][1]) {
    finish_w8a16<R>(a, row, column, acc, 0);
  }
};

}  // namespace

extern "C" NybbleStatus nybble_w8a16_amx(const NybbleLinearArgs* args) {
  return run_amx<Codes, block_rows::w8a16_amx>(args);
}
