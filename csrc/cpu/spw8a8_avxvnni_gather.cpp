// y = (x codes . w codes) * act_scale * scale + bias; layout gather8, activations as code + 128 in lines of 64 ks.
// Built on eight vpshufb for 32 weights that are not 0, and vpdpbusd. Bound as spw8a8_avx2_gather.
// Takes 7.1 cycles for 32 on Zen 5 (9 at one row): at one row from memory 2.8 times as fast as w8a8_avxvnni at 16 of
// 128, at many 0.7 times.
#include "tile_avxvnni.h"
// clang-format off
#include "tile_gather.h"
// clang-format on

namespace {

struct Codes {
  VI codes;

  explicit Codes(VI s8) : codes(s8) {}

  void dot(VI& acc, VI x) const { dot_u8s8(acc, x, codes); }
};

}  // namespace

#include "tile_shuffle.h"

extern "C" NybbleStatus nybble_spw8a8_avxvnni_gather(const NybbleLinearArgs* args) {
  return run_gather<GatherTile, 4>(args);
}
