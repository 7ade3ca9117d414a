// fp32 multiplies with vfmadd231ps on ymm registers: 8 lanes.
#include <immintrin.h>

#include "loops.h"

namespace {

struct Op {
  using Vector = __m256;
  static void hide(Vector& v) { __asm__ volatile("" : "+x"(v)); }
  static void step(Vector& acc, Vector a, Vector b) { __asm__("vfmadd231ps %2, %1, %0" : "+x"(acc) : "x"(a), "x"(b)); }
};

}  // namespace

extern "C" uint64_t nybble_probe_fp32_fma(const void*, uint64_t rounds) { return multiply<Op, 12>(rounds) * 8 * 2; }
