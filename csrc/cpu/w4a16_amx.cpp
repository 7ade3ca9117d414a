// y = sum_g scale_g * (x . (u4 codes - zero_point)) + bias, bfloat16 activations as lines; layout n16k8.
// code - zero_point becomes bfloat16, which holds it exactly, once per K block of a pass; then as w4a8 on tdpbf16ps,
// with 32 k a step: 128 cycles of multiplies for each 64 k of 32 rows by 32 columns. Only the float32 sums are rounded.
// Bound by the multiply, by the scaling for groups of 32, and by memory and the decoding up to about 32 rows.
// On 2 cores of Emerald Rapids: 1,160 GFLOP/s at 1024 x 4096 x 4096 with groups of 128, 26 % of the multiply's peak.
#include "tile_amx.h"
// clang-format off
#include "tile_amx_run.h"
#include "tile_bf16_codes.h"
// clang-format on

namespace {

template <bool kSymmetric>
struct Nibbles : Grouped<Nibbles<kSymmetric>> {
  using Op = Bf16Op;
  using Pairs = Bf16Nibbles<kSymmetric>;
  static constexpr bool kDecodes = true;
  static int64_t step(const NybbleLinearArgs* a) { return a->groups > 1 && a->group < 32 ? a->group : 32; }

  static void decode(const NybbleLinearArgs* a, int64_t column, int64_t begin, int64_t end, uint8_t* to) {
    const VI entries = Pairs::table(a);
    const uint8_t* w = codes_at(a, column) + begin / 8 * kLine;
    for (int64_t k = begin; k < end; k += a->group) {
      const VI origin = Pairs::origin(a, column, k / a->group);
      for (int64_t i = 0; i < a->group / 8; i++, w += kLine, to += 4 * kLine) {
        const VI codes = vi_load(w);
        vi_store(to, Pairs::template pair<0>(codes, origin, entries));
        vi_store(to + kLine, Pairs::template pair<2>(codes, origin, entries));
        vi_store(to + 2 * kLine, Pairs::template pair<1>(codes, origin, entries));
        vi_store(to + 3 * kLine, Pairs::template pair<3>(codes, origin, entries));
      }
    }
    memset(to, 0, static_cast<size_t>((whole_steps(end - begin, step(a)) - (end - begin)) / 2 * kLine));
  }

  template <int R>
  NYBBLE_INLINE void finish(const NybbleLinearArgs* a, int64_t row, int64_t column, const VF (&sum)[R][1]) {
    finish_w4a16<R, 1>(a, row, column, sum, 0);
  }
};

}  // namespace

extern "C" NybbleStatus nybble_w4a16_amx(const NybbleLinearArgs* args) {
  return args->zero_point ? run_amx<Nibbles<false>, block_rows::w4a16_amx>(args)
                          : run_amx<Nibbles<true>, block_rows::w4a16_amx>(args);
}
