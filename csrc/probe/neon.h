// What the probes of Arm's vectors share: 16 bytes in a register.
#pragma once

#include <arm_neon.h>

#include "loops.h"

namespace {

template <class V>
struct Neon {
  using Vector = V;
  static void hide(V& v) { __asm__ volatile("" : "+w"(v)); }
};

// Registers that accumulate: enough for 4 multiplies a cycle of 4 cycles each, the most of today's cores.
constexpr int kAccumulators = 24;

}  // namespace
