// The AVX-512 intrinsics that the kernels use, emulated in plain C++ lane by lane, so that builds with NYBBLE_EMULATE
// test the AVX-512 sources on any CPU. Semantics follow Intel's intrinsics guide. Never part of a released wheel.
#pragma once

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

namespace {
namespace emulated {

template <class T, class V>
struct Lanes {
  T v[sizeof(V) / sizeof(T)];
  Lanes() = default;
  explicit Lanes(V a) { memcpy(v, &a, sizeof a); }
  operator V() const {
    V a;
    memcpy(&a, v, sizeof a);
    return a;
  }
};
using F = Lanes<float, __m512>;
using I = Lanes<int32_t, __m512i>;
using U = Lanes<uint32_t, __m512i>;
using H = Lanes<uint16_t, __m512i>;
using S = Lanes<int16_t, __m512i>;
using B = Lanes<uint8_t, __m512i>;

template <class L, class Fn>
inline L each(Fn fn) {
  L out;
  for (size_t i = 0; i < sizeof out.v / sizeof out.v[0]; i++) out.v[i] = fn(static_cast<int>(i));
  return out;
}

inline __m512 set1_ps(float a) {
  return each<F>([&](int) { return a; });
}
inline __m512i set1_epi32(int32_t a) {
  return each<I>([&](int) { return a; });
}
template <class V>
inline V load(const void* p) {
  V a;
  memcpy(&a, p, sizeof a);
  return a;
}
template <class V>
inline void store(void* p, V a) {
  memcpy(p, &a, sizeof a);
}
inline __m512 maskz_loadu_ps(__mmask16 m, const void* p) {
  return each<F>([&](int i) { return m >> i & 1 ? static_cast<const float*>(p)[i] : 0.0f; });
}
template <class L, class V>
inline void mask_store(void* p, __mmask16 m, V a) {
  const L lanes(a);
  for (int i = 0; i < 16; i++)
    if (m >> i & 1) memcpy(static_cast<uint8_t*>(p) + 4 * i, lanes.v + i, 4);
}
inline __m512 mul_ps(__m512 a, __m512 b) {
  return each<F>([&](int i) { return F(a).v[i] * F(b).v[i]; });
}
inline __m512 add_ps(__m512 a, __m512 b) {
  return each<F>([&](int i) { return F(a).v[i] + F(b).v[i]; });
}
inline __m512 sub_ps(__m512 a, __m512 b) {
  return each<F>([&](int i) { return F(a).v[i] - F(b).v[i]; });
}
inline __m512 div_ps(__m512 a, __m512 b) {
  return each<F>([&](int i) { return F(a).v[i] / F(b).v[i]; });
}
// In each 4 lanes: two of a (or one of a, one of b, twice) at the places that the control names.
inline __m512 unpack_ps(__m512 a, __m512 b, int first) {
  return each<F>([&](int i) { return F(i % 2 ? b : a).v[i / 4 * 4 + first + i % 4 / 2]; });
}
inline __m512 shuffle_ps(__m512 a, __m512 b, int control) {
  return each<F>([&](int i) { return F(i % 4 < 2 ? a : b).v[i / 4 * 4 + (control >> (i % 4 * 2) & 3)]; });
}
// The same for blocks of 4 lanes.
template <class L>
inline __m512i unpack(__m512i a, __m512i b, int first) {  // first: 0 for the lower halves of lanes
  const L x(a), y(b);
  constexpr int n = 16 / sizeof(x.v[0]);
  return each<L>([&](int i) {
    const int from = i / n * n + first * n / 2 + i % n / 2;
    return i % 2 ? y.v[from] : x.v[from];
  });
}
inline __m512 shuffle_f32x4(__m512 a, __m512 b, int control) {
  return each<F>([&](int i) { return F(i < 8 ? a : b).v[(control >> (i / 4 * 2) & 3) * 4 + i % 4]; });
}
inline __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return each<F>([&](int i) { return fmaf(F(a).v[i], F(b).v[i], F(c).v[i]); });
}
inline __m512 swap_pairs_ps(__m512 a) {
  return each<F>([&](int i) { return F(a).v[i ^ 1]; });
}
inline float reduce_add_ps(__m512 a) {
  F sums(a);
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; i++) sums.v[i] += sums.v[i + half];
  return sums.v[0];
}
inline __m512i add_epi32(__m512i a, __m512i b) {
  return each<U>([&](int i) { return U(a).v[i] + U(b).v[i]; });
}
inline __m512i add_epi16(__m512i a, __m512i b) {
  return each<H>([&](int i) { return static_cast<uint16_t>(H(a).v[i] + H(b).v[i]); });
}
inline __m512i madd_epi16(__m512i a, __m512i b) {
  const S as(a), bs(b);
  return each<U>([&](int i) {
    return static_cast<uint32_t>(as.v[2 * i] * bs.v[2 * i]) + static_cast<uint32_t>(as.v[2 * i + 1] * bs.v[2 * i + 1]);
  });
}
inline __m512i maddubs_epi16(__m512i u, __m512i s) {
  const B us(u), ss(s);
  return each<S>([&](int i) {
    const int sum =
        us.v[2 * i] * static_cast<int8_t>(ss.v[2 * i]) + us.v[2 * i + 1] * static_cast<int8_t>(ss.v[2 * i + 1]);
    return static_cast<int16_t>(sum < INT16_MIN ? INT16_MIN : sum > INT16_MAX ? INT16_MAX : sum);
  });
}
inline __m512i sub_epi32(__m512i a, __m512i b) {
  return each<U>([&](int i) { return U(a).v[i] - U(b).v[i]; });
}
inline __m512i sub_epi8(__m512i a, __m512i b) {
  return each<B>([&](int i) { return static_cast<uint8_t>(B(a).v[i] - B(b).v[i]); });
}
inline __m512i mullo_epi32(__m512i a, __m512i b) {
  return each<U>([&](int i) { return U(a).v[i] * U(b).v[i]; });
}
inline __m512i min_epi32(__m512i a, __m512i b) {
  return each<I>([&](int i) { return I(a).v[i] < I(b).v[i] ? I(a).v[i] : I(b).v[i]; });
}
inline __m512 min_ps(__m512 a, __m512 b) {
  return each<F>([&](int i) { return F(a).v[i] < F(b).v[i] ? F(a).v[i] : F(b).v[i]; });
}
inline __m512 max_ps(__m512 a, __m512 b) {
  return each<F>([&](int i) { return F(a).v[i] > F(b).v[i] ? F(a).v[i] : F(b).v[i]; });
}
inline float reduce_min_ps(__m512 a) {
  float least = F(a).v[0];
  for (float lane : F(a).v) least = lane < least ? lane : least;
  return least;
}
inline float reduce_max_ps(__m512 a) {
  float most = F(a).v[0];
  for (float lane : F(a).v) most = lane > most ? lane : most;
  return most;
}
inline int32_t reduce_add_epi32(__m512i a) {
  uint32_t sum = 0;
  for (uint32_t lane : U(a).v) sum += lane;
  return static_cast<int32_t>(sum);
}
inline __m512i and_si512(__m512i a, __m512i b) { return a & b; }
inline __m512i or_si512(__m512i a, __m512i b) { return a | b; }
inline __m512i xor_si512(__m512i a, __m512i b) { return a ^ b; }
inline __m512i ternarylogic_epi32(__m512i a, __m512i b, __m512i c, unsigned table) {
  __m512i found = a ^ a;
  for (unsigned i = 0; i < 8; i++)
    if (table >> i & 1) found |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return found;
}
inline __m512i srli_epi32(__m512i a, unsigned n) {
  return each<U>([&](int i) { return U(a).v[i] >> n; });
}
inline __m512i slli_epi32(__m512i a, unsigned n) {
  return each<U>([&](int i) { return U(a).v[i] << n; });
}
inline __m512i srai_epi32(__m512i a, unsigned n) {
  return each<I>([&](int i) { return I(a).v[i] >> n; });
}
inline __m512i srli_epi16(__m512i a, unsigned n) {
  return each<H>([&](int i) { return static_cast<uint16_t>(H(a).v[i] >> n); });
}
inline __m512i slli_epi16(__m512i a, unsigned n) {
  return each<H>([&](int i) { return static_cast<uint16_t>(H(a).v[i] << n); });
}
inline __m512i srai_epi16(__m512i a, unsigned n) {
  return each<S>([&](int i) { return static_cast<int16_t>(S(a).v[i] >> n); });
}
inline __m512 cvtepi32_ps(__m512i a) {
  return each<F>([&](int i) { return static_cast<float>(I(a).v[i]); });
}
// As in hardware, values out of range and NaN give INT32_MIN.
inline __m512i cvtps_epi32(__m512 a) {
  return each<I>([&](int i) {
    const float rounded = nearbyintf(F(a).v[i]);
    return rounded >= -0x1p31f && rounded < 0x1p31f ? static_cast<int32_t>(rounded) : INT32_MIN;
  });
}
inline __m512i cvtepu16_epi32(__m256i a) {
  return each<U>([&](int i) { return Lanes<uint16_t, __m256i>(a).v[i]; });
}
inline __m512i cvtepu8_epi32(__m128i a) {
  return each<U>([&](int i) { return Lanes<uint8_t, __m128i>(a).v[i]; });
}
inline __m512i cvtepi8_epi32(__m128i a) {
  return each<I>([&](int i) { return static_cast<int8_t>(Lanes<uint8_t, __m128i>(a).v[i]); });
}
inline __m128i maskz_loadu_epi8(__mmask16 m, const void* p) {
  return each<Lanes<uint8_t, __m128i>>(
      [&](int i) { return m >> i & 1 ? static_cast<const uint8_t*>(p)[i] : uint8_t{0}; });
}
inline __m256i cvtepi32_epi16(__m512i a) {
  return each<Lanes<uint16_t, __m256i>>([&](int i) { return static_cast<uint16_t>(U(a).v[i]); });
}
inline __m128i cvtepi32_epi8(__m512i a) {
  return each<Lanes<uint8_t, __m128i>>([&](int i) { return static_cast<uint8_t>(U(a).v[i]); });
}
// Elements of half the width, with saturation: in each 16 bytes those of a, then those of b.
template <class From, class To, class T>
inline __m512i pack(__m512i a, __m512i b, int least, int most) {
  constexpr int half = 8 / sizeof(T);
  return each<To>([&](int i) {
    const int one = From(i % (2 * half) < half ? a : b).v[i / (2 * half) * half + i % half];
    return static_cast<T>(one < least ? least : one > most ? most : one);
  });
}
inline __m512 cvtph_ps(__m256i a) {
  const __m256 halves[2] = {_mm256_cvtph_ps(_mm256_castsi256_si128(a)),
                            _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1))};
  return load<__m512>(halves);
}
inline __m256i cvtps_ph(__m512 a) {
  __m256 halves[2];
  memcpy(halves, &a, sizeof a);
  return _mm256_set_m128i(_mm256_cvtps_ph(halves[1], 0), _mm256_cvtps_ph(halves[0], 0));
}
inline __mmask16 cmpgt_epi32_mask(__m512i a, __m512i b) {
  unsigned mask = 0;
  for (int i = 0; i < 16; i++) mask |= static_cast<unsigned>(I(a).v[i] > I(b).v[i]) << i;
  return static_cast<__mmask16>(mask);
}
template <int kComparison>
inline __mmask16 cmp_ps_mask(__m512 a, __m512 b) {
  static_assert(kComparison == _CMP_UNORD_Q || kComparison == _CMP_NEQ_UQ, "only these comparisons are emulated");
  unsigned mask = 0;
  for (int i = 0; i < 16; i++) {
    const float x = F(a).v[i], y = F(b).v[i];
    mask |= static_cast<unsigned>(kComparison == _CMP_UNORD_Q ? isunordered(x, y) : x != y) << i;
  }
  return static_cast<__mmask16>(mask);
}
inline __m512i mask_mov_epi32(__m512i a, __mmask16 m, __m512i b) {
  return each<U>([&](int i) { return m >> i & 1 ? U(b).v[i] : U(a).v[i]; });
}
inline __m512i dpbusd_epi32(__m512i acc, __m512i u, __m512i s) {
  const B us(u), ss(s);
  return each<U>([&](int i) {
    uint32_t sum = U(acc).v[i];
    for (int j = 4 * i; j < 4 * i + 4; j++) sum += static_cast<uint32_t>(us.v[j] * static_cast<int8_t>(ss.v[j]));
    return sum;
  });
}
inline __m512i mask_expand_epi8(__m512i otherwise, uint64_t m, __m512i a) {
  B out(otherwise);
  const B from(a);
  for (int i = 0, next = 0; i < 64; i++)
    if (m >> i & 1) out.v[i] = from.v[next++];
  return out;
}
inline __m512i permutex2var_epi8(__m512i low, __m512i index, __m512i high) {
  const B a(low), b(high), at(index);
  return each<B>([&](int i) { return at.v[i] & 64 ? b.v[at.v[i] & 63] : a.v[at.v[i] & 63]; });
}
inline __m512 permutexvar_ps(__m512i index, __m512 table) {
  return each<F>([&](int i) { return F(table).v[U(index).v[i] % 16]; });
}
inline __m512i permutexvar_epi16(__m512i index, __m512i table) {
  return each<H>([&](int i) { return H(table).v[H(index).v[i] % 32]; });
}
inline float flushed(float a) { return fabsf(a) < 0x1p-126f ? copysignf(0.0f, a) : a; }
inline float of_bf16(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float a;
  memcpy(&a, &bits, sizeof a);
  return flushed(a);
}
// Adds the product of the odd elements first; both steps are fused and round to nearest even; subnormals count as 0.
inline __m512 dpbf16_ps(__m512 acc, __m512bh a, __m512bh b) {
  const Lanes<uint16_t, __m512bh> as(a), bs(b);
  return each<F>([&](int i) {
    const float odd = fmaf(of_bf16(as.v[2 * i + 1]), of_bf16(bs.v[2 * i + 1]), flushed(F(acc).v[i]));
    return flushed(fmaf(of_bf16(as.v[2 * i]), of_bf16(bs.v[2 * i]), flushed(odd)));
  });
}

}  // namespace emulated
}  // namespace

#define _mm512_set1_ps emulated::set1_ps
#define _mm512_set1_epi32 emulated::set1_epi32
#define _mm512_loadu_ps emulated::load<__m512>
#define _mm512_loadu_si512 emulated::load<__m512i>
#define _mm512_storeu_ps emulated::store<__m512>
#define _mm512_storeu_si512 emulated::store<__m512i>
#define _mm512_maskz_loadu_ps emulated::maskz_loadu_ps
#define _mm512_mask_storeu_ps emulated::mask_store<emulated::F, __m512>
#define _mm512_mask_storeu_epi32 emulated::mask_store<emulated::I, __m512i>
#define _mm512_mul_ps emulated::mul_ps
#define _mm512_add_ps emulated::add_ps
#define _mm512_sub_ps emulated::sub_ps
#define _mm512_div_ps emulated::div_ps
#define _mm512_unpacklo_ps(a, b) emulated::unpack_ps(a, b, 0)
#define _mm512_unpackhi_ps(a, b) emulated::unpack_ps(a, b, 2)
#define _mm512_shuffle_ps emulated::shuffle_ps
#define _mm512_unpacklo_epi8(a, b) emulated::unpack<emulated::B>(a, b, 0)
#define _mm512_unpackhi_epi8(a, b) emulated::unpack<emulated::B>(a, b, 1)
#define _mm512_unpacklo_epi16(a, b) emulated::unpack<emulated::H>(a, b, 0)
#define _mm512_unpackhi_epi16(a, b) emulated::unpack<emulated::H>(a, b, 1)
#define _mm512_shuffle_f32x4 emulated::shuffle_f32x4
#undef _mm512_permute_ps
#define _mm512_permute_ps(a, swaps_pairs) emulated::swap_pairs_ps(a)
#define _mm512_reduce_add_ps emulated::reduce_add_ps
#define _mm512_fmadd_ps emulated::fmadd_ps
#define _mm512_add_epi32 emulated::add_epi32
#define _mm512_add_epi16 emulated::add_epi16
#define _mm512_madd_epi16 emulated::madd_epi16
#define _mm512_maddubs_epi16 emulated::maddubs_epi16
#define _mm512_sub_epi32 emulated::sub_epi32
#define _mm512_sub_epi8 emulated::sub_epi8
#define _mm512_mullo_epi32 emulated::mullo_epi32
#define _mm512_min_epi32 emulated::min_epi32
#define _mm512_min_ps emulated::min_ps
#define _mm512_max_ps emulated::max_ps
#define _mm512_reduce_min_ps emulated::reduce_min_ps
#define _mm512_reduce_max_ps emulated::reduce_max_ps
#define _mm512_reduce_add_epi32 emulated::reduce_add_epi32
#define _mm512_and_si512 emulated::and_si512
#define _mm512_or_si512 emulated::or_si512
#define _mm512_xor_si512 emulated::xor_si512
#define _mm512_srli_epi32 emulated::srli_epi32
#define _mm512_slli_epi32 emulated::slli_epi32
#define _mm512_ternarylogic_epi32 emulated::ternarylogic_epi32
#define _mm512_srai_epi32 emulated::srai_epi32
#define _mm512_srli_epi16 emulated::srli_epi16
#define _mm512_slli_epi16 emulated::slli_epi16
#define _mm512_srai_epi16 emulated::srai_epi16
#define _mm512_cvtepi32_ps emulated::cvtepi32_ps
#define _mm512_cvtps_epi32 emulated::cvtps_epi32
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_cvtepu8_epi32 emulated::cvtepu8_epi32
#define _mm512_cvtepi8_epi32 emulated::cvtepi8_epi32
#define _mm_maskz_loadu_epi8 emulated::maskz_loadu_epi8
#define _mm512_cvtepi32_epi16 emulated::cvtepi32_epi16
#define _mm512_cvtepi32_epi8 emulated::cvtepi32_epi8
#define _mm512_packs_epi32(a, b) emulated::pack<emulated::I, emulated::S, int16_t>(a, b, -32768, 32767)
#define _mm512_packus_epi16(a, b) emulated::pack<emulated::S, emulated::B, uint8_t>(a, b, 0, 255)
#define _mm512_cvtph_ps emulated::cvtph_ps
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(a, rounding) emulated::cvtps_ph(a)
#define _mm512_cmpgt_epi32_mask emulated::cmpgt_epi32_mask
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask(a, b, comparison) emulated::cmp_ps_mask<comparison>(a, b)
#define _mm512_mask_mov_epi32 emulated::mask_mov_epi32
#define _mm512_mask_mov_ps(a, m, b) ((__m512)emulated::mask_mov_epi32((__m512i)(a), m, (__m512i)(b)))
#define _mm512_dpbusd_epi32 emulated::dpbusd_epi32
#define _mm512_permutexvar_ps emulated::permutexvar_ps
#define _mm512_permutexvar_epi16 emulated::permutexvar_epi16
#define _mm512_mask_expand_epi8 emulated::mask_expand_epi8
#define _mm512_maskz_expand_epi8(m, a) emulated::mask_expand_epi8(emulated::set1_epi32(0), m, a)
#define _mm512_permutex2var_epi8 emulated::permutex2var_epi8
#define _mm512_dpbf16_ps emulated::dpbf16_ps
#define _mm512_castps_si512(a) ((__m512i)(a))
#define _mm512_castsi512_ps(a) ((__m512)(a))
