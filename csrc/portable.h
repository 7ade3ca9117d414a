// Sparse weights as a checkpoint holds them: the bitmask, and the block CSR's starts and places.
#pragma once

#include "pack.h"

namespace nybble {

// The code of 0, and any code of a weight [n][k] with its zeros.
inline int absent_code(const WeightShape& s) { return s.bits == 8 ? 0 : 8; }

inline int code_at(const WeightShape& s, const uint8_t* qweight, int64_t n, int64_t k) {
  if (s.bits == 8) return static_cast<int8_t>(qweight[n * s.k + k]);
  return qweight[n * ((s.k + 1) / 2) + k / 2] >> (k % 2 * 4) & 15;
}

// The portable form: mask [n][(k + 7) / 8], bit k % 8 of byte k / 8, and the codes that it keeps, row by row: s8, or
// nibbles, even ones low. A kept code may stand for 0.
struct Bitmask {
  uint8_t* mask;
  uint8_t* values;
  size_t values_bytes;
};

int64_t count_kept(const WeightShape& shape, const uint8_t* qweight);
void to_bitmask(const WeightShape& shape, const uint8_t* qweight, const Bitmask& to);
// Throws std::invalid_argument where mask and values do not belong together, or more than `most` of `of` inputs are
// kept (0: any number).
void from_bitmask(const WeightShape& shape, const Bitmask& from, int64_t most, int64_t of, uint8_t* qweight);

// Throws std::invalid_argument unless start [strips + 1] and index [blocks] are block rows of `width` blocks.
void check_blocks(const int32_t* start, int64_t strips, const int32_t* index, int64_t blocks, int64_t width);

}  // namespace nybble
