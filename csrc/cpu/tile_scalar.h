// Vectors of 8 lanes for any machine, by the vector types of GCC and Clang: the functions of tile_avx2.h and
// tile_avx512vnni.h. Those with many instructions are not inlined, which saves a third of the time to compile.
#pragma once

#include <math.h>
#include <string.h>

#include "../abi.h"

namespace {

constexpr int W = 8;
constexpr int kRegisters = 16;
constexpr bool kMakesPairs = true;  // panels that smmla multiplies (NYBBLE_PANEL_S8_PAIRS)

struct VF {
  typedef float Lanes __attribute__((vector_size(4 * W)));
  Lanes v;
};
struct VI {
  typedef int32_t Lanes __attribute__((vector_size(4 * W)));
  Lanes v;
};
typedef uint32_t Unsigned __attribute__((vector_size(4 * W)));

template <class V, class F>
inline V lanes_of(F f) {
  V out;
  for (int i = 0; i < W; i++) out.v[i] = f(i);
  return out;
}

inline float f32_of_bits(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

inline uint32_t bits_of_f32(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return bits;
}

inline float f32_of_f16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t exponent = (h >> 10) & 31u, mantissa = h & 1023u;
  if (exponent == 31) return f32_of_bits(sign | 0x7f800000u | (mantissa << 13));
  if (exponent) return f32_of_bits(sign | ((exponent + 112) << 23) | (mantissa << 13));
  return f32_of_bits(sign | bits_of_f32(static_cast<float>(mantissa) * 0x1p-24f));
}

inline uint16_t f16_of_f32(float f) {
  const uint32_t bits = bits_of_f32(f), sign = (bits >> 16) & 0x8000u, mag = bits & 0x7fffffffu;
  if (mag > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | ((mag >> 13) & 0x3ffu));
  if (mag >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to 2^16 or more
  if (mag < 0x38800000u) {  // subnormal: adding 0.5 moves the float16's bits to the bottom of the mantissa
    const uint32_t rounded = bits_of_f32(f32_of_bits(mag) + 0.5f);
    return static_cast<uint16_t>(sign | (rounded - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((mag + 0xfffu + ((mag >> 13) & 1u) - 0x38000000u) >> 13));
}

inline uint16_t bf16_of_f32(float f) {
  const uint32_t bits = bits_of_f32(f);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline VF vf_set1(float f) { return {VF::Lanes{f, f, f, f, f, f, f, f}}; }
inline VF vf_load(const float* p) {
  VF out;
  memcpy(&out, p, sizeof out);
  return out;
}
inline void vf_store(float* p, VF a) { memcpy(p, &a, sizeof a); }
inline VF vf_mul(VF a, VF b) { return {a.v * b.v}; }
inline VF vf_add(VF a, VF b) { return {a.v + b.v}; }
inline VF vf_neg(VF a) { return {-a.v}; }
inline VF vf_sub(VF a, VF b) { return {a.v - b.v}; }
inline VF vf_div(VF a, VF b) { return {a.v / b.v}; }
// Fused, as in hardware, so that integer kernels give the same bits on every target.
__attribute__((noinline)) inline VF vf_fma(VF a, VF b, VF c) {
  return lanes_of<VF>([&](int i) { return fmaf(a.v[i], b.v[i], c.v[i]); });
}
// For float kernels, which guarantee an error bound but not identical bits: no slow software fma.
inline VF vf_fma_fast(VF a, VF b, VF c) { return {a.v * b.v + c.v}; }

inline VI vi_set1(int32_t a) { return {VI::Lanes{a, a, a, a, a, a, a, a}}; }
// Loads bytes as 32-bit lanes.
inline VI vi_load(const void* p) {
  VI out;
  memcpy(&out, p, sizeof out);
  return out;
}
inline void vi_store(void* p, VI a) { memcpy(p, &a, sizeof a); }
// Exchanges the lanes 2 i and 2 i + 1.
inline VF vf_swap_pairs(VF a) {
  return lanes_of<VF>([&](int i) { return a.v[i ^ 1]; });
}
inline float vf_sum(VF a) {
  for (int half = W / 2; half; half /= 2)
    for (int i = 0; i < half; i++) a.v[i] += a.v[i + half];
  return a.v[0];
}
inline VI vi_add(VI a, VI b) { return {a.v + b.v}; }
inline VI vi_sub(VI a, VI b) { return {a.v - b.v}; }
inline VI vi_mul(VI a, VI b) { return {a.v * b.v}; }
inline VI vi_and(VI a, VI b) { return {a.v & b.v}; }
inline VI vi_or(VI a, VI b) { return {a.v | b.v}; }
// The bits of a where the mask has ones, those of b elsewhere.
inline VI vi_pick(VI mask, VI a, VI b) { return {(mask.v & a.v) | (~mask.v & b.v)}; }
// acc += u8 x s8, four products per lane.
inline void dot_u8s8(VI& acc, VI u, VI s) {
  uint8_t us[4 * W];
  int8_t ss[4 * W];
  memcpy(us, &u, sizeof us);
  memcpy(ss, &s, sizeof ss);
  for (int i = 0; i < 4 * W; i++) acc.v[i / 4] += us[i] * ss[i];
}
template <int kBits>
inline VI vi_shift_right_32(VI a) {
  return {reinterpret_cast<VI::Lanes>(reinterpret_cast<Unsigned>(a.v) >> kBits)};
}
inline VI vi_min(VI a, VI b) { return {a.v < b.v ? a.v : b.v}; }
inline float vf_least(VF a) {
  float least = a.v[0];
  for (int i = 1; i < W; i++) least = a.v[i] < least ? a.v[i] : least;
  return least;
}
inline float vf_most(VF a) {
  float most = a.v[0];
  for (int i = 1; i < W; i++) most = a.v[i] > most ? a.v[i] : most;
  return most;
}
inline bool vf_has_nan(VF a) {
  for (int i = 0; i < W; i++)
    if (a.v[i] != a.v[i]) return true;
  return false;
}
inline int32_t vi_sum(VI a) {
  int32_t total = 0;
  for (int i = 0; i < W; i++) total += a.v[i];
  return total;
}
// Keeps the first `count` lanes; the others become 0.
inline VI vi_first(VI a, int64_t count) {
  return lanes_of<VI>([&](int i) { return i < count ? a.v[i] : 0; });
}
inline VF vf_min(VF a, VF b) { return {a.v < b.v ? a.v : b.v}; }
inline VF vf_max(VF a, VF b) { return {a.v > b.v ? a.v : b.v}; }
template <int kShift, int kBits>  // bits [kShift, kShift + kBits) of each lane, zero-extended
inline VI vi_field_u(VI a) {
  return {reinterpret_cast<VI::Lanes>(reinterpret_cast<Unsigned>(a.v) >> kShift & ((1u << kBits) - 1))};
}
template <int kBits>
inline VI vi_shift_left_32(VI a) {
  return {reinterpret_cast<VI::Lanes>(reinterpret_cast<Unsigned>(a.v) << kBits)};
}
// The bits of the lanes, as the other type.
inline VI vi_of_bits(VF a) { return {reinterpret_cast<VI::Lanes>(a.v)}; }
inline VF vf_of_bits(VI a) { return {reinterpret_cast<VF::Lanes>(a.v)}; }
// Lane by lane: a < b ? x : y; whether a != b, or one is NaN, in any lane.
inline VF vf_where_less(VI a, VI b, VF x, VF y) { return {a.v < b.v ? x.v : y.v}; }
inline bool vf_any_unlike(VF a, VF b) {
  for (int i = 0; i < W; i++)
    if (a.v[i] != b.v[i]) return true;
  return false;
}
// Lane i: the sum of the lanes of the i-th; overwrites them.
inline VF vf_sum_each(VF (&of)[W]) {
  return lanes_of<VF>([&](int i) {
    float sum = 0.0f;
    for (int j = 0; j < W; j++) sum += of[i].v[j];
    return sum;
  });
}
// Swaps rows and columns.
inline void vf_transpose(VF (&rows)[W]) {
  for (int i = 0; i < W; i++)
    for (int j = 0; j < i; j++) {
      const float swapped = rows[i].v[j];
      rows[i].v[j] = rows[j].v[i];
      rows[j].v[i] = swapped;
    }
}
template <int kByte>  // byte kByte of each lane, sign-extended
inline VI vi_byte_s(VI a) {
  return lanes_of<VI>(
      [&](int i) { return static_cast<int32_t>(static_cast<int8_t>(static_cast<uint32_t>(a.v[i]) >> (8 * kByte))); });
}
inline VF vf_of_int(VI a) { return {__builtin_convertvector(a.v, VF::Lanes)}; }
// Tables of 16 floats; looks up bits kShift .. kShift + 3 of each lane.
using Table16 = const float*;
inline Table16 table16(const float* values) { return values; }
template <int kShift>
inline VF vf_lookup(Table16 table, VI a) {
  return lanes_of<VF>([&](int i) { return table[static_cast<uint32_t>(a.v[i]) >> kShift & 15]; });
}
__attribute__((noinline)) inline VI vi_round(VF a) {
  return lanes_of<VI>([&](int i) { return static_cast<int32_t>(nearbyintf(a.v[i])); });
}

inline VI vi_load_u8(const uint8_t* p) {
  return lanes_of<VI>([&](int i) { return static_cast<int32_t>(p[i]); });
}

// Loads the first min(count, W) elements at p as float32; the other lanes are 0, and their memory is not read.
__attribute__((noinline)) inline VF vf_load_as(const void* p, int dtype, int64_t count) {
  VF out = vf_set1(0.0f);
  const uint16_t* half = static_cast<const uint16_t*>(p);
  for (int64_t i = 0; i < count && i < W; i++) {
    out.v[i] = dtype == NYBBLE_F32    ? static_cast<const float*>(p)[i]
               : dtype == NYBBLE_BF16 ? f32_of_bits(static_cast<uint32_t>(half[i]) << 16)
                                      : f32_of_f16(half[i]);
  }
  return out;
}

inline VF vf_load_s8(const void* p, int64_t count) {
  VF out = vf_set1(0.0f);
  for (int64_t i = 0; i < count && i < W; i++) out.v[i] = static_cast<const int8_t*>(p)[i];
  return out;
}

__attribute__((noinline)) inline void vf_store_as(void* p, int dtype, VF a, int64_t count) {
  for (int64_t i = 0; i < count && i < W; i++) {
    if (dtype == NYBBLE_F32)
      static_cast<float*>(p)[i] = a.v[i];
    else
      static_cast<uint16_t*>(p)[i] = dtype == NYBBLE_BF16 ? bf16_of_f32(a.v[i]) : f16_of_f32(a.v[i]);
  }
}

inline void vi_store_as_s32(int32_t* p, VI a, int64_t count) {
  memcpy(p, &a, static_cast<size_t>(count < W ? count : W) * 4);
}

// Stores W codes as panel elements.
template <int kFormat>
inline void store_codes(uint8_t* to, VI codes) {
  for (int i = 0; i < W; i++) {
    const int16_t wide = static_cast<int16_t>(codes.v[i]);
    if (kFormat == NYBBLE_PANEL_S16)
      memcpy(to + 2 * i, &wide, 2);
    else
      to[i] = static_cast<uint8_t>(wide + (kFormat == NYBBLE_PANEL_U8 ? 128 : kFormat == NYBBLE_PANEL_U7 ? 64 : 0));
  }
}

}  // namespace
