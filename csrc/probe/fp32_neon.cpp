// fp32 multiplies with fmla: 4 lanes.
#include "neon.h"

namespace {

struct Op : Neon<float32x4_t> {
  static void step(float32x4_t& acc, float32x4_t a, float32x4_t b) {
    __asm__("fmla %0.4s, %1.4s, %2.4s" : "+w"(acc) : "w"(a), "w"(b));
  }
};

}  // namespace

extern "C" uint64_t nybble_probe_fp32_neon(const void*, uint64_t rounds) {
  return multiply<Op, kAccumulators>(rounds) * 4 * 2;
}
