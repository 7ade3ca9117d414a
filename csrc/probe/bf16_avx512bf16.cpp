// bf16 multiplies with vdpbf16ps on zmm registers: 16 lanes of 2 products.
#include <immintrin.h>

#include "loops.h"

namespace {

struct Op {
  using Vector = __m512;
  static void hide(Vector& v) { __asm__ volatile("" : "+v"(v)); }
  static void step(Vector& acc, Vector a, Vector b) { __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b)); }
};

}  // namespace

extern "C" uint64_t nybble_probe_bf16_avx512bf16(const void*, uint64_t rounds) {
  return multiply<Op, 24>(rounds) * 16 * 2 * 2;
}
