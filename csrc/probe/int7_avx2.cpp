// Multiplies of unsigned 7-bit by signed 8-bit codes without VNNI: vpmaddubsw, whose sums of two products fit 16 bits,
// then vpmaddwd by ones and vpaddd: 8 lanes of 4 products.
#include <immintrin.h>

#include "loops.h"

namespace {

struct Op {
  using Vector = __m256i;
  static void hide(Vector& v) { __asm__ volatile("" : "+x"(v)); }
  // b stands in for the ones, which saves a register and costs the same.
  static void step(Vector& acc, Vector a, Vector b) {
    Vector product;
    __asm__("vpmaddubsw %3, %2, %1\n\tvpmaddwd %3, %1, %1\n\tvpaddd %1, %0, %0"
            : "+x"(acc), "=&x"(product)
            : "x"(a), "x"(b));
  }
};

}  // namespace

extern "C" uint64_t nybble_probe_int7_avx2(const void*, uint64_t rounds) { return multiply<Op, 8>(rounds) * 8 * 4 * 2; }
