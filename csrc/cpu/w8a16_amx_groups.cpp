// y = sum_g scale_g * (x . (u8 codes - zero_point)) + bias, bfloat16 activations as lines; layout n16k4g.
// code - zero_point becomes bfloat16, which holds it exactly, once per K block of a pass; then as w8a8 on tdpbf16ps,
// with 32 k a step. Only the float32 sums are rounded. Bound by the multiply, by the scaling for groups of 32, and by
// memory and the decoding at few rows. Of 256 x 4096 x 4096 on 2 threads of an Emerald Rapids 8 times the speed of
// w8a16_avx512bf16_groups with groups of 128, 5 times with 32.
#include "tile_amx.h"
// clang-format off
#include "tile_amx_run.h"
#include "tile_bf16_codes.h"
// clang-format on

namespace {

struct Bytes : Grouped<Bytes> {
  using Op = Bf16Op;
  static constexpr bool kDecodes = true;
  static int64_t step(const NybbleLinearArgs* a) { return a->groups > 1 && a->group < 32 ? a->group : 32; }

  static void decode(const NybbleLinearArgs* a, int64_t column, int64_t begin, int64_t end, uint8_t* to) {
    const uint8_t* w = codes_at(a, column) + begin / 4 * kLine;
    for (int64_t k = begin; k < end; k += a->group) {
      const VI origin = Bf16Bytes::origin(a, column, k / a->group);
      for (int64_t i = 0; i < a->group / 4; i++, w += kLine, to += 2 * kLine) {
        const VI codes = vi_load(w);
        vi_store(to, Bf16Bytes::pair<0>(codes, origin, codes));
        vi_store(to + kLine, Bf16Bytes::pair<1>(codes, origin, codes));
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

extern "C" NybbleStatus nybble_w8a16_amx_groups(const NybbleLinearArgs* args) {
  return run_amx<Bytes, block_rows::w8a16_amx_groups>(args);
}
