// Multiplies of 4-bit codes without VNNI: vpmaddubsw, then sums of 16 bits by vpaddw: 16 lanes of 2 products.
#include <immintrin.h>

#include "loops.h"

namespace {

struct Op {
  using Vector = __m256i;
  static void hide(Vector& v) { __asm__ volatile("" : "+x"(v)); }
  static void step(Vector& acc, Vector a, Vector b) {
    Vector product;
    __asm__("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(acc), "=&x"(product) : "x"(a), "x"(b));
  }
};

}  // namespace

extern "C" uint64_t nybble_probe_int4_avx2(const void*, uint64_t rounds) {
  return multiply<Op, 8>(rounds) * 16 * 2 * 2;
}
