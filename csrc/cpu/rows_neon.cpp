// Norms, activations, rotary positions, recurrent cells, weighted sums and lookups of rows: see tile_norm.h,
// tile_activate.h, tile_rotate.h, tile_gates.h, tile_mix.h and tile_lookup.h.
#include "tile_neon.h"
// clang-format off
#include "tile_activate.h"
#include "tile_gates.h"
#include "tile_lookup.h"
#include "tile_mix.h"
#include "tile_norm.h"
#include "tile_rotate.h"
// clang-format on

extern "C" const NybbleRowKernels nybble_rows_neon = {norm, activate, rotate, lstm, gru, mix, lookup};
