// int8 multiplies with VEX-encoded vpdpbusd on ymm registers: 8 lanes of 4 products.
#include <immintrin.h>

#include "loops.h"

namespace {

struct Op {
  using Vector = __m256i;
  static void hide(Vector& v) { __asm__ volatile("" : "+x"(v)); }
  static void step(Vector& acc, Vector a, Vector b) {
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(a), "x"(b));
  }
};

}  // namespace

extern "C" uint64_t nybble_probe_int8_avxvnni(const void*, uint64_t rounds) {
  return multiply<Op, 12>(rounds) * 8 * 4 * 2;
}
