// For the steps of a register tile: if not inlined, accumulators would be passed through memory.
#pragma once

#define NYBBLE_INLINE __attribute__((always_inline)) static inline
