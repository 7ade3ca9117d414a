// Multiplies of unsigned 7-bit by signed 8-bit codes without VNNI on zmm registers: vpmaddubsw, vpmaddwd by ones,
// vpaddd: 16 lanes of 4 products.
#include <immintrin.h>

#include "loops.h"

namespace {

struct Op {
  using Vector = __m512i;
  static void hide(Vector& v) { __asm__ volatile("" : "+v"(v)); }
  // b stands in for the ones, which saves a register and costs the same.
  static void step(Vector& acc, Vector a, Vector b) {
    Vector product;
    __asm__("vpmaddubsw %3, %2, %1\n\tvpmaddwd %3, %1, %1\n\tvpaddd %1, %0, %0"
            : "+v"(acc), "=&v"(product)
            : "v"(a), "v"(b));
  }
};

}  // namespace

extern "C" uint64_t nybble_probe_int7_avx512bw(const void*, uint64_t rounds) {
  return multiply<Op, 16>(rounds) * 16 * 4 * 2;
}
