// int8 multiplies with sdot: 4 lanes of 4 products.
#include "neon.h"

namespace {

struct Op : Neon<int32x4_t> {
  static void step(int32x4_t& acc, int32x4_t a, int32x4_t b) {
    __asm__("sdot %0.4s, %1.16b, %2.16b" : "+w"(acc) : "w"(a), "w"(b));
  }
};

}  // namespace

extern "C" uint64_t nybble_probe_int8_neondot(const void*, uint64_t rounds) {
  return multiply<Op, kAccumulators>(rounds) * 4 * 4 * 2;
}
