// Tests the wgmma kernels on a CPU, with the emulator emulate_hopper.h: w8a8 bit for bit against integers, w4a8 against
// float64. Covers groups, zero points, partial tiles in all directions, many rounds of the ring, early and late
// completion of copies and products, and warps in any order. Prints "... passed, 0 failed".
#define NYBBLE_EMULATE_CUDA
#include <random>
#include <string>

#include "../../csrc/cuda/quantize.cuh"
#include "../../csrc/cuda/w4a8_sm90.cuh"
#include "../../csrc/cuda/w8a8_sm90.cuh"

namespace nc = nybble::cuda;

namespace {

int passed = 0, failed = 0;

void check(bool holds, const std::string& what) {
  holds ? passed++ : failed++;
  if (!holds) std::printf("FAILED %s\n", what.c_str());
}

std::mt19937 generator(11);
int integer(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }
float real() { return std::normal_distribution<float>()(generator); }
int64_t up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

struct Case {
  int m, n, k, group;
  bool symmetric;
  int clusters;             // number of clusters
  int y_dtype, bias_dtype;  // bias_dtype -1: none
  bool late_copies, late_products;
};

std::string text(const char* kernel, const Case& c) {
  std::string all = kernel;
  const std::pair<const char*, int> fields[] = {{"m", c.m},
                                                {"n", c.n},
                                                {"k", c.k},
                                                {"group", c.group},
                                                {"symmetric", c.symmetric},
                                                {"clusters", c.clusters},
                                                {"y", c.y_dtype},
                                                {"bias", c.bias_dtype},

                                                {"late_copies", c.late_copies},
                                                {"late_products", c.late_products}};
  for (const auto& field : fields) all += std::string(" ") + field.first + "=" + std::to_string(field.second);
  return all;
}

// Values of a dtype, as bytes.
struct Values {
  int dtype;
  std::vector<nc::Vector> bytes;
  Values(int dtype, size_t count) : dtype(dtype), bytes(count / 4 + 2) {}
  void set(size_t i, float value) { nc::write(bytes.data(), dtype, static_cast<int64_t>(i), value); }
  float get(size_t i) const { return nc::read(bytes.data(), dtype, static_cast<int64_t>(i)); }
};

// Activation codes, and the fields of a product that do not depend on the weights.
struct Tokens {
  std::vector<nc::Vector> codes;
  std::vector<float> scale;
  std::vector<int32_t> zero;
  Values bias, y;
  int8_t* rows() { return reinterpret_cast<int8_t*>(codes.data()); }

  // place: position of input k in a row.
  Tokens(const Case& c, int64_t k_padded, int64_t (*place)(int64_t))
      : codes(c.m * k_padded / 16),
        bias(c.bias_dtype < 0 ? NYBBLE_F32 : c.bias_dtype, c.n),
        y(c.y_dtype, static_cast<size_t>(c.m) * c.n + 64) {
    for (int m = 0; m < c.m; m++) {
      for (int k = 0; k < c.k; k++) rows()[m * k_padded + place(k)] = static_cast<int8_t>(integer(-128, 127));
      scale.push_back(std::ldexp(1 + integer(0, 1000) / 999.0f, -9));
      zero.push_back(integer(-128, 127));
    }
    for (int n = 0; n < c.n; n++) bias.set(n, real());
    for (size_t i = 0; i < static_cast<size_t>(c.m) * c.n + 64; i++) y.set(i, -77.0f);
  }

  void into(const Case& c, NybbleCudaProduct& p) {
    p.x = codes.data();
    p.ldx = p.k_padded;
    p.act_scale = scale.data();
    p.act_zero = zero.data();
    p.m = c.m;
    p.n = c.n;
    p.k = c.k;
    p.bias = c.bias_dtype < 0 ? nullptr : bias.bytes.data();
    p.bias_dtype = bias.dtype;
    p.y = y.bytes.data();
    p.y_dtype = c.y_dtype;
    p.splits = 1;
  }

  // Whether memory after y is unchanged.
  bool margins(const Case& c) const {
    const size_t size = static_cast<size_t>(c.m) * c.n;
    bool same = true;
    for (size_t i = 0; i < 64; i++) same = same && y.get(size + i) == -77.0f;
    return same;
  }
};

void run(const Case& c, int threads, int shared, const std::function<void()>& kernel) {
  auto& h = nc::emulated::hopper();
  h.late_copies = c.late_copies;
  h.late_products = c.late_products;
  for (int x = 0; x < c.clusters * nc::kPair; x += nc::kPair)
    nc::emulated::run_blocks(c.clusters * nc::kPair, x, nc::kPair, threads, shared / 16 * 16 + 16, kernel);
}

template <int Outputs>
void compare_w8a8(const Case& c) {
  using T = nc::W8A8<Outputs>;
  const int64_t n_padded = up(c.n, 64), k_padded = up(c.k, 128);
  std::vector<nc::Vector> w(n_padded * k_padded / 16);
  std::vector<float> scale(n_padded);
  std::vector<int32_t> sums(n_padded);
  int8_t* codes = reinterpret_cast<int8_t*>(w.data());
  for (int n = 0; n < c.n; n++) {
    for (int k = 0; k < c.k; k++) sums[n] += codes[n * k_padded + k] = static_cast<int8_t>(integer(-128, 127));
    scale[n] = std::ldexp(1 + integer(0, 1000) / 999.0f, -7);
  }
  Tokens tokens(c, k_padded, [](int64_t k) { return k; });
  NybbleCudaProduct p{};
  p.codes = reinterpret_cast<const uint8_t*>(w.data());
  p.row_scale = scale.data();
  p.column_sum = sums.data();
  p.n_padded = n_padded;
  p.k_padded = k_padded;
  tokens.into(c, p);
  const nc::TensorMap x_map{reinterpret_cast<const uint8_t*>(p.x), c.m, k_padded, T::kTokens};
  const nc::TensorMap w_map{p.codes, n_padded, k_padded, T::kShare};
  run(c, T::kThreads, T::kShared, [=] {
    if (p.y_dtype == NYBBLE_F32) nc::w8a8_sm90_kernel<T, NYBBLE_F32>(p, x_map, w_map);
    if (p.y_dtype == NYBBLE_BF16) nc::w8a8_sm90_kernel<T, NYBBLE_BF16>(p, x_map, w_map);
    if (p.y_dtype == NYBBLE_F16) nc::w8a8_sm90_kernel<T, NYBBLE_F16>(p, x_map, w_map);
  });
  bool same = tokens.margins(c);
  Values expected(c.y_dtype, 1);
  for (int m = 0; m < c.m; m++)
    for (int n = 0; n < c.n; n++) {
      int32_t sum = -tokens.zero[m] * sums[n];
      for (int k = 0; k < c.k; k++) sum += tokens.rows()[m * k_padded + k] * codes[n * k_padded + k];
      const float bias = c.bias_dtype < 0 ? 0.0f : tokens.bias.get(n);
      expected.set(0, std::fma(static_cast<float>(sum), tokens.scale[m] * scale[n], bias));
      same = same && expected.get(0) == tokens.y.get(static_cast<size_t>(m) * c.n + n);
    }
  check(same, text(Outputs == 256 ? "w8a8_sm90 wide" : "w8a8_sm90 narrow", c));
}

// All combinations of early and late events for each shape, with varying output and bias types.
std::vector<Case> cases(const std::vector<std::array<int, 4>>& shapes) {
  std::vector<Case> found;
  int turn = 0;
  for (const auto& s : shapes)
    for (int events = 0; events < 4; events++) {
      const int y_dtype = (turn + turn / 4) % 3, bias_dtype = turn % 4 - 1;
      found.push_back({s[0], s[1], s[2], 0, true, s[3], y_dtype, bias_dtype, (events & 1) > 0, (events & 2) > 0});
      turn++;
    }
  return found;
}

void run_w8a8() {
  // m, n, k, clusters
  for (const Case& c : cases({{1, 1, 1, 1},
                              {128, 256, 128, 1},
                              {129, 264, 300, 2},
                              {300, 257, 1664, 1},
                              {5, 600, 520, 2},
                              {270, 80, 1030, 3},
                              {1100, 520, 128, 4}})) {
    compare_w8a8<256>(c);
    compare_w8a8<128>(c);
  }
}

// A weight in layout frag4, packed like layouts/gpu.py, and its codes.
struct Frag4 {
  int64_t n_padded, k_padded, group;  // group: number of inputs
  std::vector<nc::Vector> tiles;
  std::vector<uint16_t> scale;
  std::vector<uint8_t> zero, codes;
  std::vector<float> sum;

  explicit Frag4(const Case& c)
      : n_padded(up(c.n, 64)),
        k_padded(up(c.k, c.group > 64 ? c.group : 64)),
        group(c.group ? c.group : k_padded),
        tiles(n_padded * k_padded / 32),
        scale(k_padded / group * n_padded),
        zero(scale.size(), c.symmetric ? 8 : 0),
        codes(n_padded * k_padded),
        sum(n_padded) {
    uint8_t* bytes = reinterpret_cast<uint8_t*>(tiles.data());
    const int place[4] = {0, 2, 1, 3};
    for (int n = 0; n < c.n; n++) {
      for (int64_t g = 0; g < k_padded / group; g++) {
        scale[g * n_padded + n] = static_cast<uint16_t>((integer(0, 1) << 15) | 0x3C00 | integer(0, 255));
        if (!c.symmetric) zero[g * n_padded + n] = static_cast<uint8_t>(integer(0, 15));
      }
      double total = 0;
      for (int k = 0; k < c.k; k++) {
        const int code = codes[n * k_padded + k] = static_cast<uint8_t>(integer(0, 15));
        const int64_t tile = (n / 64 * (k_padded / 64) + k / 64) * 2048;
        const int64_t word = n % 8 / 2 * 512 + n % 64 / 8 * 64 + k % 32 / 8 * 16 + k % 64 / 32 * 8 + k % 8 / 4 * 4;
        bytes[tile + word + place[k % 4]] |= static_cast<uint8_t>(code << (n % 2 ? 4 : 0));
        total += scale_of(n, k) * (code - zero_of(n, k));
      }
      sum[n] = static_cast<float>(total);
    }
  }
  float scale_of(int n, int k) const {
    return static_cast<float>(nc::emulated::value_of(scale[k / group * n_padded + n], true));
  }
  int zero_of(int n, int k) const { return zero[k / group * n_padded + n]; }
};

// An output computed with the kernel's operations, and its error against float64, relative to its terms.
float w4a8_expected(const Case& c, const Frag4& weight, Tokens& tokens, int m, int n, double& error) {
  const int8_t* q = tokens.rows() + m * weight.k_padded;
  float total = 0;
  double exact = 0, size = 0;
  for (int first = 0; first < weight.k_padded; first += static_cast<int>(weight.group)) {
    int32_t sum = 0;
    for (int k = first; k < first + weight.group && k < c.k; k++) {
      const int product = q[nc::wgmma_code(k)] * (weight.codes[n * weight.k_padded + k] - weight.zero_of(n, k));
      sum += product;
      exact += static_cast<double>(product) * weight.scale_of(n, k);
      size += std::fabs(static_cast<double>(product) * weight.scale_of(n, k));
    }
    total = std::fma(weight.scale_of(n, first), static_cast<float>(sum), total);
  }
  const float bias = c.bias_dtype < 0 ? 0.0f : tokens.bias.get(n), zero = static_cast<float>(tokens.zero[m]);
  const float y = std::fma(std::fma(-zero, weight.sum[n], total), tokens.scale[m], bias);
  size += std::fabs(static_cast<double>(zero) * weight.sum[n]);
  exact = (exact - static_cast<double>(zero) * weight.sum[n]) * tokens.scale[m] + bias;
  error = std::fabs(y - exact) / (size * tokens.scale[m] + std::fabs(bias) + 1e-30);
  return y;
}

template <int Warpgroups, int Steps, bool Whole, bool Symmetric>
void compare_w4a8(const Case& c) {
  using T = nc::W4A8<Warpgroups, Steps, Whole, Symmetric>;
  const Frag4 weight(c);
  Tokens tokens(c, weight.k_padded, nc::wgmma_code);
  NybbleCudaProduct p{};
  p.codes = reinterpret_cast<const uint8_t*>(weight.tiles.data());
  p.scale = weight.scale.data();
  p.zero_point = c.symmetric ? nullptr : weight.zero.data();
  p.weight_sum = weight.sum.data();
  p.n_padded = weight.n_padded;
  p.k_padded = weight.k_padded;
  tokens.into(c, p);
  nc::emulated::hopper().readable = {{p.codes, weight.tiles.size() * 16}};
  const nc::TensorMap x_map{reinterpret_cast<const uint8_t*>(p.x), c.m, p.k_padded, T::kShare};
  run(c, T::kThreads, T::kShared, [=] { nc::w4a8_sm90_kernel<T>(p, x_map); });
  bool same = tokens.margins(c), close = true;
  Values expected(c.y_dtype, 1);
  for (int m = 0; m < c.m; m++)
    for (int n = 0; n < c.n; n++) {
      double error = 0;
      expected.set(0, w4a8_expected(c, weight, tokens, m, n, error));
      same = same && expected.get(0) == tokens.y.get(static_cast<size_t>(m) * c.n + n);
      close = close && error < 2e-6;
    }
  check(same, text(Warpgroups == 2 ? "w4a8_sm90 wide" : "w4a8_sm90 narrow", c));
  check(close, text("w4a8_sm90 against float64", c));
}

template <int Warpgroups>
void run_w4a8(Case c) {
  for (const bool symmetric : {true, false}) {
    c.symmetric = symmetric;
    c.group = 0;
    compare_w4a8<Warpgroups, 4, true, false>(c);
    c.group = 32;
    symmetric ? compare_w4a8<Warpgroups, 1, false, true>(c) : compare_w4a8<Warpgroups, 1, false, false>(c);
    c.group = 64;
    symmetric ? compare_w4a8<Warpgroups, 2, false, true>(c) : compare_w4a8<Warpgroups, 2, false, false>(c);
    c.group = 128;
    symmetric ? compare_w4a8<Warpgroups, 4, false, true>(c) : compare_w4a8<Warpgroups, 4, false, false>(c);
  }
}

void run_w4a8() {
  int turn = 0;
  for (const Case& c : cases({{1, 1, 1, 1},
                              {128, 128, 256, 1},
                              {130, 200, 300, 2},
                              {70, 66, 1600, 1},
                              {200, 70, 960, 3},
                              {300, 70, 192, 1}}))
    turn++ % 2 ? run_w4a8<1>(c) : run_w4a8<2>(c);
}

// Quantization for wgmma gives the codes of the plain order, permuted by wgmma_code.
void codes_find_their_places() {
  bool right = true;
  for (const int k : {1, 60, 64, 200}) {
    const int64_t k_padded = up(k, 64);
    Values x(NYBBLE_F32, k);
    for (int i = 0; i < k; i++) x.set(i, real());
    std::vector<int8_t> codes[2];
    for (const int order : {NYBBLE_PLAIN_ORDER, NYBBLE_WGMMA_ORDER}) {
      auto& to = codes[order == NYBBLE_WGMMA_ORDER];
      to.assign(k_padded, 99);
      float scale = 0;
      int32_t zero = 0;
      const NybbleCudaRows rows{x.bytes.data(), k, NYBBLE_F32, 1, k, k_padded, order, to.data(), &scale, &zero};
      nc::emulated::run_blocks(1, 0, 1, nc::kThreads, 3 * nc::kThreads * 4, [=] { nc::quantize_kernel(rows); });
    }
    for (int64_t i = 0; i < k_padded; i++) right = right && codes[0][i] == codes[1][nc::wgmma_code(i)];
  }
  check(right, "codes are permuted correctly");
}

// output_tile enumerates every output tile exactly once.
void tiles_cover_once() {
  bool right = true;
  for (int i = 0; i < 200; i++) {
    const int tall = integer(1, 40), wide = integer(1, 40);
    std::vector<int> seen(tall * wide);
    for (int at = 0; at < tall * wide; at++) {
      const nc::OutputTile tile = nc::output_tile(at, tall, wide);
      right = right && tile.row >= 0 && tile.row < tall && tile.column >= 0 && tile.column < wide;
      right = right && !seen[tile.row * wide + tile.column]++;
    }
  }
  check(right, "every output tile is computed once");
}

}  // namespace

int main() {
  tiles_cover_once();
  codes_find_their_places();
  run_w8a8();
  run_w4a8();
  const auto& m = nc::emulated::machine();
  check(m.reads > 0 && m.conflicts == 0, std::to_string(m.conflicts) + " bank conflicts");
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
