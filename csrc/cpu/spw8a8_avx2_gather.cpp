// y = (x codes . w codes) * act_scale * scale + bias; layout gather8, activations as code + 128 in lines of 64 ks.
// Built on eight vpshufb for 32 weights that are not 0, and vpmaddwd over widened bytes: exact for every input. Bound
// by about 31 instructions for those and each row, at one row with as many to prepare their places, and by memory
// there. Takes 8.7 cycles for 32 on Zen 5 (12 at one row), some of them for registers that AVX2 lacks: 1.3 times as
// fast as w8a8_avx2 at 16 of 128, 0.7 times at 80 % of zeros.
#include "tile_avx2.h"
// clang-format off
#include "tile_gather.h"
// clang-format on

namespace {

struct Codes {
  VI even, odd;

  explicit Codes(VI codes)
      : even(_mm256_srai_epi16(_mm256_slli_epi16(codes, 8), 8)), odd(_mm256_srai_epi16(codes, 8)) {}

  void dot(VI& acc, VI x) const {
    dot_s16(acc, _mm256_and_si256(x, _mm256_set1_epi16(255)), even);
    dot_s16(acc, _mm256_srli_epi16(x, 8), odd);
  }
};

}  // namespace

#include "tile_shuffle.h"

extern "C" NybbleStatus nybble_spw8a8_avx2_gather(const NybbleLinearArgs* args) {
  return run_gather<GatherTile, 4>(args);
}
