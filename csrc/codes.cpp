#include "codes.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "parallel.h"

namespace nybble {

namespace {

// Loops over so many numbers are compiled to vectors.
constexpr int64_t kWords = 16;
constexpr uint32_t kLow = 0x0f0f0f0fu;
constexpr int64_t kRows = 16;   // rows of a task
constexpr int64_t kPairs = 32;  // pairs of k that are transposed at once: a cache line of each column is written
constexpr uint64_t kPairSums = 0x00ff00ff00ff00ffu;

[[noreturn]] void refuse(const char* name, int64_t value, const std::string& rule) {
  throw std::invalid_argument(std::string(name) + "=" + std::to_string(value) + ": " + rule);
}

uint64_t load(const uint8_t* from, int64_t bytes) {
  uint64_t word = 0;
  if (bytes >= 8)
    std::memcpy(&word, from, 8);  // of a size that the compiler knows: no call
  else
    std::memcpy(&word, from, static_cast<size_t>(bytes));
  return word;
}

// Nibbles of four bytes, one a byte.
uint64_t spread_nibbles(uint32_t bytes) {
  uint64_t v = bytes;
  v = (v | v << 16) & 0x0000ffff0000ffffu;
  v = (v | v << 8) & kPairSums;
  return (v | v << 4) & 0x0f0f0f0f0f0f0f0fu;
}

// The sum of the bytes of each(word), for all words of eight bytes, the last one filled up with zeros.
template <class Each>
int64_t sum_words(const uint8_t* bytes, int64_t count, const Each& each) {
  int64_t sum = 0;
  for (int64_t at = 0; at < count;) {
    uint64_t pairs = 0;  // four sums of 16 bits
    for (const int64_t end = std::min(count, at + 512); at < end; at += 8) {
      const uint64_t word = each(load(bytes + at, end - at));
      pairs += (word & kPairSums) + (word >> 8 & kPairSums);
    }
    for (int i = 0; i < 64; i += 16) sum += static_cast<int64_t>(pairs >> i & 0xffffu);
  }
  return sum;
}

// Eight codes of `bits` from the lowest bits of a word on, one a byte.
uint64_t spread_bits(uint64_t v, int bits) {
  const auto mask = [](int count) { return (uint64_t{1} << count) - 1; };
  v = (v & mask(4 * bits)) | (v >> 4 * bits & mask(4 * bits)) << 32;
  const uint64_t two = mask(2 * bits) * 0x0000000100000001u, one = mask(bits) * 0x0001000100010001u;
  v = (v & two) | (v >> 2 * bits & two) << 16;
  return (v & one) | (v >> bits & one) << 8;
}

// Codes in an order, two a byte; an odd one is the last low half.
void select_row(const uint8_t* codes, const int32_t* order, int64_t count, uint8_t* to) {
  for (; count >= 8; count -= 8, order += 8, to += 4) {
    uint32_t word = 0;
    for (int i = 0; i < 8; i++) word |= static_cast<uint32_t>(codes[order[i]]) << 4 * i;
    std::memcpy(to, &word, 4);
  }
  for (; count >= 2; count -= 2, order += 2) *to++ = static_cast<uint8_t>(codes[order[0]] | codes[order[1]] << 4);
  if (count) *to = codes[*order];
}

// Pairs [begin, end) of k, of the columns of words [first, last), at most kWords.
void transpose_block(const uint32_t* from, int64_t k, int64_t words, const int32_t* places, uint8_t* to, int64_t first,
                     int64_t last, int64_t begin, int64_t end) {
  uint8_t rows[kWords][8][kPairs];  // by the places of nibbles
  for (int64_t pair = begin; pair < end; pair++) {
    const uint32_t *even = from + pair * 2 * words, *odd = pair * 2 + 1 < k ? even + words : nullptr;
    for (int64_t word = first; word < last; word++) {
      const uint32_t a = even[word], b = odd ? odd[word] : 0;
      const uint32_t low = (a & kLow) | (b & kLow) << 4, high = (a >> 4 & kLow) | (b & ~kLow);
      for (int i = 0; i < 4; i++) {
        rows[word - first][2 * i][pair - begin] = static_cast<uint8_t>(low >> 8 * i);
        rows[word - first][2 * i + 1][pair - begin] = static_cast<uint8_t>(high >> 8 * i);
      }
    }
  }
  for (int64_t column = first * 8; column < last * 8; column++)
    std::memcpy(to + column * ((k + 1) / 2) + begin, rows[column / 8 - first][places[column % 8]],
                static_cast<size_t>(end - begin));
}

}  // namespace

int64_t pack_lines(const uint8_t* rows, int64_t row_bytes, int64_t used, bool nibbles, uint8_t* lines) {
  const int64_t blocks = used / (4 * kWords) * kWords;
  uint32_t part[16][kWords];
  for (int64_t at = 0; at < blocks; at += kWords) {
    for (int lane = 0; lane < 16; lane++) {
      std::memcpy(part[lane], rows + lane * row_bytes + at * 4, sizeof part[lane]);
      if (nibbles)
        for (uint32_t& word : part[lane]) word = interleave(word);
    }
    for (int64_t i = 0; i < kWords; i++)
      for (int lane = 0; lane < 16; lane++) std::memcpy(lines + ((at + i) * 16 + lane) * 4, &part[lane][i], 4);
  }
  return blocks;
}

int64_t unpack_lines(const uint8_t* lines, int64_t row_bytes, bool nibbles, uint8_t* rows) {
  const int64_t blocks = row_bytes / (4 * kWords) * kWords;
  uint32_t part[16][kWords];
  for (int64_t at = 0; at < blocks; at += kWords) {
    for (int64_t i = 0; i < kWords; i++)
      for (int lane = 0; lane < 16; lane++) std::memcpy(&part[lane][i], lines + ((at + i) * 16 + lane) * 4, 4);
    for (int lane = 0; lane < 16; lane++) {
      if (nibbles)
        for (uint32_t& word : part[lane]) word = deinterleave(word);
      std::memcpy(rows + lane * row_bytes + at * 4, part[lane], sizeof part[lane]);
    }
  }
  return blocks;
}

int64_t sum_of_codes(const uint8_t* codes, int64_t count) {
  constexpr uint64_t sign = 0x8080808080808080u;
  return sum_words(codes, count, [](uint64_t word) { return word ^ sign; }) - 128 * ((count + 7) / 8 * 8);
}

int64_t sum_of_halves(const uint8_t* bytes, int64_t count) {
  constexpr uint64_t low = 0x0f0f0f0f0f0f0f0fu;
  return sum_words(bytes, count, [](uint64_t word) { return (word & low) + (word >> 4 & low); });
}

void unpack_bits(const uint8_t* from, int64_t rows, int64_t row_bytes, int bits, int64_t count, uint8_t* to,
                 int threads) {
  parallel_for((rows + kRows - 1) / kRows, usable_threads(threads), [&](int64_t block) {
    for (int64_t row = block * kRows; row < std::min((block + 1) * kRows, rows); row++) {
      const uint8_t* codes = from + row * row_bytes;
      uint8_t* unpacked = to + row * count;
      int64_t at = 0, byte = 0;
      for (; at + 8 <= count; at += 8, byte += bits) {
        const uint64_t eight = spread_bits(load(codes + byte, row_bytes - byte), bits);
        std::memcpy(unpacked + at, &eight, 8);
      }
      if (at < count) {
        const uint64_t eight = spread_bits(load(codes + byte, row_bytes - byte), bits);
        std::memcpy(unpacked + at, &eight, static_cast<size_t>(count - at));
      }
    }
  });
}

void select_nibbles(const uint8_t* from, int64_t rows, int64_t row_bytes, const int32_t* order, int64_t count,
                    uint8_t* to, int threads) {
  for (int64_t i = 0; i < count; i++)
    if (order[i] < 0 || order[i] >= row_bytes * 2)
      refuse("order", order[i], "must be in [0, " + std::to_string(row_bytes * 2 - 1) + "], the codes of a row");
  const int64_t tasks = usable_threads(threads), each = (rows + tasks - 1) / tasks, room = row_bytes * 2 + 8;
  std::vector<uint8_t> scratch(static_cast<size_t>(tasks * room));
  parallel_for(tasks, static_cast<int>(tasks), [&](int64_t task) {
    uint8_t* codes = scratch.data() + task * room;
    for (int64_t row = task * each; row < std::min(rows, (task + 1) * each); row++) {
      const uint8_t* bytes = from + row * row_bytes;
      for (int64_t at = 0; at < row_bytes; at += 4) {
        const uint64_t eight = spread_nibbles(static_cast<uint32_t>(load(bytes + at, row_bytes - at)));
        std::memcpy(codes + at * 2, &eight, 8);
      }
      select_row(codes, order, count, to + row * ((count + 1) / 2));
    }
  });
}

void transpose_nibbles(const uint32_t* from, int64_t k, int64_t words, const int32_t* places, uint8_t* to,
                       int threads) {
  int seen = 0;
  for (int column = 0; column < 8; column++) {
    if (places[column] < 0 || places[column] > 7 || seen >> places[column] & 1)
      refuse("places", places[column], "must be a permutation of 0 to 7");
    seen |= 1 << places[column];
  }
  parallel_for((words + kWords - 1) / kWords, usable_threads(threads), [&](int64_t block) {
    const int64_t first = block * kWords, last = std::min(first + kWords, words), pairs = (k + 1) / 2;
    for (int64_t pair = 0; pair < pairs; pair += kPairs)
      transpose_block(from, k, words, places, to, first, last, pair, std::min(pair + kPairs, pairs));
  });
}

}  // namespace nybble
