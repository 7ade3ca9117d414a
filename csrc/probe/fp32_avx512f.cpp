// fp32 multiplies with vfmadd231ps on zmm registers: 16 lanes.
#include <immintrin.h>

#include "loops.h"

namespace {

struct Op {
  using Vector = __m512;
  static void hide(Vector& v) { __asm__ volatile("" : "+v"(v)); }
  static void step(Vector& acc, Vector a, Vector b) { __asm__("vfmadd231ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b)); }
};

}  // namespace

extern "C" uint64_t nybble_probe_fp32_avx512f(const void*, uint64_t rounds) {
  return multiply<Op, 24>(rounds) * 16 * 2;
}
