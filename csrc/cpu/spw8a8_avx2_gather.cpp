// y = (x codes . w codes) * act_scale * scale + bias; layout gather8, activations as code + 128 in lines of 64 k.
// Built on eight vpshufb for 32 nonzero weights, and vpmaddwd over widened bytes, exact for every input. Bound by about
// 31 instructions per 32 weights and row; at one row as many again decode the positions, and memory also limits.
// Takes 8.7 cycles per 32 weights and row on Zen 5 (12 at one row), partly register spills. 1.3 times as fast as
// w8a8_avx2 with 16 of 128 weights stored, 0.7 times with 80 % unstructured zeros.
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
  return run_gather<GatherTile, block_rows::spw8a8_avx2_gather>(args);
}
