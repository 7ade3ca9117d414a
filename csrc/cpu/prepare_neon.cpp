// Packs activations into panels: per-token quantization, or widening to float32. Bound by reading x.
#include "tile_neon.h"
// clang-format off
#include "tile_prepare.h"
// clang-format on

extern "C" NybbleStatus nybble_prepare_neon(const NybblePrepareArgs* args) { return prepare(args); }
