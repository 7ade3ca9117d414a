// Wrappers of the sm_90a instructions that its kernels are built on: mbarrier, TMA copies and wgmma.
// tests/native/emulate_hopper.h implements the same functions for a CPU.
#pragma once

#if defined(NYBBLE_EMULATE_CUDA)
#include "emulate_hopper.h"
#else

#include <cuda.h>

#include "hardware.cuh"

namespace nybble {
namespace cuda {

using TensorMap = CUtensorMap;  // describes a matrix in global memory and the size of a copied box
using Barrier = uint64_t;       // an mbarrier in shared memory

// A phase is complete when `arrivals` threads have arrived and all expected bytes have been written.
__device__ __forceinline__ void init_barrier(Barrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Makes the barriers that this thread initialized visible to the TMA and to the cluster.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}
// Arrives at the same barrier of block `block` of the cluster.
__device__ __forceinline__ void arrive_at(Barrier* barrier, int block) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(barrier)),
      "r"(block)
      : "memory");
}
__device__ __forceinline__ void arrive_expecting(Barrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Waits until the phase with this parity is complete. A new barrier counts as having completed a phase of parity 1.
__device__ __forceinline__ void wait(Barrier* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Copies a box of a matrix, starting at a column and row, with zeros outside the matrix; signals the barrier.
__device__ __forceinline__ void copy_box(void* to, const TensorMap* map, Barrier* barrier, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row)
      : "memory");
}
// The same by multicast: to the same shared memory offset in each block of the bit mask `blocks`, signalling this
// barrier in each.
__device__ __forceinline__ void copy_box_to(uint16_t blocks, void* to, const TensorMap* map, Barrier* barrier,
                                            int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "h"(blocks)
      : "memory");
}
// Copies contiguous bytes; size and addresses are multiples of 16.
__device__ __forceinline__ void copy_bytes(void* to, const void* from, int bytes, Barrier* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

__device__ __forceinline__ void store_shared_8(void* to, uint32_t first, uint32_t second) {
  *static_cast<uint2*>(to) = make_uint2(first, second);
}
__device__ __forceinline__ int block_of_cluster() {
  int block;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(block));
  return block;
}
// A barrier for all threads of the cluster; warps need not be converged.
__device__ __forceinline__ void sync_blocks() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
__device__ __forceinline__ uint32_t from_lane_xor(uint32_t value, int mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}
// A barrier for the 128 threads of a warpgroup; `name` (1 to 15) identifies the warpgroup.
__device__ __forceinline__ void sync_warpgroup(int name) { asm volatile("bar.sync %0, 128;" ::"r"(name) : "memory"); }

// Lowers or raises the number of registers of each thread of a warpgroup (setmaxnreg).
template <int Registers>
__device__ __forceinline__ void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
__device__ __forceinline__ void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

// Orders earlier register writes before the next wgmma, which reads or accumulates to them.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until all but the last `Pending` commits are complete. c may then be read unless a pending one adds to it.
template <int Pending, int N>
__device__ __forceinline__ void wgmma_wait(int32_t (&c)[N]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+r"(c[i])::"memory");  // c must not be read earlier
}

#define NYBBLE_R4(c, i) "+r"(c[i]), "+r"(c[i + 1]), "+r"(c[i + 2]), "+r"(c[i + 3])
#define NYBBLE_R16(c, i) NYBBLE_R4(c, i), NYBBLE_R4(c, i + 4), NYBBLE_R4(c, i + 8), NYBBLE_R4(c, i + 12)
#define NYBBLE_R32(c, i) NYBBLE_R16(c, i), NYBBLE_R16(c, i + 16)
#define NYBBLE_NAMES_0_31                                                                                              \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30," \
  "%31"
#define NYBBLE_NAMES_32_63                                                                                            \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%" \
  "60,%61,%62,%63"
#define NYBBLE_NAMES_64_127                                                                                          \
  "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91," \
  "%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115," \
  "%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

// c[64][256] (+)= a[64][32] b[256][32]^T per warpgroup, 8-bit integers in shared memory, given by descriptors.
// add: 0 overwrites c. c[4 j + 2 h + e] is row 16 warp + g + 8 h, column 8 j + 2 t + e.
__device__ __forceinline__ void wgmma_s8(int32_t (&c)[128], uint64_t a, uint64_t b, int add) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 {" NYBBLE_NAMES_0_31 "," NYBBLE_NAMES_32_63
      "," NYBBLE_NAMES_64_127 "}, %128, %129, add;\n}"
      : NYBBLE_R32(c, 0), NYBBLE_R32(c, 32), NYBBLE_R32(c, 64), NYBBLE_R32(c, 96)
      : "l"(a), "l"(b), "r"(add));
}
// The same with 128 columns.
__device__ __forceinline__ void wgmma_s8(int32_t (&c)[64], uint64_t a, uint64_t b, int add) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {" NYBBLE_NAMES_0_31 "," NYBBLE_NAMES_32_63
      "}, %64, %65, add;\n}"
      : NYBBLE_R32(c, 0), NYBBLE_R32(c, 32)
      : "l"(a), "l"(b), "r"(add));
}
// The same with 64 columns and a in registers: a[h] and a[2 + h] are row 16 warp + g + 8 h, k from 4 t and 16 + 4 t.
__device__ __forceinline__ void wgmma_s8(int32_t (&c)[32], const uint32_t* a, uint64_t b, int add) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 {" NYBBLE_NAMES_0_31 "}, {%32,%33,%34,%35}, %36, add;\n}"
      : NYBBLE_R32(c, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

#undef NYBBLE_R4
#undef NYBBLE_R16
#undef NYBBLE_R32
#undef NYBBLE_NAMES_0_31
#undef NYBBLE_NAMES_32_63
#undef NYBBLE_NAMES_64_127

}  // namespace cuda
}  // namespace nybble

#endif
