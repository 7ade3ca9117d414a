// The family of 4-bit weights and 8-bit activations on tiles of AMX: nibbles become signed bytes less their zero point,
// once per K block of a pass.
#pragma once

#include "tile_amx_run.h"

namespace {

struct Nibbles : Grouped<Nibbles> {
  using Op = CodesOp;
  static constexpr bool kDecodes = true;
  static int64_t step(const NybbleLinearArgs* a) { return a->groups > 1 && a->group < 64 ? a->group : 64; }

  static void decode(const NybbleLinearArgs* a, int64_t column, int64_t begin, int64_t end, uint8_t* to) {
    const VI mask = vi_set1(0x0f0f0f0f);
    NoPrefetcher none;
    const uint8_t* w[] = {codes_at(a, column) + begin * a->code_bits * (NYBBLE_TILE_N / 8)};
    for (int64_t k = begin; k < end; k += a->group) {
      const VI zero = zero_points(a, column, k / a->group);
      with_nibbles(a, w, none, [&](auto& from, auto&) __attribute__((always_inline)) {
        for (int64_t i = 0; i < a->group / 8; i++, from[0] += kLine, to += 2 * kLine) {
          const VI codes = vi_load(from[0]);
          vi_store(to, vi_sub8(vi_and(codes, mask), zero));
          vi_store(to + kLine, vi_sub8(vi_and(vi_shift_right<4>(codes), mask), zero));
        }
      });
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
    if (!a->zero_point) return vi_set1(a->minimum ? 0 : kMiddle * 0x01010101);
    return vi_mul(vi_load_u8(a->zero_point + group_at(a, column, g)), vi_set1(0x01010101));
  }
};

}  // namespace
