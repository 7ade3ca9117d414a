// The families of 4-bit and 3-bit weights and bfloat16 activations on tiles of AMX: codes become pairs of bfloat16, as
// Pairs of tile_bf16_codes.h says, once per K block of a pass.
#pragma once

#include "tile_amx_run.h"
#include "tile_bf16_codes.h"

namespace {

template <class Pairs>
struct NibblePairs : Grouped<NibblePairs<Pairs>> {
  using Op = Bf16Op;
  static constexpr bool kDecodes = true;
  static int64_t step(const NybbleLinearArgs* a) { return a->groups > 1 && a->group < 32 ? a->group : 32; }

  static void decode(const NybbleLinearArgs* a, int64_t column, int64_t begin, int64_t end, uint8_t* to) {
    const VI entries = Pairs::table(a);
    NoPrefetcher none;
    const uint8_t* w[] = {codes_at(a, column) + begin * a->code_bits * (NYBBLE_TILE_N / 8)};
    for (int64_t k = begin; k < end; k += a->group) {
      const VI origin = Pairs::origin(a, column, k / a->group);
      with_nibbles(a, w, none, [&](auto& from, auto&) __attribute__((always_inline)) {
        for (int64_t i = 0; i < a->group / 8; i++, from[0] += kLine, to += 4 * kLine) {
          const VI codes = vi_load(from[0]);
          vi_store(to, Pairs::template pair<0>(codes, origin, entries));
          vi_store(to + kLine, Pairs::template pair<2>(codes, origin, entries));
          vi_store(to + 2 * kLine, Pairs::template pair<1>(codes, origin, entries));
          vi_store(to + 3 * kLine, Pairs::template pair<3>(codes, origin, entries));
        }
      });
    }
    memset(to, 0, static_cast<size_t>((whole_steps(end - begin, step(a)) - (end - begin)) / 2 * kLine));
  }

  template <int R>
  NYBBLE_INLINE void finish(const NybbleLinearArgs* a, int64_t row, int64_t column, const VF (&sum)[R][1]) {
    finish_w4a16<R, 1>(a, row, column, sum, 0);
  }
};

}  // namespace
