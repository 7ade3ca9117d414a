// The kernels for wgmma, compiled for a CPU by emulate_hopper.h: w8a8 bit for bit against integers, w4a8 against
// float64; groups, zero points, edges in every direction, rings that go round often, copies and products that come
// early and late, warps in any order. Prints "... passed, 0 failed".
#define NYBBLE_EMULATE_CUDA
#include <random>
#include <string>

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
  int blocks;               // that share the tiles
  int y_dtype, bias_dtype;  // bias_dtype -1: none
  int shift;                // elements that y is shifted by
  bool late_copies, late_products;
};

std::string text(const char* kernel, const Case& c) {
  std::string all = kernel;
  const std::pair<const char*, int> fields[] = {{"m", c.m},
                                                {"n", c.n},
                                                {"k", c.k},
                                                {"group", c.group},
                                                {"symmetric", c.symmetric},
                                                {"blocks", c.blocks},
                                                {"y", c.y_dtype},
                                                {"bias", c.bias_dtype},
                                                {"shift", c.shift},
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

// The activations' codes, and the product's fields that do not depend on how weights are packed.
struct Tokens {
  std::vector<nc::Vector> codes;
  std::vector<float> scale;
  std::vector<int32_t> zero;
  Values bias, y;
  int8_t* rows() { return reinterpret_cast<int8_t*>(codes.data()); }

  // place: where a row holds input k.
  Tokens(const Case& c, int64_t k_padded, int64_t (*place)(int64_t))
      : codes(c.m * k_padded / 16),
        bias(c.bias_dtype < 0 ? NYBBLE_F32 : c.bias_dtype, c.n),
        y(c.y_dtype, static_cast<size_t>(c.m) * c.n + c.shift + 64) {
    for (int m = 0; m < c.m; m++) {
      for (int k = 0; k < c.k; k++) rows()[m * k_padded + place(k)] = static_cast<int8_t>(integer(-128, 127));
      scale.push_back(std::ldexp(1 + integer(0, 1000) / 999.0f, -9));
      zero.push_back(integer(-128, 127));
    }
    for (int n = 0; n < c.n; n++) bias.set(n, real());
    for (size_t i = 0; i < static_cast<size_t>(c.m) * c.n + c.shift + 64; i++) y.set(i, -77.0f);
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
    p.y = reinterpret_cast<char*>(y.bytes.data()) + c.shift * (c.y_dtype == NYBBLE_F32 ? 4 : 2);
    p.y_dtype = c.y_dtype;
    p.splits = 1;
  }

  // What lies around y is as it was.
  bool margins(const Case& c) const {
    const size_t size = static_cast<size_t>(c.m) * c.n;
    bool same = true;
    for (int i = 0; i < c.shift; i++) same = same && y.get(i) == -77.0f;
    for (size_t i = 0; i < 64; i++) same = same && y.get(size + c.shift + i) == -77.0f;
    return same;
  }
};

void run(const Case& c, int threads, int shared, const std::function<void()>& kernel) {
  auto& h = nc::emulated::hopper();
  h.late_copies = c.late_copies;
  h.late_products = c.late_products;
  for (int x = 0; x < c.blocks; x++) nc::emulated::run_block(c.blocks, x, threads, shared / 16 * 16 + 16, kernel);
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
  p.weight_sum = reinterpret_cast<const float*>(sums.data());
  p.n_padded = n_padded;
  p.k_padded = k_padded;
  tokens.into(c, p);
  const nc::TensorMap x_map{reinterpret_cast<const uint8_t*>(p.x), c.m, k_padded, T::kTokens};
  const nc::TensorMap w_map{p.codes, n_padded, k_padded, T::kOutputs};
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
      same = same && expected.get(0) == tokens.y.get(static_cast<size_t>(m) * c.n + n + c.shift);
    }
  check(same, text(Outputs == 256 ? "w8a8_sm90 wide" : "w8a8_sm90 narrow", c));
}

// Every edge, kind of output, and order of events.
std::vector<Case> cases(const std::vector<std::array<int, 4>>& shapes) {
  std::vector<Case> found;
  int turn = 0;
  for (const auto& s : shapes)
    for (int events = 0; events < 4; events++) {
      const int y_dtype = (turn + turn / 4) % 3, bias_dtype = turn % 4 - 1, shift = turn % 5 == 4;
      found.push_back(
          {s[0], s[1], s[2], 0, true, s[3], y_dtype, bias_dtype, shift, (events & 1) > 0, (events & 2) > 0});
      turn++;
    }
  return found;
}

void run_w8a8() {
  // m, n, k, blocks
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

// Every output tile is one block's, and no tall group is left for another column's before it is done.
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
  run_w8a8();
  const auto& m = nc::emulated::machine();
  check(m.reads > 0 && m.conflicts == 0, std::to_string(m.conflicts) + " bank conflicts");
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}
