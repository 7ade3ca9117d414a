// bf16 multiplies with bfmmla: 2 x 2 sums of 4 products.
#include "neon.h"

namespace {

struct Op : Neon<float32x4_t> {
  static void step(float32x4_t& acc, float32x4_t a, float32x4_t b) {
    __asm__("bfmmla %0.4s, %1.8h, %2.8h" : "+w"(acc) : "w"(a), "w"(b));
  }
};

}  // namespace

extern "C" uint64_t nybble_probe_bf16_neonbf16(const void*, uint64_t rounds) {
  return multiply<Op, kAccumulators>(rounds) * 4 * 4 * 2;
}
