// Codes of a few bits, regrouped: into the lines of packed weights and back, and from the files of other libraries.
// tests/test_codes.py has the definitions.
#pragma once

#include <cstddef>
#include <cstdint>

namespace nybble {

// From eight nibbles, k ascending from the lowest, to bytes of (k, k + 4), and back.
inline uint32_t interleave(uint32_t nibbles) {
  const auto spread = [](uint32_t v) {
    v = (v | v << 8) & 0x00ff00ffu;
    return (v | v << 4) & 0x0f0f0f0fu;
  };
  return spread(nibbles & 0xffffu) | spread(nibbles >> 16) << 4;
}

inline uint32_t deinterleave(uint32_t bytes) {
  const auto gather = [](uint32_t v) {
    v = (v | v >> 4) & 0x00ff00ffu;
    return (v | v >> 8) & 0xffffu;
  };
  return gather(bytes & 0x0f0f0f0fu) | gather(bytes >> 4 & 0x0f0f0f0fu) << 16;
}

// The first lines of a tile, of four bytes of each of 16 rows, as far as whole cache lines of the rows go; the nibbles
// of each are interleaved. Both return how many lines these are.
int64_t pack_lines(const uint8_t* rows, int64_t row_bytes, int64_t used, bool nibbles, uint8_t* lines);
int64_t unpack_lines(const uint8_t* lines, int64_t row_bytes, bool nibbles, uint8_t* rows);

// The sum of some codes of 8 bits, which are signed, and that of both nibbles of some bytes.
int64_t sum_of_codes(const uint8_t* codes, int64_t count);
int64_t sum_of_halves(const uint8_t* bytes, int64_t count);

// Codes of `bits`, 1 to 7, of rows of bytes, low bits first: `count` a row, to one a byte. A row has at least
// ceil(count * bits / 8) bytes.
void unpack_bits(const uint8_t* from, int64_t rows, int64_t row_bytes, int bits, int64_t count, uint8_t* to,
                 int threads);

// Nibbles of rows of bytes in another order: code i of each row is code order[i], `count` in all, an odd one with a
// high nibble of 0. Throws std::invalid_argument where a row has no such code.
void select_nibbles(const uint8_t* from, int64_t rows, int64_t row_bytes, const int32_t* order, int64_t count,
                    uint8_t* to, int threads);

// Words [k][words] of eight nibbles, nibble places[c] that of column 8 * word + c, to rows [words * 8][ceil(k / 2)] of
// nibbles along k. Throws std::invalid_argument where places are no permutation of 0 to 7.
void transpose_nibbles(const uint32_t* from, int64_t k, int64_t words, const int32_t* places, uint8_t* to, int threads);

}  // namespace nybble
