#include "portable.h"

#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

#include "parallel.h"

namespace nybble {

namespace {

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

[[noreturn]] void refuse_group(int64_t n, int64_t most, int64_t of, int64_t k) {
  refuse("mask: row " + std::to_string(n) + " keeps more than " + std::to_string(most) + " of the " +
         std::to_string(of) + " inputs that end at " + std::to_string(k));
}

// The last input of the first group of `of` of row n in which more than `most` are not zero; -1: none.
int64_t too_full(const WeightShape& s, const uint8_t* qweight, int64_t n, int64_t most, int64_t of) {
  for (int64_t begin = 0; begin < s.k; begin += of) {
    const int64_t end = begin + of < s.k ? begin + of : s.k;
    int64_t kept = 0;
    for (int64_t k = begin; k < end; k++) kept += code_at(s, qweight, n, k) != absent_code(s);
    if (kept > most) return end - 1;
  }
  return -1;
}

}  // namespace

void check_kept(const WeightShape& s, const uint8_t* qweight, int64_t most, int64_t of, int threads) {
  constexpr int64_t kRows = 16;  // of one piece of work
  std::atomic<bool> fits{true};
  parallel_for((s.n + kRows - 1) / kRows, usable_threads(threads), [&](int64_t piece) {
    for (int64_t n = piece * kRows; n < s.n && n < (piece + 1) * kRows; n++)
      if (too_full(s, qweight, n, most, of) >= 0) fits.store(false, std::memory_order_relaxed);
  });
  for (int64_t n = 0; n < s.n && !fits; n++) {
    const int64_t k = too_full(s, qweight, n, most, of);
    if (k >= 0) refuse_group(n, most, of, k);
  }
}

int64_t count_kept(const WeightShape& s, const uint8_t* qweight) {
  int64_t kept = 0;
  for (int64_t n = 0; n < s.n; n++)
    for (int64_t k = 0; k < s.k; k++) kept += code_at(s, qweight, n, k) != absent_code(s);
  return kept;
}

void to_bitmask(const WeightShape& s, const uint8_t* qweight, const Bitmask& to) {
  std::memset(to.mask, 0, static_cast<size_t>(s.n * ((s.k + 7) / 8)));
  if (to.values_bytes) std::memset(to.values, 0, to.values_bytes);
  int64_t kept = 0;
  for (int64_t n = 0; n < s.n; n++)
    for (int64_t k = 0; k < s.k; k++) {
      const int code = code_at(s, qweight, n, k);
      if (code == absent_code(s)) continue;
      to.mask[n * ((s.k + 7) / 8) + k / 8] |= static_cast<uint8_t>(1 << k % 8);
      if (s.bits == 8)
        to.values[kept] = static_cast<uint8_t>(code);
      else
        to.values[kept / 2] |= static_cast<uint8_t>(code << kept % 2 * 4);
      kept++;
    }
}

void from_bitmask(const WeightShape& s, const Bitmask& from, int64_t most, int64_t of, uint8_t* qweight) {
  const int64_t row_bytes = (s.k + 7) / 8;
  int64_t kept = 0;
  for (int64_t n = 0; n < s.n; n++) {
    int64_t row = 0, group = 0;
    for (int64_t k = 0; k < row_bytes * 8; k++) {
      const bool bit = from.mask[n * row_bytes + k / 8] >> k % 8 & 1;
      if (bit && k >= s.k) refuse("mask: row " + std::to_string(n) + " has a bit beyond in_features");
      if (most && k % of == 0) group = 0;
      group += bit;
      if (most && group > most) refuse_group(n, most, of, k);
      row += bit;
    }
    kept += row;
  }
  const size_t needed = static_cast<size_t>(s.bits == 8 ? kept : (kept + 1) / 2);
  if (from.values_bytes != needed)
    refuse("values: has " + std::to_string(from.values_bytes) + " bytes, the mask needs " + std::to_string(needed));
  if (s.bits == 4 && kept % 2 && from.values[needed - 1] > 15) refuse("values: the unused last nibble must be 0");
  std::memset(qweight, s.bits == 8 ? 0 : 0x88, s.qweight_bytes());
  int64_t at = 0;
  for (int64_t n = 0; n < s.n; n++) {
    for (int64_t k = 0; k < s.k; k++) {
      if (!(from.mask[n * row_bytes + k / 8] >> k % 8 & 1)) continue;
      if (s.bits == 8) {
        qweight[n * s.k + k] = from.values[at];
      } else {
        uint8_t& two = qweight[n * ((s.k + 1) / 2) + k / 2];
        const int code = from.values[at / 2] >> at % 2 * 4 & 15, shift = static_cast<int>(k % 2 * 4);
        two = static_cast<uint8_t>((two & 0xf0 >> shift) | code << shift);
      }
      at++;
    }
    if (s.bits == 4 && s.k % 2) qweight[(n + 1) * ((s.k + 1) / 2) - 1] &= 15;  // the unused nibble
  }
}

void check_blocks(const int32_t* start, int64_t strips, const int32_t* index, int64_t blocks, int64_t width) {
  const auto at = [](const char* name, int64_t i, int64_t value) {
    return std::string(name) + "[" + std::to_string(i) + "]=" + std::to_string(value);
  };
  if (start[0] != 0) refuse(at("block_start", 0, start[0]) + ": must be 0");
  if (start[strips] != blocks)
    refuse(at("block_start", strips, start[strips]) + ": must be the number of blocks, " + std::to_string(blocks));
  for (int64_t i = 0; i < strips; i++)
    if (start[i + 1] < start[i] || start[i + 1] > blocks)
      refuse(at("block_start", i + 1, start[i + 1]) + ": must be in [" + std::to_string(start[i]) + ", " +
             std::to_string(blocks) + "], from the previous entry to the number of blocks");
  for (int64_t i = 0; i < strips; i++)
    for (int64_t b = start[i]; b < start[i + 1]; b++)
      if (index[b] < 0 || index[b] >= width || (b > start[i] && index[b] <= index[b - 1]))
        refuse(at("block_index", b, index[b]) + ": must be in [0, " + std::to_string(width) +
               ") and greater than the previous entry of its row");
}

}  // namespace nybble
