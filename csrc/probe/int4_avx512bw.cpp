// Multiplies of 4-bit codes without VNNI on zmm registers: vpmaddubsw, then sums of 16 bits by vpaddw: 32 lanes of 2.
#include <immintrin.h>

#include "loops.h"

namespace {

struct Op {
  using Vector = __m512i;
  static void hide(Vector& v) { __asm__ volatile("" : "+v"(v)); }
  static void step(Vector& acc, Vector a, Vector b) {
    Vector product;
    __asm__("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+v"(acc), "=&v"(product) : "v"(a), "v"(b));
  }
};

}  // namespace

extern "C" uint64_t nybble_probe_int4_avx512bw(const void*, uint64_t rounds) {
  return multiply<Op, 16>(rounds) * 32 * 2 * 2;
}
