// int8 multiplies with vpdpbusd on zmm registers: 16 lanes of 4 products.
#include <immintrin.h>

#include "loops.h"

namespace {

struct Op {
  using Vector = __m512i;
  static void hide(Vector& v) { __asm__ volatile("" : "+v"(v)); }
  static void step(Vector& acc, Vector a, Vector b) { __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b)); }
};

}  // namespace

extern "C" uint64_t nybble_probe_int8_avx512vnni(const void*, uint64_t rounds) {
  return multiply<Op, 24>(rounds) * 16 * 4 * 2;
}
