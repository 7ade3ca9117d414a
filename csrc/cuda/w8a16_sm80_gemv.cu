// y = (x w^T) * scale + bias for up to 8 tokens: x bf16 or f16 (M, K), w int8 in layout rows8, one scale per output.
//
// Like w4a16_sm80_gemv, but the scale is applied in the epilogue. Bound by reading w.
#include "launch.cuh"

using namespace nybble::cuda;

NYBBLE_KERNEL(w8a16_sm80_gemv, StreamOf, Each<Rows8>, Floats, 1)
