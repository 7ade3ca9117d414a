// y = (q . w - act_zero * column_sum) * (act_scale * scale) + bias for up to 64 tokens: q int8 codes of dynamically
// rounded activations, one scale and zero a token; w int8 (N, K) in rows8.
//
// mma.sync m16n8k32, s8 x s8, whose operands are the codes as they lie; int32 sums, exact, so that splits of K give the
// CPU's bits. Bound by the read of w.
#include "launch.cuh"

using namespace nybble::cuda;

NYBBLE_KERNEL(w8a8_sm80, TilesOf, Each<Rows8>, Each<S8>, 1, 2, 4, 8)
