#include "smallest.h"

#include <cstring>

#include "parallel.h"

namespace nybble {

namespace {

constexpr int64_t kShort = 32;          // rows up to this length are ranked by comparing all pairs
constexpr int64_t kChunk = 1 << 16;     // scores of one piece of work
constexpr int kDigits[] = {21, 10, 0};  // shifts of the three digits of a magnitude, the first of 10 bits
constexpr int kRadix = 1 << 11;

// Magnitudes of floats are ordered as their bits.
uint32_t magnitude(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits & 0x7fffffffu;
}

void choose_short(const float* row, int64_t count, int64_t k, uint8_t* chosen) {
  uint32_t of[kShort];
  for (int64_t i = 0; i < k; i++) of[i] = magnitude(row[i]);
  for (int64_t i = 0; i < k; i++) {
    int64_t before = 0;
    for (int64_t j = 0; j < k; j++) before += j < i ? of[j] <= of[i] : of[j] < of[i];
    chosen[i] = before < count;
  }
}

// Finds the bits of the last chosen magnitude digit by digit, from counts of each digit's values.
void choose_long(const float* row, int64_t count, int64_t k, uint8_t* chosen) {
  uint32_t last = 0, known = 0;
  int64_t left = count;  // to be chosen among those whose known bits are those of `last`
  for (const int shift : kDigits) {
    uint32_t seen[kRadix] = {};
    for (int64_t i = 0; i < k; i++) {
      const uint32_t bits = magnitude(row[i]);
      if ((bits & known) == last) seen[bits >> shift & (kRadix - 1)]++;
    }
    uint32_t digit = 0;
    while (left > seen[digit]) left -= seen[digit++];
    last |= digit << shift;
    known |= static_cast<uint32_t>(kRadix - 1) << shift;
  }
  for (int64_t i = 0; i < k; i++) {
    const uint32_t bits = magnitude(row[i]);
    chosen[i] = bits < last || (bits == last && left-- > 0);
  }
}

void choose(const float* row, int64_t count, int64_t k, uint8_t* chosen) {
  if (count <= 0 || count >= k)
    std::memset(chosen, count > 0, static_cast<size_t>(k));
  else if (k <= kShort)
    choose_short(row, count, k, chosen);
  else
    choose_long(row, count, k, chosen);
}

template <class T>
void keep_piece(const void* from, const uint8_t* keep, int64_t begin, int64_t end, void* to) {
  const T* in = static_cast<const T*>(from);
  T* out = static_cast<T*>(to);
  for (int64_t i = begin; i < end; i++) out[i] = static_cast<T>(in[i] & static_cast<T>(-keep[i]));
}

}  // namespace

void keep_only(const void* from, const uint8_t* keep, int64_t count, int64_t size, void* to, int threads) {
  parallel_for((count + kChunk - 1) / kChunk, usable_threads(threads), [&](int64_t chunk) {
    const int64_t begin = chunk * kChunk, end = begin + kChunk < count ? begin + kChunk : count;
    (size == 2 ? keep_piece<uint16_t> : keep_piece<uint32_t>)(from, keep, begin, end, to);
  });
}

void choose_smallest(const float* scores, const int64_t* counts, int64_t n, int64_t k, uint8_t* chosen, int threads) {
  const int64_t rows = k < kChunk ? kChunk / k : 1;
  parallel_for((n + rows - 1) / rows, usable_threads(threads), [&](int64_t chunk) {
    const int64_t end = (chunk + 1) * rows < n ? (chunk + 1) * rows : n;
    for (int64_t i = chunk * rows; i < end; i++) choose(scores + i * k, counts[i], k, chosen + i * k);
  });
}

}  // namespace nybble
