// Exact int8 multiplies without VNNI: vpmaddwd on codes widened to 16 bits, then vpaddd: 8 lanes of 2 products.
#include <immintrin.h>

#include "loops.h"

namespace {

struct Op {
  using Vector = __m256i;
  static void hide(Vector& v) { __asm__ volatile("" : "+x"(v)); }
  static void step(Vector& acc, Vector a, Vector b) {
    Vector product;
    __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(acc), "=&x"(product) : "x"(a), "x"(b));
  }
};

}  // namespace

extern "C" uint64_t nybble_probe_int8_avx2(const void*, uint64_t rounds) { return multiply<Op, 8>(rounds) * 8 * 2 * 2; }
