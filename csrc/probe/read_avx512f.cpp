// Memory read with 64-byte loads.
#include <immintrin.h>

#include "loops.h"

namespace {

struct Op {
  using Vector = __m512i;
  static void hide(Vector& v) { __asm__ volatile("" : "+v"(v)); }
};

}  // namespace

extern "C" uint64_t nybble_probe_read_avx512f(const void* data, uint64_t bytes) { return read<Op>(data, bytes); }
