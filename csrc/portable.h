// Sparse weights in checkpoint form: bitmask, and row starts and column indices of block CSR.
#pragma once

#include "pack.h"

namespace nybble {

// The code of a zero weight.
inline int absent_code(const WeightShape& s) { return s.bits == 8 ? 0 : 8; }

// The code at (n, k) of a dense weight.
inline int code_at(const WeightShape& s, const uint8_t* qweight, int64_t n, int64_t k) {
  if (s.bits == 8) return static_cast<int8_t>(qweight[n * s.k + k]);
  return qweight[n * ((s.k + 1) / 2) + k / 2] >> (k % 2 * 4) & 15;
}

// mask [n][(k + 7) / 8]: bit k % 8 of byte k / 8 is set for a stored weight. values: the codes of the stored weights,
// row by row: s8, or nibbles, low nibble first. A stored weight may be zero.
struct Bitmask {
  uint8_t* mask;
  uint8_t* values;
  size_t values_bytes;
};

// Throws std::invalid_argument if more than `most` of each `of` consecutive inputs of a row are not zero.
void check_kept(const WeightShape& shape, const uint8_t* qweight, int64_t most, int64_t of, int threads);

int64_t count_kept(const WeightShape& shape, const uint8_t* qweight);
void to_bitmask(const WeightShape& shape, const uint8_t* qweight, const Bitmask& to);
// Throws std::invalid_argument if values does not have as many codes as mask has bits, or if more than `most` of each
// `of` consecutive inputs are stored (most = 0: no limit).
void from_bitmask(const WeightShape& shape, const Bitmask& from, int64_t most, int64_t of, uint8_t* qweight);

// Throws std::invalid_argument unless start [strips + 1] and index [blocks] are a valid block CSR matrix, `width`
// blocks wide.
void check_blocks(const int32_t* start, int64_t strips, const int32_t* index, int64_t blocks, int64_t width);

}  // namespace nybble
