// Tests the CUDA kernels on a CPU, with the emulator emulate_cuda.h, against float64: all operand types and layouts,
// groups, zero points, partial tiles, split-K with clusters and through memory; and properties of the index maths.
// Prints
// "... passed, 0 failed".
#define NYBBLE_EMULATE_CUDA
#include <random>
#include <set>

#include "../../csrc/cuda/instances.cuh"
#include "../../csrc/cuda/quantize.cuh"

namespace nc = nybble::cuda;
using nc::kTile;

namespace {

int passed = 0, failed = 0;

void check(bool holds, const std::string& what) {
  holds ? passed++ : failed++;
  if (!holds) std::printf("FAILED %s\n", what.c_str());
}

std::mt19937 generator(7);
int integer(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }
float real() { return std::normal_distribution<float>()(generator); }
int64_t up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

int shift_of(int group) { return group == 32 ? 5 : group == 64 ? 6 : group == 128 ? 7 : 31; }

// A weight, packed like layouts/gpu.py, and its values.
struct Weight {
  int bits, n, k, group;  // group 0: one group
  bool sparse;            // 2:4
  int64_t n_padded, k_padded;
  std::vector<nc::Vector> codes, places;
  std::vector<uint16_t> scale;
  std::vector<float> row_scale, weight_sum;
  std::vector<int32_t> column_sum;
  std::vector<uint8_t> zero_point;
  std::vector<double> value;

  Weight(int bits, int n, int k, int group, bool symmetric, bool sparse = false)
      : bits(bits), n(n), k(k), group(group), sparse(sparse) {
    n_padded = up(n, 64);
    k_padded = up(k, bits == 8 && !sparse ? 128 : group > 64 ? group : 64);
    // Padding has the value 0.
    const uint32_t nothing = sparse && bits == 4 ? 0x88888888u : 0;
    codes.assign(n_padded * k_padded * bits / 8 / 16 / (sparse ? 2 : 1), {{nothing, nothing, nothing, nothing}});
    if (sparse) places.assign(n_padded * k_padded / 8 / 16, {{0x44444444u, 0x44444444u, 0x44444444u, 0x44444444u}});
    const int64_t groups = group ? k_padded / group : 1;
    scale.assign(groups * n_padded, 0);
    if (!symmetric) zero_point.assign(groups * n_padded, 0);
    row_scale.assign(n_padded, 0);
    weight_sum.assign(n_padded, 0);
    column_sum.assign(n_padded, 0);
    value.assign(static_cast<size_t>(n) * k, 0);
    for (int row = 0; row < n; row++) fill(row);
  }

  // Stores at most two of the four weights from `at` on.
  void fill_quad(int row, int at) {
    int first = integer(0, 2), second = integer(first + 1, 3);
    uint8_t* bytes = reinterpret_cast<uint8_t*>(codes.data());
    const int g = row % 64 / 8, f = row % 8 / 2, r = row % 2;
    const int h = at % 64 / 32, p = at % 32 / 16, s = at % 16 / 8, th = at % 8 / 4, lane = 4 * g + 2 * th + p;
    const int64_t tile = row / 64 * (k_padded / 64) + at / 64;
    uint8_t& quads = reinterpret_cast<uint8_t*>(
        places.data())[tile * 512 + (4 * g + 2 * (f & 1) + s) * 16 + 4 * (2 * h + f / 2) + 2 * r + th];
    quads = static_cast<uint8_t>((quads & (p ? 0x0F : 0xF0)) | (first | second << 2) << (4 * p));
    for (int e = 0; e < 2; e++) {
      const int column = at + (e ? second : first);
      const bool kept = column < k && integer(0, 7) > 0;
      double step = row_scale[row];
      int code = kept ? integer(-127, 127) : 0;
      if (bits == 16) {
        const uint16_t half = kept ? nc::bf16_of_float(real()) : 0;
        std::memcpy(bytes + (tile * 8 + 4 * h + f) * 512 + lane * 16 + 8 * s + 4 * r + 2 * e, &half, 2);
        if (kept) value[static_cast<size_t>(row) * k + column] = nc::emulated::value_of(half, true);
        continue;
      }
      if (bits == 8) {
        bytes[(tile * 4 + f) * 512 + lane * 16 + 8 * h + 4 * r + 2 * s + e] = static_cast<uint8_t>(code);
      } else {
        code = kept ? integer(-8, 7) : 0;
        uint8_t& byte = bytes[(tile * 2 + h) * 512 + lane * 16 + 4 * f + 2 * e + s];
        byte = static_cast<uint8_t>((byte & (r ? 0x0F : 0xF0)) | (code + 8) << (4 * r));
        step = nc::emulated::value_of(scale[(group ? at / group : 0) * n_padded + row], true);
      }
      if (kept) value[static_cast<size_t>(row) * k + column] = code * step;
    }
  }

  void fill(int row) {
    uint8_t* bytes = reinterpret_cast<uint8_t*>(codes.data());
    row_scale[row] = bits == 16 ? 1.0f : std::ldexp(1 + integer(0, 127) / 128.0f, -7);
    double sum = 0;
    for (int at = 0; at < k; at++) {
      double& w = value[static_cast<size_t>(row) * k + at];
      if (sparse) {
        if (at % (group ? group : k) == 0)
          scale[(group ? at / group : 0) * n_padded + row] = static_cast<uint16_t>(0x3C00 | integer(0, 127));
        if (at % 4 == 0) fill_quad(row, at);
        continue;
      }
      if (bits == 8) {
        const int code = integer(-127, 127);
        bytes[row * k_padded + at] = static_cast<uint8_t>(code);
        column_sum[row] += code;
        w = code * static_cast<double>(row_scale[row]);
        continue;
      }
      const int64_t g = (group ? at / group : 0) * n_padded + row;
      if (at == 0 || (group && at % group == 0)) {
        scale[g] = static_cast<uint16_t>(0x3C00 | integer(0, 127));
        if (!zero_point.empty()) zero_point[g] = static_cast<uint8_t>(integer(0, 15));
      }
      const int code = integer(0, 15), place[4] = {0, 2, 1, 3};
      const int64_t tile = (row / 64 * (k_padded / 64) + at / 64) * 2048;
      const int64_t in_tile =
          row % 8 / 2 * 512 + row % 64 / 8 * 64 + at % 32 / 8 * 16 + at % 64 / 32 * 8 + at % 8 / 4 * 4;
      bytes[tile + in_tile + place[at % 4]] |= static_cast<uint8_t>(code << (row % 2 ? 4 : 0));
      w = (code - (zero_point.empty() ? 8 : zero_point[g])) * nc::emulated::value_of(scale[g], true);
      sum += w;
    }
    weight_sum[row] = static_cast<float>(sum);
  }

  NybbleCudaProduct product() const {
    nc::emulated::machine().readable.clear();
    nc::emulated::may_read(codes);
    nc::emulated::may_read(places);
    nc::emulated::may_read(scale);
    nc::emulated::may_read(zero_point);
    NybbleCudaProduct p{};
    p.codes = reinterpret_cast<const uint8_t*>(codes.data());
    p.places = reinterpret_cast<const uint8_t*>(places.data());
    p.scale = scale.data();
    p.row_scale = row_scale.data();
    p.zero_point = zero_point.empty() ? nullptr : zero_point.data();
    p.weight_sum = weight_sum.data();
    p.column_sum = column_sum.data();
    p.n = n;
    p.k = k;
    p.n_padded = n_padded;
    p.k_padded = k_padded;
    p.group_shift = shift_of(group);
    return p;
  }
};

struct Case {
  int m, n, k, group;
  bool symmetric;
  int splits;
  bool clusters, lazy;
};

std::string text(const char* kernel, const Case& c) {
  return std::string(kernel) + " m=" + std::to_string(c.m) + " n=" + std::to_string(c.n) + " k=" + std::to_string(c.k) +
         " g=" + std::to_string(c.group) + (c.symmetric ? "" : " asym") + " splits=" + std::to_string(c.splits) +
         (c.clusters ? " clusters" : " memory") + (c.lazy ? " lazy" : " eager");
}

uint16_t bits_of(float value, int dtype) {
  return dtype == NYBBLE_BF16 ? nc::bf16_of_float(value) : nc::f16_of_float(value);
}

// Of is StreamOf or TilesOf.
template <class Of>
void launch(NybbleCudaProduct p, const Case& c) {
  auto& m = nc::emulated::machine();
  nc::with_clusters() = m.order >> 8 & 1;  // also test hardware without clusters
  m.lazy = c.lazy;
  const int columns = static_cast<int>(up(p.n_padded, Of::kRows) / Of::kRows);
  p.token_tiles = (p.m + Of::kTokensOfBlock - 1) / Of::kTokensOfBlock;
  p.splits = c.splits;
  p.clusters = c.clusters;
  if (c.clusters) nc::with_clusters() = true;
  const int blocks = columns * p.token_tiles, items = Of::kRows * Of::kTokensOfBlock / 4;
  std::vector<nc::Vector> parts(static_cast<size_t>(blocks) * c.splits * items);
  p.parts = reinterpret_cast<float*>(parts.data());
  const Index3 grid{blocks, c.splits, 1};
  const auto kernel = [=] { Of::kernel(p); };
  for (int x = 0; x < blocks; x++)
    for (int y = 0; y < (c.clusters ? 1 : c.splits); y++)
      nc::emulated::run_cluster(grid, x, y, c.clusters ? c.splits : 1, Of::kBlockThreads, Of::kShared, kernel);
  if (c.clusters || c.splits == 1) return;
  for (int x = 0; x < blocks; x++)
    for (int y = 0; y < (items + nc::kThreads - 1) / nc::kThreads; y++)
      nc::emulated::run_cluster({}, x, y, 1, nc::kThreads, 16, [=] {
        nc::finish_kernel<nc::EndingOf<typename Of::W, typename Of::X>, Of::kRows, Of::kTokensOfBlock>(p);
      });
}

// Runs a kernel on random activations of a dtype. Memory after y must not change.
template <class Of>
void compare(const char* name, const Case& c, int dtype) {
  using W = typename Of::W;
  using X = typename Of::X;
  constexpr bool kSparse = std::is_base_of<nc::TwoOfFour, W>::value;
  constexpr int kBits = std::is_same<W, nc::Quads16>::value ? 16 : W::kGrouped ? 4 : 8;
  const Weight weight(kBits, c.n, c.k, c.group, c.symmetric || kSparse, kSparse);
  const int64_t ldx = up(c.k, 8) + 8;
  std::vector<nc::Vector> x((c.m * ldx + 7) / 8, {{0x7FC07FC0u, 0x7FC07FC0u, 0x7FC07FC0u, 0x7FC07FC0u}});
  uint16_t* xs = reinterpret_cast<uint16_t*>(x.data());
  for (int m = 0; m < c.m; m++)
    for (int k = 0; k < c.k; k++) xs[m * ldx + k] = bits_of(real(), dtype);
  std::vector<float> bias(c.n);
  for (float& b : bias) b = real();
  std::vector<float> y(static_cast<size_t>(c.m) * c.n + 64, -77.0f);
  NybbleCudaProduct p = weight.product();
  nc::emulated::may_read(x);
  p.x = x.data();
  p.ldx = ldx;
  p.m = c.m;
  p.bias = bias.data();
  p.bias_dtype = p.y_dtype = NYBBLE_F32;
  p.y = y.data();

  std::vector<float> act_scale(c.m);
  std::vector<int32_t> act_zero(c.m);
  std::vector<nc::Vector> codes(c.m * weight.k_padded / 16);
  std::vector<double> rounded(static_cast<size_t>(c.m) * c.k);
  for (int m = 0; m < c.m; m++)
    for (int k = 0; k < c.k; k++)
      rounded[static_cast<size_t>(m) * c.k + k] = nc::emulated::value_of(xs[m * ldx + k], dtype == NYBBLE_BF16);
  if (X::kElementBytes == 1) {
    int8_t* q = reinterpret_cast<int8_t*>(codes.data());
    const int order = W::kGrouped ? NYBBLE_FRAG4_ORDER : NYBBLE_PLAIN_ORDER;
    const NybbleCudaRows rows{x.data(),       ldx, dtype, c.m, c.k, weight.k_padded, order, q, act_scale.data(),
                              act_zero.data()};
    for (int m = 0; m < c.m; m++)
      nc::emulated::run_cluster({c.m, 1, 1}, m, 0, 1, nc::kThreads, 3 * nc::kThreads * 4,
                                [=] { nc::quantize_kernel(rows); });
    double worst = 0;
    for (int m = 0; m < c.m; m++)
      for (int k = 0; k < c.k; k++) {
        double& value = rounded[static_cast<size_t>(m) * c.k + k];
        const int swapped[4] = {0, 2, 1, 3};
        const int64_t frag4 = k / 64 * 64 + k % 32 / 8 * 16 + k % 64 / 32 * 8 + k % 8 / 4 * 4 + swapped[k % 4];
        const int64_t at = W::kGrouped ? frag4 : k;
        const double code = (q[m * weight.k_padded + at] - act_zero[m]) * static_cast<double>(act_scale[m]);
        worst = std::fmax(worst, std::fabs(code - value) / act_scale[m]);
        value = code;
      }
    check(c.k == 1 || worst < 0.51, text("rounding", c));
    nc::emulated::may_read(codes);
    p.x = codes.data();
    p.ldx = weight.k_padded;
    p.act_scale = act_scale.data();
    p.act_zero = act_zero.data();
  }
  launch<Of>(p, c);

  bool close = true;
  for (int m = 0; m < c.m; m++)
    for (int n = 0; n < c.n; n++) {
      double sum = 0, size = 0;
      for (int k = 0; k < c.k; k++) {
        const double product =
            rounded[static_cast<size_t>(m) * c.k + k] * weight.value[static_cast<size_t>(n) * c.k + k];
        sum += product;
        size += std::fabs(product);
      }
      if (X::kElementBytes == 1)
        size += std::fabs(act_zero[m] * static_cast<double>(act_scale[m]) * weight.weight_sum[n]) + size;
      const double got = y[static_cast<size_t>(m) * c.n + n];
      if (!(std::fabs(got - (sum + bias[n])) <= 4e-6 * (size + std::fabs(bias[n])) + 1e-6)) close = false;
      if (nc::kExact<W, X>) {  // bit for bit: the sums are integers
        const double whole = sum / (act_scale[m] * static_cast<double>(weight.row_scale[n]));
        const float exact = std::fma(std::nearbyint(whole), act_scale[m] * weight.row_scale[n], bias[n]);
        close = close && static_cast<float>(got) == exact;
      }
    }
  for (size_t i = static_cast<size_t>(c.m) * c.n; i < y.size(); i++) close = close && y[i] == -77.0f;
  check(close, text(name, c));
}

// Cases with different groups, zero points, partial tiles, tokens and splits.
std::vector<Case> cases(int most_m, bool grouped) {
  std::vector<Case> found;
  const int shapes[][2] = {{1, 1}, {64, 64}, {70, 200}, {130, 515}, {257, 96}, {33, 2120}};
  int turn = 0;
  for (const auto& shape : shapes)
    for (int group : {0, 32, 64, 128}) {
      if (!grouped && group) continue;
      const int ms[] = {1, most_m, (most_m + 1) / 2 + 1};
      turn++;
      const int splits = turn % 3 + 1;
      const bool symmetric = (turn / 4 + turn) % 2 == 0, clusters = turn % 8 < 4;
      found.push_back({ms[turn % 3], shape[0], shape[1], group, symmetric, splits, clusters, turn % 5 < 3});
    }
  return found;
}

// Runs an instance with the cases that it serves.
template <class Of>
void run_instance(const char* name, int dtype) {
  if (Of::X::kElementBytes == 2 && Of::X::kDtype != dtype) return;
  int served = 0;
  for (const Case& c : cases(Of::kTokensOfBlock + (Of::kRows > kTile ? 3 : 0), Of::W::kGrouped)) {
    NybbleCudaProduct form{};
    form.group_shift = shift_of(c.group);
    const uint8_t some = 0;
    form.zero_point = c.symmetric ? nullptr : &some;
    if (std::is_base_of<nc::TwoOfFour, typename Of::W>::value) form.zero_point = nullptr;
    if (!Of::W::serves(form)) continue;
    compare<Of>(name, c, dtype);
    served++;
  }
  check(served > 2, std::string(name) + ": cases for every instance");
}
template <class... Of>
void run_all(const char* name, nc::Each<Of...>) {
  for (int dtype : {NYBBLE_BF16, NYBBLE_F16}) (run_instance<Of>(name, dtype), ...);
}

// Exactly one instance serves each form of 4-bit weights.
template <class... Of>
void one_serves_each(const char* name, nc::Each<Of...>) {
  bool right = true;
  const uint8_t some = 0;
  for (int group : {0, 32, 64, 128})
    for (const uint8_t* zero : {static_cast<const uint8_t*>(nullptr), &some})
      for (int dtype : {NYBBLE_BF16, NYBBLE_F16})
        for (int groups : {1, 2, 4, 8}) {
          NybbleCudaProduct p{};
          p.group_shift = shift_of(group);
          p.zero_point = zero;
          NybbleCudaLaunch how{};
          how.x_dtype = dtype;
          how.token_groups = groups;
          const int found = (static_cast<int>(nc::serves<Of>(p, how)) + ...);
          right = right && found == ((Of::kGroups == groups) || ...);
        }
  check(right, std::string(name) + ": one instance serves each form");
}

// Every code and nibble is converted exactly.
template <class X>
void weights_are_exact(const char* name, bool bf16) {
  bool right = true;
  for (uint32_t z = 0; z < 16; z++)
    for (uint32_t n = 0; n < 16; n++) {
      const nc::Zeros zero{{z * 0x01010101u, z << 24}};
      const uint32_t first = X::minus_first(zero.twice(2)), second = X::minus_second(zero.twice(7));
      if (z == 8) right = right && first == X::kFirstMinusEight && second == X::kSecondMinusEight;
      uint32_t a[4];
      X::nibbles(0x11111111u * n, first, second, a);
      for (uint32_t pair : a)
        for (int i = 0; i < 2; i++)
          right =
              right && nc::emulated::value_of(static_cast<uint16_t>(pair >> (16 * i)), bf16) == double(n) - double(z);
    }
  for (int code = -128; code < 128; code++) {
    uint32_t low, high;
    X::bytes(0x01010101u * static_cast<uint8_t>(code), low, high);
    for (uint32_t pair : {low, high})
      for (int i = 0; i < 2; i++)
        right = right && nc::emulated::value_of(static_cast<uint16_t>(pair >> (16 * i)), bf16) == code;
  }
  check(right, std::string("conversion of codes to ") + name);
}

// Splits cover K once, in order, none empty; the split does not depend on the number of tokens, and has slots.
void plans_cover_once() {
  bool right = true;
  for (int i = 0; i < 20000; i++) {
    const int64_t m = integer(1, 5000), n = up(integer(1, 60000), 64), k = up(integer(1, 60000), 64);
    const int sms = integer(1, 200), rows = integer(0, 1) ? 64 : 256, tokens = 8 << integer(0, 3);
    int32_t slots[nc::kMaxSplits + 1] = {};
    for (int s = 1; s <= nc::kMaxSplits; s++) slots[s] = s == 1 || integer(0, 3) ? sms * integer(1, 4) : 0;
    const NybbleCudaPlan plan = nc::plan(m, n, k, slots, rows, tokens);
    const NybbleCudaPlan one = nc::plan(1, n, k, slots, rows, 8);
    right = right && plan.splits >= 1 && plan.splits <= nc::kMaxSplits && plan.splits == one.splits;
    right = right && (plan.splits == 1 || slots[plan.splits] >= plan.splits);
    right = right && int64_t{plan.columns} * rows >= n && (plan.columns - 1) * int64_t{rows} < n;
    right = right && int64_t{plan.token_tiles} * tokens >= m && (plan.token_tiles - 1) * int64_t{tokens} < m;
    int64_t at = 0;
    for (int split = 0; split < plan.splits; split++) {
      const nc::Range range = nc::split_range(k / 64, plan.splits, split);
      right = right && range.begin == at && (range.end > range.begin);
      at = range.end;
    }
    right = right && at == k / 64;
    right = right && (plan.splits > 1) == (plan.parts_bytes > 0);
  }
  check(right, "every tile belongs to one split of one block");
}

// The share of the block slots that a plan fills, averaged over its waves.
double filled(int64_t n, int64_t k, int rows, int slots_at_once) {
  int32_t slots[nc::kMaxSplits + 1];
  for (int32_t& each : slots) each = slots_at_once;
  const NybbleCudaPlan plan = nc::plan(1, n, k, slots, rows, 8);
  const int blocks = plan.columns * plan.splits, waves = (blocks + slots_at_once - 1) / slots_at_once;
  return static_cast<double>(blocks) / waves / slots_at_once;
}

void plans_fill_waves() {
  const int64_t shapes[][2] = {{4096, 4096}, {8192, 8192}, {6144, 4096}, {28672, 4096}, {14336, 8192}, {57344, 8192}};
  bool right = true;
  for (const auto& shape : shapes)
    for (int slots : {132, 264, 396}) right = right && filled(shape[0], shape[1], 64, slots) > 0.72;
  check(right, "splits fill the waves of the usual shapes");
}

// The index functions for items, sums, chunks and permuted codes are one to one.
void places_are_distinct() {
  bool right = true;
  for (int rows : {64, 256}) {
    std::set<int> items, offsets;
    for (int i = 0; i < rows * 8 / 4; i++) {
      const nc::Item item = nc::item_of(i, rows);
      right = right && items.insert(item.token * rows + item.row).second && item.row % 4 == 0 && item.token < 8;
      right = right && offsets.insert(nc::sum_offset(item.token, item.row, rows)).second;
    }
  }
  for (int token = 0; token < 8; token++) {
    std::set<int> chunks;
    for (int chunk = 0; chunk < 8; chunk++) chunks.insert(nc::swizzle(token, chunk));
    right = right && chunks.size() == 8 && *chunks.rbegin() == 7;
  }
  std::set<int64_t> codes;
  for (int64_t k = 0; k < 192; k++) codes.insert(nc::permuted_code(k));
  right = right && codes.size() == 192 && *codes.rbegin() == 191;
  check(right, "places are distinct");
}

// A token's result depends neither on other tokens nor on how split-K adds the partial sums.
void batches_agree() {
  const Weight weight(4, 70, 1100, 32, false);
  std::vector<nc::Vector> x(8 * 1104 / 8);
  uint16_t* xs = reinterpret_cast<uint16_t*>(x.data());
  for (int i = 0; i < 8 * 1104; i++) xs[i] = nc::bf16_of_float(real());
  std::vector<std::vector<float>> results;
  for (int m : {1, 3, 8})
    for (bool clusters : {true, false}) {
      std::vector<float> y(8 * 70);
      NybbleCudaProduct p = weight.product();
      nc::emulated::may_read(x);
      p.x = xs;
      p.ldx = 1104;
      p.m = m;
      p.y = y.data();
      p.y_dtype = NYBBLE_F32;
      const Case c{m, 70, 1100, 32, false, 2, clusters, true};
      launch<nc::StreamOf<nc::Frag4<false, 2>, nc::Bf16, 1>>(p, c);
      y.resize(70);
      results.push_back(y);
    }
  bool same = true;
  for (const auto& y : results) same = same && y == results[0];
  check(same, "a token's bits are the same in every batch");
}

}  // namespace

int main() {
  weights_are_exact<nc::Bf16>("bf16", true);
  weights_are_exact<nc::F16>("f16", false);
  plans_cover_once();
  plans_fill_waves();
  places_are_distinct();
  batches_agree();
  using namespace nc;
  one_serves_each("w4a16 stream", Compiled<StreamOf, Frag4Forms, Floats, 1>::Type{});
  one_serves_each("w4a16 tiles", Compiled<TilesOf, Frag4Forms, Floats, 2, 4, 8>::Type{});
  run_all("w4a16 stream", Compiled<StreamOf, Frag4Forms, Floats, 1>::Type{});
  run_all("w8a16 stream", Compiled<StreamOf, Each<Rows8>, Floats, 1>::Type{});
  run_all("w4a16 tiles", Compiled<TilesOf, Frag4Forms, Floats, 2, 4, 8>::Type{});
  run_all("w8a16 tiles", Compiled<TilesOf, Each<Rows8>, Floats, 2, 4, 8>::Type{});
  run_all("w4a8 tiles", Compiled<TilesOf, Frag4FormsS8, Each<S8>, 1, 2, 4, 8>::Type{});
  run_all("w8a8 tiles", Compiled<TilesOf, Each<Rows8>, Each<S8>, 1, 2, 4, 8>::Type{});
  run_all("sp24w8a16 stream", Compiled<StreamOf, Each<Quads8>, Floats, 1>::Type{});
  run_all("sp24w4a16 stream", Compiled<StreamOf, Quads4Forms, Floats, 1>::Type{});
  run_all("sp24w16a16 stream", Compiled<StreamOf, Each<Quads16>, Each<Bf16>, 1>::Type{});
  run_all("sp24w8a16 tiles", Compiled<TilesOf, Each<Quads8>, Floats, 2, 4>::Type{});
  run_all("sp24w4a16 tiles", Compiled<TilesOf, Quads4Forms, Floats, 2, 4>::Type{});
  run_all("sp24w16a16 tiles", Compiled<TilesOf, Each<Quads16>, Each<Bf16>, 2, 4>::Type{});
  const auto& m = nc::emulated::machine();
  check(m.reads > 0 && m.conflicts == 0, std::to_string(m.conflicts) + " bank conflicts");
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
