// Memory read with 32-byte loads.
#include <immintrin.h>

#include "loops.h"

namespace {

struct Op {
  using Vector = __m256i;
  static void hide(Vector& v) { __asm__ volatile("" : "+x"(v)); }
};

}  // namespace

extern "C" uint64_t nybble_probe_read_avx2(const void* data, uint64_t bytes) { return read<Op>(data, bytes); }
