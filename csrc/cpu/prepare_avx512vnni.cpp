// Packs activations into panels: per-token quantization, or widening to float32. Bound by reading x.
#include "tile_avx512vnni.h"
// clang-format off
#include "tile_prepare.h"
// clang-format on

extern "C" NybbleStatus nybble_prepare_avx512vnni(const NybblePrepareArgs* args) { return prepare(args); }
