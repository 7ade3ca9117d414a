// Compares rounding of weights, its error, and choosing the smallest scores with their definitions, written out, on
// random problems. Every buffer has its exact size, so that a sanitizer detects out-of-bounds accesses.
//   compare_rounding
#include <numeric>

#include "../../csrc/round.h"
#include "../../csrc/smallest.h"
#include "random_problem.h"

namespace {

void require(bool holds, const char* what) {
  if (!holds) throw std::runtime_error(what);
}

struct Rounded {
  Bytes qweight, scale, zero_point;
  explicit Rounded(const WeightShape& s)
      : qweight(s.qweight_bytes()), scale(s.scale_bytes()), zero_point(s.zero_point_bytes()) {}
  Portable portable() { return {qweight.data(), scale.data(), zero_point.data()}; }
  bool operator==(const Rounded& other) const {
    return qweight == other.qweight && scale == other.scale && zero_point == other.zero_point;
  }
};

// The weight at (n, k) as its codes and scales say.
float value_of(const WeightShape& s, const Rounded& from, int64_t n, int64_t k) {
  const size_t group = static_cast<size_t>(n * s.groups() + k / s.group());
  const int code = s.bits == 8 ? static_cast<int8_t>(from.qweight[static_cast<size_t>(n * s.k + k)])
                               : from.qweight[static_cast<size_t>(n * ((s.k + 1) / 2) + k / 2)] >> k % 2 * 4 & 15;
  const int zero = zero_point_at(s, from.zero_point.data(), static_cast<int64_t>(group));
  return static_cast<float>(code - zero) * scale_at(s, from.scale.data(), static_cast<int64_t>(group));
}

// Each value is off by half a step, and a little more where the scale is rounded to bfloat16; asymmetric ones by
// another half, as the zero point is rounded too.
void check_rounding(Random& random) {
  const int64_t sizes[] = {0, 16, 32, 64, 128};
  const NybbleDtype dtypes[] = {NYBBLE_F32, NYBBLE_BF16, NYBBLE_F16};
  WeightShape s{random.integer(0, 1) ? 8 : 4, random.integer(1, 40), random.integer(1, 700)};
  s.grouped = s.bits == 8 && random.integer(0, 1);
  if (s.grouped) s.group_scale = NYBBLE_F32;
  if (s.by_group()) {
    s.group_size = random.pick(sizes);
    s.symmetric = random.integer(0, 1);
  }
  const NybbleDtype dtype = random.pick(dtypes);
  const int64_t stride = s.k + random.integer(0, 9);
  const size_t size = bytes_of(dtype);
  const float factors[] = {0.0f, 0x1p-140f, 0x1p-10f, 1.0f, dtype == NYBBLE_F16 ? 0x1p14f : 0x1p120f};
  const float factor = random.pick(factors);
  Bytes x(static_cast<size_t>((s.n - 1) * stride + s.k) * size);
  for (size_t i = 0; i < x.size(); i += size) store(&x[i], dtype, random.real() * factor);
  const DenseRows from{x.data(), stride, dtype};
  Rounded one(s), several(s);
  require(round_weight(s, from, one.portable(), 1) && round_weight(s, from, several.portable(), 3), "finite weights");
  require(all_finite(s.n, s.k, from, 2), "all_finite of finite weights");
  require(one == several, "rounding depends on the threads");
  const SquaredSums sums = squared_sums(s, from, one.portable(), 1), again = squared_sums(s, from, one.portable(), 3);
  require(sums.signal == again.signal && sums.noise == again.noise, "the error depends on the threads");
  double signal = 0, noise = 0;
  const double step =
      (s.symmetric ? 1.0 / (s.bits == 8 ? 127 : 7) : 2.0 / (s.bits == 8 ? 254 : 15)) * static_cast<double>(factor);
  const double most = (s.symmetric ? 0.56 : 1.06) * step + 0x1p-125;
  for (int64_t n = 0; n < s.n; n++)
    for (int64_t k = 0; k < s.k; k++) {
      const double value = static_cast<double>(load(&x[static_cast<size_t>(n * stride + k) * size], dtype));
      const double error = value - static_cast<double>(value_of(s, one, n, k));
      require(std::fabs(error) <= most, "a weight is rounded too far");
      signal += value * value;
      noise += error * error;
    }
  require(std::fabs(sums.signal - signal) <= 1e-9 * signal, "the sum of squares");
  if (dtype == NYBBLE_F32) require(std::fabs(sums.noise - noise) <= 1e-3 * noise + 1e-300, "the squared error");
  const size_t bad = static_cast<size_t>(random.integer(0, s.n - 1) * stride + random.integer(0, s.k - 1)) * size;
  const float specials[] = {INFINITY, -INFINITY, NAN};
  store(&x[bad], dtype, random.pick(specials));
  require(!round_weight(s, from, several.portable(), 2) && !all_finite(s.n, s.k, from, 2),
          "weights that are not finite");
}

void check_smallest(Random& random) {
  const int64_t n = random.integer(1, 20), k = random.integer(1, 300);
  const size_t total = static_cast<size_t>(n * k);
  std::vector<float> scores(total);
  // Few distinct values, so that many are equal.
  for (float& score : scores) score = static_cast<float>(random.integer(-20, 20)) * 0x1p-3f;
  std::vector<int64_t> counts(static_cast<size_t>(n));
  for (int64_t& count : counts) count = random.integer(0, k);
  Bytes chosen(total, 0x55), expected(total);
  choose_smallest(scores.data(), counts.data(), n, k, chosen.data(), 3);
  for (int64_t i = 0; i < n; i++) {
    std::vector<int64_t> order(static_cast<size_t>(k));
    std::iota(order.begin(), order.end(), 0);
    const auto size = [&](int64_t j) { return std::fabs(scores[static_cast<size_t>(i * k + j)]); };
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return size(a) < size(b); });
    for (int64_t j = 0; j < counts[static_cast<size_t>(i)]; j++)
      expected[static_cast<size_t>(i * k + order[static_cast<size_t>(j)])] = 1;
  }
  require(chosen == expected, "the smallest of each row");
  const int64_t width = random.integer(0, 1) ? 4 : 2;
  Bytes from(total * static_cast<size_t>(width)), to(from.size(), 0x55);
  for (uint8_t& byte : from) byte = static_cast<uint8_t>(random.integer(0, 255));
  keep_only(from.data(), chosen.data(), n * k, width, to.data(), 3);
  for (size_t i = 0; i < from.size(); i++)
    require(to[i] == (chosen[i / static_cast<size_t>(width)] ? from[i] : 0), "kept weights");
}

}  // namespace

int main() {
  int failed = 0;
  for (int seed = 0; seed < kCases; seed++) {
    Random random(static_cast<uint64_t>(seed));
    try {
      check_rounding(random);
      check_smallest(random);
    } catch (const std::exception& error) {
      std::printf("seed %d: %s\n", seed, error.what());
      failed++;
    }
  }
  std::printf("%d passed, %d failed\n", kCases - failed, failed);
  return failed ? 1 : 0;
}
