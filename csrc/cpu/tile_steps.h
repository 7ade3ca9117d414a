// The multiply steps of targets without VNNI, for vectors of any width. Included by a target's vector header, which
// defines vi_madd_s16, vi_madd_u8s8, vi_add_s16 and NYBBLE_REGISTER, the letter of its registers in asm statements.
//
// Each adds products to acc: s16 x s16 in pairs to 32 bits; u8 x s8 in pairs to 16 bits, where the caller prevents
// overflow, or further to 32 bits, dot_u7s8_twice two products at once. mul_u8s8_16 starts a sum.
#pragma once

namespace {

// GCC 12 would multiply all rows first and spill the products, so the instructions are one asm statement.
#if defined(__GNUC__) && !defined(__clang__) && !defined(NYBBLE_EMULATE)
struct Ones {
  int16_t at[2 * W];
  constexpr Ones() : at() {
    for (int16_t& one : at) one = 1;
  }
};
alignas(sizeof(VI)) constexpr Ones kOnes;

#define NYBBLE_MULTIPLY_ADD(multiply, add)                          \
  VI product;                                                       \
  __asm__(multiply " %3, %2, %1\n\t" add " %1, %0, %0"              \
          : "+" NYBBLE_REGISTER(acc), "=&" NYBBLE_REGISTER(product) \
          : NYBBLE_REGISTER(a), NYBBLE_REGISTER(b))
inline void dot_s16(VI& acc, VI a, VI b) { NYBBLE_MULTIPLY_ADD("vpmaddwd", "vpaddd"); }
inline void dot_u8s8_16(VI& acc, VI a, VI b) { NYBBLE_MULTIPLY_ADD("vpmaddubsw", "vpaddw"); }
#undef NYBBLE_MULTIPLY_ADD
inline VI mul_u8s8_16(VI u, VI s) {
  VI product;
  __asm__("vpmaddubsw %2, %1, %0" : "=" NYBBLE_REGISTER(product) : NYBBLE_REGISTER(u), NYBBLE_REGISTER(s));
  return product;
}
inline void dot_u7s8(VI& acc, VI u, VI s, VI ones) {
  VI product;
  __asm__("vpmaddubsw %3, %2, %1\n\tvpmaddwd %4, %1, %1\n\tvpaddd %1, %0, %0"
          : "+" NYBBLE_REGISTER(acc), "=&" NYBBLE_REGISTER(product)
          : NYBBLE_REGISTER(u), NYBBLE_REGISTER(s), NYBBLE_REGISTER(ones));
}
inline void dot_u7s8_twice(VI& acc, VI u, VI s, VI u2, VI s2) {
  VI product, second;
  __asm__(
      "vpmaddubsw %4, %3, %1\n\tvpmaddubsw %6, %5, %2\n\tvpaddw %2, %1, %1\n\tvpmaddwd %7, %1, %1\n\tvpaddd %1, %0, %0"
      : "+" NYBBLE_REGISTER(acc), "=&" NYBBLE_REGISTER(product), "=&" NYBBLE_REGISTER(second)
      : NYBBLE_REGISTER(u), NYBBLE_REGISTER(s), NYBBLE_REGISTER(u2), NYBBLE_REGISTER(s2), "m"(kOnes));
}
#else
inline void dot_s16(VI& acc, VI a, VI b) { acc = vi_add(acc, vi_madd_s16(a, b)); }
inline void dot_u8s8_16(VI& acc, VI u, VI s) { acc = vi_add_s16(acc, vi_madd_u8s8(u, s)); }
inline VI mul_u8s8_16(VI u, VI s) { return vi_madd_u8s8(u, s); }
inline void dot_u7s8(VI& acc, VI u, VI s, VI ones) { dot_s16(acc, vi_madd_u8s8(u, s), ones); }
inline void dot_u7s8_twice(VI& acc, VI u, VI s, VI u2, VI s2) {
  dot_s16(acc, vi_add_s16(vi_madd_u8s8(u, s), vi_madd_u8s8(u2, s2)), vi_set1(0x10001));
}
#endif

}  // namespace
