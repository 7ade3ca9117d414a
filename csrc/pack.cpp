#include "pack.h"

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "abi.h"
#include "codes.h"
#include "parallel.h"

namespace nybble {

namespace {

int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// Most that codes of one sign may sum to, if their products with 7 bits are summed in 16 bits.
constexpr int kLargeSum = INT16_MAX / 127;

[[noreturn]] void refuse(const char* name, int64_t value, const char* rule) {
  throw std::invalid_argument(std::string(name) + "=" + std::to_string(value) + ": " + rule);
}

// Four bytes of a row, zero beyond its end: 4 codes of 8 bits, or 8 of 4 bits.
uint32_t load_block(const uint8_t* row, int64_t row_bytes, int64_t at) {
  uint32_t word = 0;
  const int64_t left = row_bytes - at;
  if (left > 0) std::memcpy(&word, row + at, static_cast<size_t>(left < 4 ? left : 4));
  return word;
}

float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

float float_of_f16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16, exponent = half >> 10 & 31u, part = half & 1023u;
  if (!exponent) return float_of_bits(sign | 0x38800000u | part << 13) - float_of_bits(sign | 0x38800000u);
  return float_of_bits(sign | (exponent == 31 ? 255u : exponent + 112) << 23 | part << 13);
}

// Of `count` nibbles, from the low one of the first byte on.
int64_t sum_of_nibbles(const uint8_t* bytes, int64_t count) {
  return sum_of_halves(bytes, count / 2) + (count % 2 ? bytes[count / 2] & 15 : 0);
}

// The scale and the minimum of a group of a row, the latter 0 where there is none.
struct Steps {
  double scale, minimum;
};
Steps steps_of(const WeightShape& s, const Portable& from, int64_t n, int64_t g) {
  if (!s.levels) {
    const int64_t at = n * s.groups() + g;
    return {scale_at(s, from.scale, at), s.minimum ? scale_at(s, from.minimum, at) : 0.0};
  }
  const int64_t at = n * s.scales() + g / NYBBLE_BLOCK_GROUPS;
  const uint8_t* levels = from.levels + (n * s.groups() + g) * 2;
  return {static_cast<double>(scale_at(s, from.scale, at)) * levels[0],
          -static_cast<double>(scale_at(s, from.minimum, at)) * levels[1]};
}

// The sum over K of a row's weights, in double: exact unless the scales span many octaves.
float weight_sum(const WeightShape& s, const Portable& from, int64_t n) {
  double sum = 0;
  const uint8_t* bytes = from.qweight + n * s.k;  // of 8 bits
  for (int64_t g = 0; g < s.groups(); g++) {
    const int64_t at = n * s.groups() + g, begin = g * s.group(),
                  end = begin + s.group() < s.k ? begin + s.group() : s.k;
    const int64_t zero_point = zero_point_at(s, from.zero_point, at);
    const int64_t codes = s.bits == 8 ? sum_of_codes(bytes + begin, end - begin)
                                      : sum_of_nibbles(from.qweight + n * ((s.k + 1) / 2) + begin / 2, end - begin);
    const Steps steps = steps_of(s, from, n, g);
    sum += steps.scale * static_cast<double>(codes - zero_point * (end - begin));
    if (s.minimum) sum += steps.minimum * static_cast<double>(end - begin);
  }
  return static_cast<float>(sum);
}

// Whether sums over a pair of lines may be too large for 16 bits. Loops over numbers of 16 bits, which hold two
// neighbouring codes, are compiled to vectors.
bool is_large(const int8_t* lines) {
  int16_t first[32], second[32], above = 0, below = 0;
  std::memcpy(first, lines, 64);
  std::memcpy(second, lines + 64, 64);
  const auto low = [](int16_t pair) {
    return static_cast<int16_t>(static_cast<int16_t>(static_cast<uint16_t>(pair) << 8) >> 8);
  };
  const auto high = [](int16_t pair) { return static_cast<int16_t>(pair >> 8); };
  const auto positive = [](int16_t code) { return static_cast<int16_t>(code > 0 ? code : 0); };
  for (int i = 0; i < 32; i++) {
    const int16_t codes[] = {low(first[i]), high(first[i]), low(second[i]), high(second[i])};
    const int16_t sum = static_cast<int16_t>(codes[0] + codes[1] + codes[2] + codes[3]);
    const int16_t up =
        static_cast<int16_t>(positive(codes[0]) + positive(codes[1]) + positive(codes[2]) + positive(codes[3]));
    const int16_t down = static_cast<int16_t>(sum - up);
    above = up > above ? up : above;
    below = down < below ? down : below;
  }
  return above > kLargeSum || below < -kLargeSum;
}

void check_order(const WeightShape& s, const uint8_t* order) {
  std::vector<bool> seen(static_cast<size_t>(s.k));
  for (int64_t k = 0; k < s.k; k++) {
    int32_t input;
    std::memcpy(&input, order + k * 4, 4);
    if (input < 0 || input >= s.k || seen[static_cast<size_t>(input)])
      refuse("order", input, "must be a permutation of 0 .. in_features - 1");
    seen[static_cast<size_t>(input)] = true;
  }
}

// The planes of n16k32 of four words of n16k8 lines of a column, and back.
void to_planes(const uint32_t (&nibbles)[4], uint32_t (&planes)[3]) {
  for (uint32_t& plane : planes) plane = 0;
  for (int i = 0; i < 4; i++) {
    planes[i / 2] |= (nibbles[i] & 0x33333333u) << i % 2 * 2;
    planes[2] |= (nibbles[i] >> 2 & 0x11111111u) << i;
  }
}

void of_planes(const uint32_t (&planes)[3], uint32_t (&nibbles)[4]) {
  for (int i = 0; i < 4; i++)
    nibbles[i] = (planes[i / 2] >> i % 2 * 2 & 0x33333333u) | (planes[2] >> i & 0x11111111u) << 2;
}

// The lines of n16k4, n16k4g and n16k8 of a tile as those of n16k16, n16k16g and n16k16n, in place; and back.
template <bool kBack>
void pair_lines(const WeightShape& s, uint8_t* codes) {
  const int64_t count = s.bits / 2, bytes = count * 64;  // lines of 16 k
  for (int64_t k = 0; k < s.k_padded(); k += 16, codes += bytes) {
    uint8_t lines[256];
    std::memcpy(lines, codes, static_cast<size_t>(bytes));
    for (int64_t word = 0; word < count * 16; word++) {
      const int64_t paired = nybble_paired_place(word / 16, count / 2) + word % 16 * 8;
      std::memcpy(codes + (kBack ? word * 4 : paired), lines + (kBack ? paired : word * 4), 4);
    }
  }
}

// Marks the pairs of lines of an n16k4 tile whose sums may be too large for 16 bits.
void mark_large(const WeightShape& s, const Sections& at, uint8_t* to, int64_t tile) {
  const int64_t lines = s.k_padded() / 4, bytes = nybble_large_bytes(s.k_padded());
  const int8_t* codes = reinterpret_cast<const int8_t*>(to + at.codes) + tile * lines * 64;
  uint8_t* large = to + at.large + tile * bytes;
  for (int64_t line = 0; line + 1 < lines; line += 2)
    if (is_large(codes + line * 64)) large[line / 16] |= static_cast<uint8_t>(1 << line / 2 % 8);
}

// Calls each(place in the packed section, place in the portable tensor) for the levels of a row.
template <class Each>
void each_level(const WeightShape& s, int64_t n, const Each& each) {
  const int64_t levels = s.groups() * 2;
  for (int64_t i = 0; i < levels; i++)
    each(static_cast<size_t>((n / 16 * levels + i) * 16 + n % 16), static_cast<size_t>(n * levels + i));
}

// Packs 3-bit codes: each four words of n16k8, read by word(block), become three.
template <class Word>
void pack_planes(int64_t blocks, uint8_t* codes, const Word& word) {
  for (int64_t b = 0; b < blocks; b += 4, codes += 3 * 64) {
    uint32_t nibbles[4], planes[3];
    for (int i = 0; i < 4; i++) nibbles[i] = word(b + i);
    to_planes(nibbles, planes);
    for (int i = 0; i < 3; i++) std::memcpy(codes + i * 64, &planes[i], 4);
  }
}

// Changes these bits of all bytes.
void flip(uint8_t* bytes, int64_t count, uint8_t bits) {
  for (int64_t i = 0; i < count && bits; i++) bytes[i] ^= bits;
}

void pack_tile(const WeightShape& s, const Sections& at, const Portable& from, uint8_t* to, int64_t tile) {
  const int64_t row_bytes = s.bits == 8 ? s.k : (s.k + 1) / 2, blocks = s.k_padded() / (s.bits == 8 ? 4 : 8);
  const int64_t scales = s.scales();
  const size_t scale_bytes = s.scale_item();
  int64_t done = 0;  // blocks
  if (s.bits != 3 && tile * 16 + 16 <= s.n)
    done = pack_lines(from.qweight + tile * 16 * row_bytes, row_bytes, s.bits == 8 ? s.k : s.k / 2, s.bits == 4,
                      to + at.codes + tile * blocks * 64);
  flip(to + at.codes + tile * blocks * 64, done * 64, s.flipped());
  for (int64_t lane = 0; lane < 16; lane++) {
    const int64_t n = tile * 16 + lane;
    uint8_t* codes = to + at.codes + static_cast<size_t>(tile * s.k_padded() * s.bits * 2 + lane * 4);
    const uint8_t* row = n < s.n ? from.qweight + n * row_bytes : nullptr;
    const int64_t whole = n < s.n ? row_bytes / 4 : 0;
    const auto word_of = [&](int64_t b) {
      uint32_t word = 0;
      if (b < whole)
        std::memcpy(&word, row + b * 4, 4);
      else if (n < s.n)
        word = load_block(row, row_bytes, b * 4);
      word ^= 0x01010101u * s.flipped();
      if (s.bits != 8) {
        if (b * 8 + 8 > s.k && s.k % 2 && s.k >= b * 8) word &= (1u << 4 * (s.k - b * 8)) - 1;  // the unused nibble
        word = interleave(word);
      }
      return word;
    };
    if (s.bits == 3) pack_planes(blocks, codes, word_of);
    for (int64_t b = done; b < blocks && s.bits != 3; b++) {
      const uint32_t word = word_of(b);
      std::memcpy(codes + b * 64, &word, 4);
    }
    if (!s.by_group() && n < s.n) {
      const int32_t sum = static_cast<int32_t>(sum_of_codes(row, s.k));
      std::memcpy(to + at.sum + static_cast<size_t>(n) * 4, &sum, 4);
    }
    if (s.by_group() && !s.book && n < s.n) {
      const float total = weight_sum(s, from, n);
      std::memcpy(to + at.sum + static_cast<size_t>(n) * 4, &total, 4);
    }
    if (s.levels && n < s.n)
      each_level(s, n, [&](size_t packed, size_t row) { to[at.levels + packed] = from.levels[row]; });
    for (int64_t g = 0; g < scales; g++) {
      const size_t packed = static_cast<size_t>((tile * scales + g) * 16 + lane),
                   row = static_cast<size_t>(n * scales + g);
      if (n < s.n)
        std::memcpy(to + at.scale + packed * scale_bytes, from.scale + row * scale_bytes, scale_bytes);
      else
        std::memset(to + at.scale + packed * scale_bytes, 0, scale_bytes);
      if (!s.symmetric)
        to[at.zero_point + packed] = static_cast<uint8_t>((n < s.n ? from.zero_point[row] : 0) ^ s.flipped());
      if (s.minimum && n < s.n)  // the others were cleared
        std::memcpy(to + at.minimum + packed * scale_bytes, from.minimum + row * scale_bytes, scale_bytes);
    }
  }
  if (at.large) mark_large(s, at, to, tile);
  if (s.paired) pair_lines<false>(s, to + at.codes + tile * blocks * 64);
}

// Four words of n16k8 of a column, from the planes of 32 k.
void nibbles_of(const uint8_t* codes, uint32_t (&nibbles)[4]) {
  uint32_t planes[3];
  for (int i = 0; i < 3; i++) std::memcpy(&planes[i], codes + i * 64, 4);
  of_planes(planes, nibbles);
}

void unpack_tile(const WeightShape& s, const Sections& at, const uint8_t* from, const Portable& to, int64_t tile) {
  const int64_t row_bytes = s.bits == 8 ? s.k : (s.k + 1) / 2, blocks = s.k_padded() / (s.bits == 8 ? 4 : 8);
  const uint8_t* tile_codes = from + at.codes + tile * s.k_padded() * s.bits * 2;
  std::vector<uint8_t> lines;
  if (s.paired) {
    lines.assign(tile_codes, tile_codes + blocks * 64);
    pair_lines<true>(s, lines.data());
    tile_codes = lines.data();
  }
  const int64_t scales = s.scales();
  const size_t scale_bytes = s.scale_item();
  int64_t done = 0;  // blocks
  if (s.bits != 3 && tile * 16 + 16 <= s.n)
    done = unpack_lines(tile_codes, row_bytes, s.bits == 4, to.qweight + tile * 16 * row_bytes);
  for (int64_t lane = 0; lane < 16 && done; lane++)
    flip(to.qweight + (tile * 16 + lane) * row_bytes, done * 4, s.flipped());
  for (int64_t lane = 0; lane < 16 && tile * 16 + lane < s.n; lane++) {
    const int64_t n = tile * 16 + lane;
    const uint8_t* codes = tile_codes + lane * 4;
    uint32_t nibbles[4] = {};
    for (int64_t b = done; b < blocks && b * 4 < row_bytes; b++) {
      uint32_t word;
      if (s.bits == 3) {
        if (b % 4 == 0) nibbles_of(codes + b / 4 * 3 * 64, nibbles);
        word = nibbles[b % 4];
      } else {
        std::memcpy(&word, codes + b * 64, 4);
      }
      word = s.bits != 8 ? deinterleave(word) : word ^ 0x01010101u * s.flipped();
      const int64_t left = row_bytes - b * 4;
      std::memcpy(to.qweight + n * row_bytes + b * 4, &word, static_cast<size_t>(left < 4 ? left : 4));
    }
    if (s.levels) each_level(s, n, [&](size_t packed, size_t row) { to.levels[row] = from[at.levels + packed]; });
    for (int64_t g = 0; g < scales; g++) {
      const size_t packed = static_cast<size_t>((tile * scales + g) * 16 + lane),
                   row = static_cast<size_t>(n * scales + g);
      std::memcpy(to.scale + row * scale_bytes, from + at.scale + packed * scale_bytes, scale_bytes);
      if (!s.symmetric) to.zero_point[row] = from[at.zero_point + packed] ^ s.flipped();
      if (s.minimum) std::memcpy(to.minimum + row * scale_bytes, from + at.minimum + packed * scale_bytes, scale_bytes);
    }
  }
}

}  // namespace

void WeightShape::validate() const {
  const int64_t limit = (int64_t{1} << 31) - 1;
  if (bits != 3 && bits != 4 && bits != 8) refuse("weight_bits", bits, "must be 3, 4 or 8");
  if (n < 1 || n > limit) refuse("out_features", n, "must be in [1, 2^31 - 1]");
  if (k < 1 || k > limit) refuse("in_features", k, "must be in [1, 2^31 - 1]");
  if (k > (int64_t{1} << 40) / n) refuse("in_features", k, "in_features * out_features must be at most 2^40");
  if (group_size != 0 && group_size != 16 && group_size != 32 && group_size != 64 && group_size != 128)
    refuse("group_size", group_size, "must be 0 (one group), 16, 32, 64 or 128");
  if (bits == 3 && (form != Form::dense || group_size < 32))
    refuse("group_size", group_size, "must be 32, 64 or 128 for 3-bit weights, which must be dense");
  if (grouped && (bits != 8 || form != Form::dense)) refuse("grouped", grouped, "is for dense 8-bit weights");
  if (group_scale != NYBBLE_BF16 &&
      (!by_group() || form != Form::dense || (group_scale != NYBBLE_F16 && group_scale != NYBBLE_F32)))
    refuse("scale_dtype", group_scale,
           "must be float16 or float32 for dense weights with scales by group, or else the usual one");
  if (paired && (bits == 3 || form != Form::dense)) refuse("paired", paired, "is for dense weights of 4 or 8 bits");
  if (minimum && (!by_group() || form != Form::dense || !symmetric))
    refuse("minimum", minimum, "is for dense weights with scales by group and without zero points");
  if (!by_group() && (group_size || !symmetric))
    refuse("group_size", group_size, "8-bit weights of this layout must be per channel and symmetric");
  if (form != Form::dense && !symmetric) refuse("symmetric", symmetric, "sparse weights must be symmetric");
  if (book && (bits != 4 || form != Form::dense || !symmetric))
    refuse("book", book, "must be 0, or the weights of 4 bits, dense and without zero points");
  if (levels && (!minimum || bits != 4 || book || group_size != 32 || group_scale != NYBBLE_F16))
    refuse("levels", levels, "is for weights with float16 minimums in groups of 32");
  if (form != Form::dense && ordered) refuse("ordered", ordered, "sparse weights have the order of their inputs");
  if ((form == Form::gather || form == Form::blocks) && bits != 8)
    refuse("weight_bits", bits, "must be 8 for this layout");
  if (form == Form::blocks && (block_n < 16 || block_n > 128 || block_n % 16))
    refuse("block_n", block_n, "must be a multiple of 16 up to 128");
  if (form == Form::blocks && (block_k < 4 || block_k > 128 || block_k % 4))
    refuse("block_k", block_k, "must be a multiple of 4 up to 128");
}

int64_t WeightShape::k_padded() const {
  if (form == Form::gather) return k <= 128 ? 128 : round_up(k, 64);
  if (form == Form::blocks) return round_up(k, block_k);
  return round_up(k, group_size ? group_size : paired ? 16 : bits != 8 ? 8 : 4);
}

int64_t WeightShape::place_of(int64_t column, int64_t at_k) const {
  const int64_t lane = column % 16, tile = column / 16 * 16 * k_padded(), byte = at_k % 4;
  if (!paired) return tile + at_k / 4 * 64 + lane * 4 + byte;
  return tile + nybble_paired_place(at_k / 4, 2) + lane * 8 + byte;
}

Sections sections_of(const WeightShape& s) {
  s.validate();
  Sections at;
  const auto take = [&at](int64_t bytes) {
    const size_t offset = at.total;
    at.total += static_cast<size_t>(round_up(bytes, 64));
    return offset;
  };
  const int64_t columns = s.tiles() * 16;
  if (s.form == Form::dense) at.codes = take(columns * s.k_padded() * s.bits / 8);
  if (s.form != Form::dense) at.start = take((s.tiles() / s.strip() + (s.form == Form::gather ? 2 : 1)) * 8);
  at.scale = take(columns * s.scales() * static_cast<int64_t>(s.scale_item()));
  at.zero_point = take(s.symmetric ? 0 : columns * s.groups());
  at.minimum = take(s.minimum ? columns * s.scales() * static_cast<int64_t>(s.scale_item()) : 0);
  at.levels = take(s.levels ? columns * s.groups() * 2 : 0);
  at.sum = take(s.book ? 0 : columns * 4);
  if (s.form == Form::dense && !s.by_group() && !s.paired)
    at.large = take(s.tiles() * nybble_large_bytes(s.k_padded()));
  if (s.form == Form::gather) at.order = take(columns * 4);
  if (s.ordered) at.order = take(s.k * 4);
  if (s.book) at.book = take(static_cast<int64_t>(s.book_bytes()));
  if (s.form == Form::gather || s.form == Form::blocks) at.index = at.total;
  if (s.form != Form::dense) at.codes = at.total;
  return at;
}

int zero_point_at(const WeightShape& shape, const uint8_t* zero_points, int64_t place) {
  if (shape.symmetric) return shape.zero();
  return shape.bits == 8 ? static_cast<int8_t>(zero_points[place]) : zero_points[place];
}

float scale_at(const WeightShape& shape, const uint8_t* scales, int64_t place) {
  if (shape.scale_dtype() == NYBBLE_F32) {
    float value;
    std::memcpy(&value, scales + place * 4, 4);
    return value;
  }
  uint16_t half;
  std::memcpy(&half, scales + place * 2, 2);
  return shape.scale_dtype() == NYBBLE_F16 ? float_of_f16(half) : float_of_bits(static_cast<uint32_t>(half) << 16);
}

void pack(const WeightShape& shape, const Portable& from, uint8_t* to, int threads) {
  const Sections at = sections_of(shape);
  if (shape.ordered) check_order(shape, from.order);
  std::memset(to + at.scale, 0, at.total - at.scale);  // clears the padding between sections
  parallel_for(shape.tiles(), usable_threads(threads), [&](int64_t tile) { pack_tile(shape, at, from, to, tile); });
  if (shape.ordered) std::memcpy(to + at.order, from.order, shape.order_bytes());
  if (shape.book) std::memcpy(to + at.book, from.book, shape.book_bytes());
}

void unpack(const WeightShape& shape, const uint8_t* from, const Portable& to, int threads) {
  const Sections at = sections_of(shape);
  parallel_for(shape.tiles(), usable_threads(threads), [&](int64_t tile) { unpack_tile(shape, at, from, to, tile); });
  if (shape.ordered) std::memcpy(to.order, from + at.order, shape.order_bytes());
  if (shape.book) std::memcpy(to.book, from + at.book, shape.book_bytes());
}

}  // namespace nybble
