// Multiplies of unsigned 7-bit by signed 8-bit codes without VNNI: 8 lanes of 8 products.
#include <immintrin.h>

#include "steps_madd.h"

namespace {

struct Lanes {
  using Vector = __m256i;
};

}  // namespace

extern "C" uint64_t nybble_probe_int7_avx2(const void*, uint64_t rounds) { return operations<Int7<Lanes>, 8>(rounds); }
