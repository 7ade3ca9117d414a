// y = (q . w - act_zero * column_sum) * (act_scale * scale) + bias for up to 64 tokens: q int8 activation codes,
// quantized dynamically with one scale and zero point per token; w int8 (N, K) in layout rows8.
//
// Built on mma.sync m16n8k32, s8 x s8; the codes are the operands without conversion. int32 sums are exact, so that
// split-K is bit-identical to the CPU kernels. Bound by reading w.
#include "launch.cuh"

using namespace nybble::cuda;

NYBBLE_KERNEL(w8a8_sm80, TilesOf, Each<Rows8>, Each<S8>, 1, 2, 4, 8)
