// Exact int8 multiplies without VNNI: 16 lanes of 2 products.
#include <immintrin.h>

#include "steps_madd.h"

namespace {

struct Lanes {
  using Vector = __m512i;
};

}  // namespace

extern "C" uint64_t nybble_probe_int8_avx512bw(const void*, uint64_t rounds) {
  return operations<Int8<Lanes>, 16>(rounds);
}
