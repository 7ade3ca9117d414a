// Memory read in plain C++.
#include "loops.h"

namespace {

struct Op {
  using Vector = uint64_t;
  static void hide(Vector& v) { __asm__ volatile("" : "+r"(v)); }
};

}  // namespace

extern "C" uint64_t nybble_probe_read_scalar(const void* data, uint64_t bytes) { return read<Op>(data, bytes); }
