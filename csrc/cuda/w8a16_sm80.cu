// y = (x w^T) * scale + bias for up to 32 tokens a block: x bf16 or f16 (M, K), w int8 in rows8, a scale an output.
//
// As w4a16_sm80; the scale is applied to the whole sum.
#include "launch.cuh"

NYBBLE_TILES(w8a16_sm80, Rows8, F16)
