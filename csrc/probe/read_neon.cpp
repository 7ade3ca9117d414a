// Memory read with 16-byte loads.
#include "neon.h"

namespace {

struct Op : Neon<uint8x16_t> {};

}  // namespace

extern "C" uint64_t nybble_probe_read_neon(const void* data, uint64_t bytes) { return read<Op>(data, bytes); }
