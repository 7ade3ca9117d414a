// fp32 multiplies and adds in plain C++: 8 lanes.
#include "loops.h"

namespace {

struct Op {
  struct Vector {
    float lane[8];
  };
  static void hide(Vector& v) { __asm__ volatile("" : "+m"(v)); }
  static void step(Vector& acc, const Vector& a, const Vector& b) {
    for (int i = 0; i < 8; i++) acc.lane[i] += a.lane[i] * b.lane[i];
  }
};

}  // namespace

extern "C" uint64_t nybble_probe_fp32_scalar(const void*, uint64_t rounds) { return multiply<Op, 4>(rounds) * 8 * 2; }
