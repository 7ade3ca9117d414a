// Multiplies of 4-bit codes without VNNI: 32 lanes of 2 products.
#include <immintrin.h>

#include "steps_madd.h"

namespace {

struct Lanes {
  using Vector = __m512i;
};

}  // namespace

extern "C" uint64_t nybble_probe_int4_avx512bw(const void*, uint64_t rounds) {
  return operations<Int4<Lanes>, 16>(rounds);
}
