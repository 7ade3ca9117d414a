// Exact int8 multiplies without VNNI on zmm registers: vpmaddwd on codes widened to 16 bits, then vpaddd: 16 lanes
// of 2.
#include <immintrin.h>

#include "loops.h"

namespace {

struct Op {
  using Vector = __m512i;
  static void hide(Vector& v) { __asm__ volatile("" : "+v"(v)); }
  static void step(Vector& acc, Vector a, Vector b) {
    Vector product;
    __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+v"(acc), "=&v"(product) : "v"(a), "v"(b));
  }
};

}  // namespace

extern "C" uint64_t nybble_probe_int8_avx512bw(const void*, uint64_t rounds) {
  return multiply<Op, 16>(rounds) * 16 * 2 * 2;
}
