// y = (x w^T) * scale + bias for up to eight tokens: x bf16 or f16 (M, K), w int8 in rows8, a scale an output.
//
// As w4a16_sm80_gemv; the scale is applied to the whole sum. Bound by the read of w.
#include "launch.cuh"

using namespace nybble::cuda;

NYBBLE_KERNEL(w8a16_sm80_gemv, StreamOf, Each<Rows8>, Floats, 1)
