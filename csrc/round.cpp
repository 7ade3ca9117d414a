#include "round.h"

#include <atomic>
#include <cstring>
#include <vector>

#include "parallel.h"

namespace nybble {

namespace {

constexpr float kLeastScale = 0x1p-126f;  // a scale must be above it: it is the same in float32 and bfloat16
constexpr float kRounder = 0x1.8p23f;     // adding it rounds to an integer, ties to even, below 2^22
constexpr int64_t kBlock = 256;           // 4-bit codes that are unpacked at a time; a multiple of every group size
constexpr int64_t kChunk = 1 << 16;       // weights of one piece of work

float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

uint32_t bf16_bits(float value) {
  const uint32_t bits = bits_of(value);
  return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

// The dtypes of a weight: `load` widens, `stored` rounds a float32 to the dtype. No branches: loops over them
// vectorize.
struct F32 {
  using Stored = float;
  static float load(float value) { return value; }
  static float stored(float value) { return value; }
};

struct BF16 {
  using Stored = uint16_t;
  static float load(uint16_t half) { return float_of(static_cast<uint32_t>(half) << 16); }
  static float stored(float value) { return float_of(bf16_bits(value) << 16); }
};

struct F16 {
  using Stored = uint16_t;
  static float load(uint16_t half) {
    const uint32_t size = (half & 0x7fffu) << 13;
    const float scaled = float_of(size) * 0x1p112f;  // exact, subnormals too
    const uint32_t special = size >= 0x0f800000u ? 0x7f800000u : 0;
    return float_of(bits_of(scaled) | special | (half & 0x8000u) << 16);
  }
  static float stored(float value) {
    const uint32_t bits = bits_of(value), sign = bits & 0x80000000u, size = bits & 0x7fffffffu;
    const uint32_t normal = (size + 0xfffu + (size >> 13 & 1u)) & ~0x1fffu;
    const float subnormal = (float_of(size) + 0.5f) - 0.5f;  // a multiple of 2^-24
    const uint32_t half = size < 0x38800000u ? bits_of(subnormal) : normal >= 0x47800000u ? 0x7f800000u : normal;
    return float_of(half | sign);
  }
};

template <class Fn>
auto by_dtype(NybbleDtype dtype, const Fn& fn) {
  if (dtype == NYBBLE_BF16) return fn(BF16());
  if (dtype == NYBBLE_F16) return fn(F16());
  return fn(F32());
}

template <class T>
const typename T::Stored* row_of(const DenseRows& from, int64_t n) {
  return static_cast<const typename T::Stored*>(from.data) + n * from.stride;
}

// The codes of a type of weights: see weight_type.py.
struct Codes {
  float lowest, highest, middle;
};

Codes codes_of(const WeightShape& s) { return s.bits == 8 ? Codes{-127, 127, 0} : Codes{0, 15, 8}; }

// The least and the largest value of a group, and 0.
struct Range {
  float low = 0, high = 0;
  bool finite = true;
};

template <class T>
Range range_of(const typename T::Stored* x, int64_t count) {
  float low = 0, high = 0;
  uint32_t special = 0;
#pragma omp simd reduction(min : low) reduction(max : high) reduction(| : special)
  for (int64_t i = 0; i < count; i++) {
    const float value = T::load(x[i]);
    low = value < low ? value : low;
    high = value > high ? value : high;
    special |= (bits_of(value) & 0x7f800000u) == 0x7f800000u ? 1u : 0u;
  }
  return {low, high, special == 0};
}

float rounded(float value) { return (value + kRounder) - kRounder; }

float clamped(float value, float low, float high) { return value < low ? low : value > high ? high : value; }

// A scale as stored, 0 if it cannot tell codes apart, and a zero point.
struct Step {
  float scale, zero, minimum = 0;
};

Step step_of(const WeightShape& s, const Range& range) {
  const Codes c = codes_of(s);
  float span, zero = c.middle;
  if (s.symmetric) {
    const float below = -range.low / (c.middle - c.lowest), above = range.high / (c.highest - c.middle);
    span = below > above ? below : above;
  } else {
    span = (range.high - range.low) / (c.highest - c.lowest);
    zero = clamped(rounded(-range.low / (span > 0 ? span : 1)) + c.lowest, c.lowest, c.highest);
  }
  const float scale = s.scale_dtype() == NYBBLE_F32 ? span : BF16::stored(span);
  return {scale > kLeastScale ? scale : 0, zero};
}

template <class T>
void round_codes(const typename T::Stored* x, int64_t count, const Step& step, const Codes& c, int8_t* to) {
  if (step.scale == 0) {
    std::memset(to, static_cast<int>(step.zero), static_cast<size_t>(count));
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < count; i++)
    to[i] = static_cast<int8_t>(clamped(rounded(T::load(x[i]) / step.scale) + step.zero, c.lowest, c.highest));
}

void pack_nibbles(const int8_t* codes, int64_t count, uint8_t* to) {
#pragma omp simd
  for (int64_t i = 0; i < count / 2; i++) to[i] = static_cast<uint8_t>(codes[2 * i] | codes[2 * i + 1] << 4);
  if (count % 2) to[count / 2] = static_cast<uint8_t>(codes[count - 1]);
}

void unpack_nibbles(const uint8_t* from, int64_t count, int8_t* codes) {
#pragma omp simd
  for (int64_t i = 0; i < count / 2; i++) {
    codes[2 * i] = static_cast<int8_t>(from[i] & 15);
    codes[2 * i + 1] = static_cast<int8_t>(from[i] >> 4);
  }
  if (count % 2) codes[count - 1] = static_cast<int8_t>(from[count / 2] & 15);
}

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

int64_t row_bytes(const WeightShape& s) { return s.bits == 8 ? s.k : (s.k + 1) / 2; }

void store_step(const WeightShape& s, const Step& step, const Portable& to, int64_t at) {
  const uint32_t bits = bits_of(step.scale);
  const uint16_t upper = static_cast<uint16_t>(bits >> 16);
  if (s.scale_dtype() == NYBBLE_F32)
    std::memcpy(to.scale + at * 4, &bits, 4);
  else
    std::memcpy(to.scale + at * 2, &upper, 2);
  if (!s.symmetric) to.zero_point[at] = static_cast<uint8_t>(static_cast<int>(step.zero));
}

Step load_step(const WeightShape& s, const Portable& from, int64_t at) {
  return {scale_at(s, from.scale, at), static_cast<float>(zero_point_at(s, from.zero_point, at)),
          s.minimum ? scale_at(s, from.minimum, at) : 0};
}

template <class T>
bool round_row(const WeightShape& s, const typename T::Stored* x, const Portable& to, int64_t n) {
  const Codes c = codes_of(s);
  uint8_t* row = to.qweight + n * row_bytes(s);
  for (int64_t g = 0; g < s.groups(); g++) {
    const int64_t begin = g * s.group(), end = least(begin + s.group(), s.k);
    const Range range = range_of<T>(x + begin, end - begin);
    if (!range.finite) return false;
    const Step step = step_of(s, range);
    store_step(s, step, to, n * s.groups() + g);
    if (s.bits == 8) {
      round_codes<T>(x + begin, end - begin, step, c, reinterpret_cast<int8_t*>(row + begin));
      continue;
    }
    for (int64_t k = begin; k < end; k += kBlock) {
      int8_t codes[kBlock];
      const int64_t count = least(kBlock, end - k);
      round_codes<T>(x + k, count, step, c, codes);
      pack_nibbles(codes, count, row + k / 2);
    }
  }
  return true;
}

template <class T>
void add_squares(const typename T::Stored* x, const int8_t* codes, int64_t count, const Step& step, SquaredSums& sums) {
  double signal = 0, noise = 0;
#pragma omp simd reduction(+ : signal, noise)
  for (int64_t i = 0; i < count; i++) {
    const double value = T::load(x[i]);
    const double error = value - T::stored((static_cast<float>(codes[i]) - step.zero) * step.scale + step.minimum);
    signal += value * value;
    noise += error * error;
  }
  sums.signal += signal;
  sums.noise += noise;
}

template <class T>
void add_row(const WeightShape& s, const typename T::Stored* x, const Portable& from, int64_t n, SquaredSums& sums) {
  const uint8_t* row = from.qweight + n * row_bytes(s);
  for (int64_t g = 0; g < s.groups(); g++) {
    const int64_t begin = g * s.group(), end = least(begin + s.group(), s.k);
    const Step step = load_step(s, from, n * s.groups() + g);
    if (s.bits == 8) {
      add_squares<T>(x + begin, reinterpret_cast<const int8_t*>(row + begin), end - begin, step, sums);
      continue;
    }
    for (int64_t k = begin; k < end; k += kBlock) {
      int8_t codes[kBlock];
      const int64_t count = least(kBlock, end - k);
      unpack_nibbles(row + k / 2, count, codes);
      add_squares<T>(x + k, codes, count, step, sums);
    }
  }
}

// Calls fn(chunk, first row, last row) in parallel, for chunks of rows whose number does not depend on the threads.
template <class Fn>
void by_rows(int64_t n, int64_t k, int threads, const Fn& fn) {
  const int64_t rows = k < kChunk ? kChunk / k : 1;
  parallel_for((n + rows - 1) / rows, usable_threads(threads),
               [&](int64_t chunk) { fn(chunk, chunk * rows, least(n, (chunk + 1) * rows)); });
}

}  // namespace

bool round_weight(const WeightShape& s, const DenseRows& from, const Portable& to, int threads) {
  std::atomic<bool> finite{true};
  by_dtype(from.dtype, [&](auto dtype) {
    using T = decltype(dtype);
    by_rows(s.n, s.k, threads, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end && finite.load(std::memory_order_relaxed); n++)
        if (!round_row<T>(s, row_of<T>(from, n), to, n)) finite.store(false, std::memory_order_relaxed);
    });
  });
  return finite;
}

SquaredSums squared_sums(const WeightShape& s, const DenseRows& from, const Portable& rounded, int threads) {
  std::vector<SquaredSums> chunks(static_cast<size_t>(s.n));
  by_dtype(from.dtype, [&](auto dtype) {
    using T = decltype(dtype);
    by_rows(s.n, s.k, threads, [&](int64_t chunk, int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; n++)
        add_row<T>(s, row_of<T>(from, n), rounded, n, chunks[static_cast<size_t>(chunk)]);
    });
  });
  SquaredSums total;
  for (const SquaredSums& chunk : chunks) {
    total.signal += chunk.signal;
    total.noise += chunk.noise;
  }
  return total;
}

bool all_finite(int64_t n, int64_t k, const DenseRows& from, int threads) {
  std::atomic<bool> finite{true};
  by_dtype(from.dtype, [&](auto dtype) {
    using T = decltype(dtype);
    by_rows(n, k, threads, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end && finite.load(std::memory_order_relaxed); i++)
        if (!range_of<T>(row_of<T>(from, i), k).finite) finite.store(false, std::memory_order_relaxed);
    });
  });
  return finite;
}

}  // namespace nybble
