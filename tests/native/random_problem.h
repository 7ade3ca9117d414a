// Random problems for the comparison programs: random numbers, buffers of exact size, and lookup of companion kernels
// in the table.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <initializer_list>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/linear.h"

using namespace nybble;

namespace {

#ifndef NYBBLE_CASES
#define NYBBLE_CASES 200
#endif
constexpr int kCases = NYBBLE_CASES;

// Memory that may begin anywhere, so that it can end where it must not be passed (guarded_new.cpp).
template <class Byte>
struct Anywhere {
  using value_type = Byte;
  static constexpr std::align_val_t kAlignment{1};
  Byte* allocate(size_t bytes) { return static_cast<Byte*>(::operator new(bytes, kAlignment)); }
  void deallocate(Byte* block, size_t) { ::operator delete(block, kAlignment); }
  bool operator==(const Anywhere&) const { return true; }
  bool operator!=(const Anywhere&) const { return false; }
};
using Bytes = std::vector<uint8_t, Anywhere<uint8_t>>;

inline Span span(Bytes& bytes) { return {reinterpret_cast<uintptr_t>(bytes.data()), bytes.size()}; }

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int64_t integer(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(engine_() % static_cast<uint64_t>(high - low + 1));
  }
  template <class T, size_t N>
  T pick(const T (&of)[N]) {
    return of[integer(0, N - 1)];
  }
  float real() { return static_cast<float>(integer(-(1 << 23), 1 << 23)) * 0x1p-23f; }  // in [-1, 1]

 private:
  std::mt19937_64 engine_;
};

inline size_t bytes_of(NybbleDtype dtype) { return dtype == NYBBLE_F32 || dtype == NYBBLE_S32 ? 4 : 2; }

template <class To, class From>
To bits_as(From from) {
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// Truncates; values below the normal range of f16 become 0, above it infinity.
inline void store(uint8_t* to, NybbleDtype dtype, float value) {
  uint32_t bits = bits_as<uint32_t>(value);
  if (dtype == NYBBLE_BF16) bits >>= 16;
  if (dtype == NYBBLE_F16) {
    const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    const uint32_t half = magnitude > 0x7f800000u    ? 0x7e00u
                          : magnitude >= 0x47800000u ? 0x7c00u
                          : magnitude < 0x38800000u  ? 0u
                                                     : (magnitude - 0x38000000u) >> 13;
    bits = sign | half;
  }
  std::memcpy(to, &bits, bytes_of(dtype));  // little-endian, like all targets
}

inline float load(const uint8_t* from, NybbleDtype dtype) {
  uint32_t bits = 0;
  std::memcpy(&bits, from, bytes_of(dtype));
  if (dtype == NYBBLE_F32) return bits_as<float>(bits);
  if (dtype == NYBBLE_BF16) return bits_as<float>(bits << 16);
  const float magnitude = bits_as<float>((bits & 0x7fffu) << 13) * 0x1p112f;
  return bits & 0x8000u ? -magnitude : magnitude;
}
// Activations [rows][stride]. integers: for kernels with 8-bit activations, also extreme magnitudes, NaN and Inf.
inline Bytes random_activations(int64_t rows, int64_t stride, int64_t k, NybbleDtype dtype, bool integers,
                                Random& random) {
  const float factors[] = {0x1p-120f, 0x1p-6f, 1.0f, 1.0f, 0x1p6f, 0x1p126f, 0.0f};
  const float specials[] = {INFINITY, -INFINITY, NAN};
  Bytes x(static_cast<size_t>((rows - 1) * stride + k) * bytes_of(dtype));
  const auto at = [&](int64_t row, int64_t i) { return &x[static_cast<size_t>(row * stride + i) * bytes_of(dtype)]; };
  for (int64_t row = 0; row < rows; row++) {
    const float factor = integers ? random.pick(factors) : 1.0f, shift = integers && random.integer(0, 1) ? 1.0f : 0.0f;
    for (int64_t i = 0; i < k; i++) store(at(row, i), dtype, (random.real() + shift) * factor);
    if (integers && random.integer(0, 15) == 0) store(at(row, random.integer(0, k - 1)), dtype, random.pick(specials));
  }
  return x;
}

// Whether the distance of all elements is at most `bound` times their norm, which counts as `least` at least.
inline bool within(double bound, const Bytes& got, const Bytes& expected, NybbleDtype dtype, double least) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < got.size(); i += bytes_of(dtype)) {
    const double a = load(&got[i], dtype), b = load(&expected[i], dtype);
    error += (a - b) * (a - b);
    norm += b * b;
  }
  return std::sqrt(error) <= bound * std::fmax(std::sqrt(norm), least);
}

// The largest distance(a, b) of elements; infinite if there is a NaN, which no finite input gives.
template <class Distance>
float largest(const Bytes& got, const Bytes& expected, NybbleDtype dtype, const Distance& distance) {
  float worst = 0;
  for (size_t i = 0; i < got.size(); i += bytes_of(dtype)) {
    const float a = load(&got[i], dtype), b = load(&expected[i], dtype);
    if (std::isnan(a) || std::isnan(b)) return INFINITY;
    if (a != b) worst = std::fmax(worst, distance(a, b));
  }
  return worst;
}

inline bool close(const Bytes& got, const Bytes& expected, NybbleDtype dtype, double least) {
  return within(dtype == NYBBLE_F32 ? 1e-5 : dtype == NYBBLE_BF16 ? 1e-2 : 2e-3, got, expected, dtype, least);
}

// The last entry of the table, up to the kernel's own, for which `fits` is true; entries are ordered by target. Null if
// there is none.
template <class Fits>
const KernelEntry* nearest(const KernelEntry& kernel, const Fits& fits) {
  const KernelEntry* found = nullptr;
  for (const KernelEntry& entry : kernel_table()) {
    if (fits(entry)) found = &entry;
    if (&entry == &kernel) break;
  }
  return found;
}

inline bool is_grouped(const KernelEntry& kernel) {
  return !std::strcmp(kernel.layout, "n16k4g") || !std::strcmp(kernel.layout, "n16k16g");
}
inline bool is_paired(const KernelEntry& kernel) { return !std::strncmp(kernel.layout, "n16k16", 6); }

inline const KernelEntry* prepare_for(const KernelEntry& kernel) {
  return nearest(kernel, [](const KernelEntry& e) { return e.prepare != nullptr; });
}

// How many kernels were right, and how many wrong.
struct Count {
  int right = 0, wrong = 0;
};

// The targets that the program was asked for: this CPU may run no others.
inline std::vector<std::string>& asked() {
  static std::vector<std::string> targets;
  return targets;
}
inline bool is_asked(const KernelEntry& kernel) {
  return std::find(asked().begin(), asked().end(), kernel.target) != asked().end();
}

// What is wrong in one case, by `check` or by an exception of its.
template <class Check>
std::string failure_of(const Check& check, const KernelEntry& kernel, int seed) {
  try {
    return check(kernel, seed);
  } catch (const std::exception& error) {
    return error.what();
  }
}

// Runs `check`, which returns "" or what is wrong, on random cases of each kernel of the targets in argv for which
// `serves` is true.
template <class Serves, class Check>
Count compare_each(int argc, char** argv, int cases, const Serves& serves, const Check& check) {
  Count count;
  asked().assign(argv + 1, argv + argc);
  for (const KernelEntry& kernel : kernel_table()) {
    if (!serves(kernel) || !is_asked(kernel)) continue;
    int wrong = 0;
    for (int seed = 0; seed < cases; seed++) {
      const std::string failure = failure_of(check, kernel, seed);
      if (!failure.empty() && wrong++ < 5) std::printf("%s, seed %d: %s\n", kernel.name, seed, failure.c_str());
    }
    std::printf("%-24s %d cases, %d wrong\n", kernel.name, cases, wrong);
    (wrong ? count.wrong : count.right)++;
  }
  return count;
}

// Prints what became of the kernels; what main returns: 0 if none is wrong. A target alone may have none that the
// program compares, but not all of several, and no target that the table has not.
inline int verdict(int argc, std::initializer_list<Count> counts) {
  Count all;
  for (const Count& count : counts) all.right += count.right, all.wrong += count.wrong;
  const auto& table = kernel_table();
  const bool known = std::any_of(table.begin(), table.end(), is_asked);
  if (!known) std::printf("no kernel has one of these targets\n");
  std::printf("%d passed, %d failed\n", all.right, all.wrong);
  return all.wrong || !known || (argc > 2 && !all.right);
}

template <class Serves, class Check>
int compare_all(int argc, char** argv, int cases, const Serves& serves, const Check& check) {
  return verdict(argc, {compare_each(argc, argv, cases, serves, check)});
}

// Likewise, for linear kernels.
template <class Serves, class Check>
int compare(int argc, char** argv, const Serves& serves, const Check& check) {
  const auto linear = [&](const KernelEntry& kernel) { return kernel.linear && serves(kernel); };
  return compare_all(argc, argv, kCases, linear, check);
}

}  // namespace
