// Wrappers of the instructions that the kernels are built on. tests/native/emulate_cuda.h implements the same functions
// for a CPU, so that tests run the kernels there.
#pragma once

#if defined(NYBBLE_EMULATE_CUDA)
#include "emulate_cuda.h"
#else

#include <cooperative_groups.h>
#include <cuda_fp16.h>

#include "maps.h"

namespace nybble {
namespace cuda {

__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Copies `bytes` (0 to 16) asynchronously to shared memory and zeroes the rest of 16; complete after `arrived`.
__device__ __forceinline__ void copy_async(Vector* to, const void* from, int bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes));
}
// Copies 16 bytes, or writes 16 zero bytes without reading.
__device__ __forceinline__ void copy_async_or_zero(Vector* to, const void* from, bool there) {
  asm volatile(
      "{\n.reg .pred absent;\nsetp.eq.s32 absent, %2, 0;\ncp.async.cg.shared.global [%0], [%1], 16, absent;\n}" ::"r"(
          shared_address(to)),
      "l"(from), "r"(static_cast<int>(there)));
}
__device__ __forceinline__ void copy_async_8(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared_address(to)), "l"(from));
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until all but the last `Pending` commits of this thread are complete.
template <int Pending>
__device__ __forceinline__ void arrived() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

__device__ __forceinline__ Vector load_shared(const Vector* from) {
  const uint4 v = *reinterpret_cast<const uint4*>(from);
  return {{v.x, v.y, v.z, v.w}};
}
__device__ __forceinline__ void store_shared(void* to, const Vector& v) {
  *static_cast<uint4*>(to) = make_uint4(v.w[0], v.w[1], v.w[2], v.w[3]);
}
__device__ __forceinline__ Vector load_global(const void* from) {
  const uint4 v = *static_cast<const uint4*>(from);
  return {{v.x, v.y, v.z, v.w}};
}
__device__ __forceinline__ void store_global(void* to, const Vector& v) {
  *static_cast<uint4*>(to) = make_uint4(v.w[0], v.w[1], v.w[2], v.w[3]);
}
__device__ __forceinline__ void store_global_4(void* to, uint32_t value) { *static_cast<uint32_t*>(to) = value; }
__device__ __forceinline__ void store_global_8(void* to, uint32_t first, uint32_t second) {
  *static_cast<uint2*>(to) = make_uint2(first, second);
}

// Selects four of the eight bytes of b : a; each nibble of `which` is an index.
__device__ __forceinline__ uint32_t select_bytes(uint32_t a, uint32_t b, uint32_t which) {
  return __byte_perm(a, b, which);
}

// (a & mask) | with, and (a & mask) ^ with, in one instruction; for two constants, the compiler would use two.
__device__ __forceinline__ uint32_t and_or(uint32_t a, uint32_t mask, uint32_t with) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(a), "r"(mask), "r"(with));
  return result;
}
__device__ __forceinline__ uint32_t and_xor(uint32_t a, uint32_t mask, uint32_t with) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0x6A;" : "=r"(result) : "r"(a), "r"(mask), "r"(with));
  return result;
}

__device__ __forceinline__ float as_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t as_bits(float value) { return __float_as_uint(value); }
__device__ __forceinline__ uint32_t as_bits(uint32_t bits) { return bits; }
__device__ __forceinline__ float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }

__device__ __forceinline__ float float_of_f16(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
__device__ __forceinline__ uint16_t f16_of_float(float value) { return __half_as_ushort(__float2half_rn(value)); }
__device__ __forceinline__ uint16_t bf16_of_float(float value) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

// a + b of packed pairs, for exact sums.
__device__ __forceinline__ uint32_t add_bf16(uint32_t a, uint32_t b) {
  uint32_t sum;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(0x3F803F80u), "r"(b));
  return sum;
}
__device__ __forceinline__ uint32_t add_f16(uint32_t a, uint32_t b) {
  uint32_t sum;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  return sum;
}
// a / 16 + b of packed pairs, for exact sums.
__device__ __forceinline__ uint32_t add_sixteenth_f16(uint32_t a, uint32_t b) {
  uint32_t sum;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(0x2C002C00u), "r"(b));
  return sum;
}

// c[16][8] += a[16][k] b[k][8] per warp; k is 16, or 32 for 8-bit integers.
__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// sum = c + a b.
__device__ __forceinline__ void mma_s8(uint32_t (&sum)[4], const uint32_t (&a)[4], const uint32_t* b,
                                       const uint32_t (&c)[4]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=r"(sum[0]), "=r"(sum[1]), "=r"(sum[2]), "=r"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}

// c[16][8] += a[16][32] b[32][8] with 2:4-sparse a. places: positions of the stored elements, from the lanes that
// Selector names.
template <int Selector>
__device__ __forceinline__ void mma_sparse_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b,
                                                uint32_t places) {
  asm("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, %13;"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(places),
        "n"(Selector));
}
template <int Selector>
__device__ __forceinline__ void mma_sparse_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b,
                                               uint32_t places) {
  asm("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, %13;"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(places),
        "n"(Selector));
}

// The value of the other lane of a pair.
__device__ __forceinline__ uint32_t from_neighbour(uint32_t value) { return __shfl_xor_sync(0xFFFFFFFFu, value, 1); }

// With clusters (sm_90 on), the blocks of a split-K sum form one; without, partial sums go through global memory.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kClusters = true;
__device__ __forceinline__ void sync_cluster() { cooperative_groups::this_cluster().sync(); }
__device__ __forceinline__ Vector load_cluster(const void* shared, int rank) {
  const uint4* from = reinterpret_cast<const uint4*>(shared);
  const uint4 v = *cooperative_groups::this_cluster().map_shared_rank(from, rank);
  return {{v.x, v.y, v.z, v.w}};
}
#else
constexpr bool kClusters = false;
__device__ __forceinline__ void sync_cluster() {}
__device__ __forceinline__ Vector load_cluster(const void* shared, int) {
  return load_shared(static_cast<const Vector*>(shared));
}
#endif

}  // namespace cuda
}  // namespace nybble

#endif
