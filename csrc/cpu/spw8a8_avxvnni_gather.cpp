// y = (x codes . w codes) * act_scale * scale + bias; layout gather8, activations as code + 128 in lines of 64 k.
// Built on eight vpshufb for 32 nonzero weights, and vpdpbusd. Same bounds as spw8a8_avx2_gather.
// Takes 7.1 cycles per 32 weights and row on Zen 5 (9 at one row). With 16 of 128 weights stored, 2.8 times as fast as
// w8a8_avxvnni at one row with weights in memory, 0.7 times at many rows.
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
  return run_gather<GatherTile, block_rows::spw8a8_avxvnni_gather>(args);
}
