// Exact int8 multiplies without dot products: smull, then sadalp, of 8 products.
#include "neon.h"

namespace {

struct Op : Neon<int32x4_t> {
  static void step(int32x4_t& acc, int32x4_t a, int32x4_t b) {
    int32x4_t product;
    __asm__("smull %1.8h, %2.8b, %3.8b\n\tsadalp %0.4s, %1.8h" : "+w"(acc), "=&w"(product) : "w"(a), "w"(b));
  }
};

}  // namespace

extern "C" uint64_t nybble_probe_int8_neon(const void*, uint64_t rounds) {
  return multiply<Op, kAccumulators>(rounds) * 8 * 2;
}
