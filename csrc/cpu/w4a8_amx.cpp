// y = sum_g scale_g * (x codes . (u4 codes - zero_point)) * act_scale + bias; layout n16k8, activations as lines of
// codes. Nibbles become signed bytes less their zero point, once per K block of a pass, so that no sum of activations
// is needed; then as w8a8 on tdpbssd. Each group's 16 x 16 int32 sums pass through the stack to be scaled in float32:
// at 32 rows by 32 columns and groups of 128, 128 cycles of multiplies against 64 stores and 64 fused steps of vectors,
// which other tiles' multiplies can hide. Bound by the multiply for groups of 128 and more, by the scaling for groups
// of 32. On 2 cores of Emerald Rapids: 2,070 GOP/s at 256 x 4096 x 4096 with groups of 128, 23 % of the multiply's peak
// and twice the VNNI kernel; 800 with groups of 32, no faster than that.
#include "tile_amx.h"
// clang-format off
#include "tile_amx_run.h"
// clang-format on

namespace {

struct Nibbles : Grouped<Nibbles> {
  using Op = CodesOp;
  static constexpr bool kDecodes = true;
  static int64_t step(const NybbleLinearArgs* a) { return a->groups > 1 && a->group < 64 ? a->group : 64; }

  static void decode(const NybbleLinearArgs* a, int64_t column, int64_t begin, int64_t end, uint8_t* to) {
    const VI mask = vi_set1(0x0f0f0f0f);
    const uint8_t* w = codes_at(a, column) + begin / 8 * kLine;
    for (int64_t k = begin; k < end; k += a->group) {
      const VI zero = zero_points(a, column, k / a->group);
      for (int64_t i = 0; i < a->group / 8; i++, w += kLine, to += 2 * kLine) {
        const VI codes = vi_load(w);
        vi_store(to, vi_sub8(vi_and(codes, mask), zero));
        vi_store(to + kLine, vi_sub8(vi_and(vi_shift_right<4>(codes), mask), zero));
      }
    }
    const int64_t lines = (whole_steps(end - begin, step(a)) - (end - begin)) / 4;
    memset(to, 0, static_cast<size_t>(lines * kLine));
  }

  template <int R>
  NYBBLE_INLINE void finish(const NybbleLinearArgs* a, int64_t row, int64_t column, const VF (&sum)[R][1]) {
    finish_w4a8<R, 1>(a, row, column, sum, 0);
  }

 private:
  // The zero point of each column in each of its four bytes.
  NYBBLE_INLINE VI zero_points(const NybbleLinearArgs* a, int64_t column, int64_t g) {
    if (!a->zero_point) return vi_set1(a->minimum ? 0 : 0x08080808);
    return vi_mul(vi_load_u8(a->zero_point + group_at(a, column, g)), vi_set1(0x01010101));
  }
};

}  // namespace

extern "C" NybbleStatus nybble_w4a8_amx(const NybbleLinearArgs* args) {
  return run_amx<Nibbles, block_rows::w4a8_amx>(args);
}
