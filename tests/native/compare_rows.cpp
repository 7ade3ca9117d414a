// Compares the row kernels of the given targets with the scalar ones, on random problems and without Python, and chains
// of them on one thread with chains on several, bit for bit.
//   compare_rows TARGET...           targets of kernels.def that this CPU supports
// Every buffer has its exact size, so that a sanitizer detects out-of-bounds accesses.
#include "../../csrc/chain.h"
#include "random_problem.h"

namespace {

const KernelEntry& rows_of_target(const std::string& target) { return find_kernel("rows_" + target); }

// A matrix of random elements, its last row without a gap after it.
struct Random2D {
  Bytes bytes;
  int64_t stride;
  Random2D(int64_t rows, int64_t columns, NybbleDtype dtype, Random& random)
      : stride(columns + random.integer(0, 1) * random.integer(0, 7)) {
    bytes.resize(static_cast<size_t>((rows - 1) * stride + columns) * bytes_of(dtype));
    for (size_t i = 0; i < bytes.size(); i += bytes_of(dtype)) store(&bytes[i], dtype, 4 * random.real());
  }
  NybbleMatrix matrix() { return {bytes.data(), stride}; }
};

// The largest difference, relative to magnitudes above 1, in units of what the dtype may round to.
float difference(const Bytes& a, const Bytes& b, NybbleDtype dtype) {
  const float unit = dtype == NYBBLE_F32 ? 0x1p-19f : dtype == NYBBLE_BF16 ? 0x1p-6f : 0x1p-9f;
  return largest(a, b, dtype,
                 [&](float x, float y) { return std::fabs(x - y) / unit / std::fmax(1.0f, std::fabs(x)); });
}

struct Sizes {
  int64_t rows, columns;
  NybbleDtype dtype;
  explicit Sizes(Random& random) {
    const NybbleDtype dtypes[] = {NYBBLE_F32, NYBBLE_BF16, NYBBLE_F16};
    rows = random.integer(1, 9);
    columns = 2 * random.integer(1, 90);
    dtype = random.pick(dtypes);
  }
};

std::string check_norm(const KernelEntry& kernel, Random& random) {
  const Sizes size(random);
  const bool adds = random.integer(0, 1), keeps = random.integer(0, 1);
  Random2D x(size.rows, size.columns, size.dtype, random), residual(size.rows, size.columns, size.dtype, random);
  Random2D weight(1, size.columns, size.dtype, random), bias(1, size.columns, NYBBLE_F32, random);
  const int kind = static_cast<int>(random.integer(NYBBLE_NORM_NONE, NYBBLE_NORM_RMS));
  const bool scaled = kind != NYBBLE_NORM_NONE && random.integer(0, 1);
  const NybbleScale scale{scaled ? weight.bytes.data() : nullptr,
                          scaled && kind == NYBBLE_NORM_LAYER ? bias.bytes.data() : nullptr,
                          size.dtype,
                          NYBBLE_F32,
                          1e-5f,
                          0.0f};
  Random2D y(size.rows, size.columns, size.dtype, random), sum(size.rows, size.columns, size.dtype, random);
  Random2D other = y, other_sum = sum;
  for (auto [entry, to, kept] : {std::tuple(&kernel, &y, &sum), {&rows_of_target("scalar"), &other, &other_sum}}) {
    const NybbleNormArgs args{kind,
                              size.dtype,
                              size.rows,
                              size.columns,
                              x.matrix(),
                              adds ? residual.matrix() : NybbleMatrix{},
                              keeps ? kept->matrix() : NybbleMatrix{},
                              to->matrix(),
                              scale};
    if (entry->rows->norm(&args) != NYBBLE_OK) return "norm: refused";
  }
  if (sum.bytes != other_sum.bytes) return "norm: the sums differ";
  return difference(y.bytes, other.bytes, size.dtype) > 4 ? "norm: differs" : "";
}

std::string check_activate(const KernelEntry& kernel, Random& random) {
  const Sizes size(random);
  Random2D x(size.rows, size.columns, size.dtype, random), times(size.rows, size.columns, size.dtype, random);
  Random2D plus(size.rows, size.columns, size.dtype, random), y(size.rows, size.columns, size.dtype, random);
  Random2D other = y;
  const int act = static_cast<int>(random.integer(NYBBLE_ACT_IDENTITY, NYBBLE_ACT_TANH));
  const bool multiplies = random.integer(0, 1), adds = random.integer(0, 1);
  for (auto [entry, to] : {std::pair(&kernel, &y), {&rows_of_target("scalar"), &other}}) {
    NybbleActivateArgs args{};
    args.act = act;
    args.dtype = size.dtype;
    args.rows = size.rows;
    args.columns = size.columns;
    args.x = x.matrix();
    if (multiplies) args.other = times.matrix();
    if (adds) args.residual = plus.matrix();
    args.y = to->matrix();
    if (entry->rows->activate(&args) != NYBBLE_OK) return "activate: refused";
  }
  return difference(y.bytes, other.bytes, size.dtype) > 8 ? "activate: differs" : "";
}

std::string check_rotate(const KernelEntry& kernel, Random& random) {
  const Sizes size(random);
  const int64_t heads = random.integer(1, 3), width = heads * size.columns;
  Random2D x(size.rows, width, size.dtype, random), y(size.rows, width, size.dtype, random), other = y;
  const int64_t rotated = 2 * random.integer(1, size.columns / 2), length = random.integer(1, size.rows);
  Random2D cos(size.rows, rotated, NYBBLE_F32, random), sin(size.rows, rotated, NYBBLE_F32, random);
  Random2D weight(1, size.columns, size.dtype, random);
  for (auto [entry, to] : {std::pair(&kernel, &y), {&rows_of_target("scalar"), &other}}) {
    NybbleRotateArgs args{};
    args.dtype = size.dtype;
    args.interleaved = width % 3 == 0;
    args.rows = size.rows;
    args.heads = heads;
    args.head_dim = size.columns;
    args.rotated = rotated;
    args.x = x.matrix();
    args.y = to->matrix();
    args.cos = cos.bytes.data();
    args.sin = sin.bytes.data();
    args.cos_token = cos.stride;
    args.sin_token = sin.stride;
    args.length = length;
    args.scale = {rotated % 4 ? weight.bytes.data() : nullptr, nullptr, size.dtype, NYBBLE_F32, 1e-5f, 0.0f};
    if (entry->rows->rotate(&args) != NYBBLE_OK) return "rotate: refused";
  }
  return difference(y.bytes, other.bytes, size.dtype) > 16 ? "rotate: differs" : "";
}

std::string check_cells(const KernelEntry& kernel, Random& random) {
  const Sizes size(random);
  const bool gru = random.integer(0, 1);
  const int64_t units = size.columns, begin = random.integer(0, units - 1), end = random.integer(begin, units);
  Random2D x(size.rows, 4 * units, NYBBLE_F32, random), h(size.rows, 4 * units, NYBBLE_F32, random);
  Random2D before(size.rows, units, size.dtype, random), cell(size.rows, units, NYBBLE_F32, random);
  Random2D state(size.rows, units, size.dtype, random), y(size.rows, units, size.dtype, random);
  Random2D other_cell = cell, other_state = state, other_y = y;
  for (auto [entry, c, s, to] :
       {std::tuple(&kernel, &cell, &state, &y), {&rows_of_target("scalar"), &other_cell, &other_state, &other_y}}) {
    const NybbleGatesArgs args{size.dtype, size.rows,   units,           begin,       end,         x.matrix(),
                               h.matrix(), c->matrix(), before.matrix(), s->matrix(), to->matrix()};
    if ((gru ? entry->rows->gru : entry->rows->lstm)(&args) != NYBBLE_OK) return "cells: refused";
  }
  const bool same = difference(cell.bytes, other_cell.bytes, NYBBLE_F32) <= 4 &&
                    difference(state.bytes, other_state.bytes, size.dtype) <= 4 &&
                    difference(y.bytes, other_y.bytes, size.dtype) <= 4;
  return same ? "" : "cells: differ";
}

std::string check_mix(const KernelEntry& kernel, Random& random) {
  const Sizes size(random);
  const int64_t terms = random.integer(1, 4), rows = random.integer(1, 9);
  Random2D x(size.rows, size.columns, size.dtype, random), y(rows, size.columns, size.dtype, random), other = y;
  std::vector<int64_t> from(static_cast<size_t>(rows * terms));
  std::vector<float> weight(from.size());
  for (int64_t& each : from) each = random.integer(-1, size.rows - 1);
  for (float& each : weight) each = random.real();
  for (auto [entry, to] : {std::pair(&kernel, &y), {&rows_of_target("scalar"), &other}}) {
    const NybbleMixArgs args{size.dtype,  rows,          size.columns, terms,
                             from.data(), weight.data(), x.matrix(),   to->matrix()};
    if (entry->rows->mix(&args) != NYBBLE_OK) return "mix: refused";
  }
  return y.bytes == other.bytes ? "" : "mix: differs";
}

// Three steps, on one thread and on several.
std::string check_chain(const KernelEntry& kernel, Random& random) {
  const Sizes size(random);
  const int64_t rows = random.integer(1, 300);
  Random2D x(rows, size.columns, size.dtype, random), y(rows, size.columns, size.dtype, random), other = y;
  Chain chain(size.dtype, {size.columns, size.columns, size.columns}, 2, kernel.name, "attention_scalar");
  Norm norm;
  norm.kind = NYBBLE_NORM_LAYER;
  norm.eps = 1e-5f;
  chain.add_norm(norm, 0, 2, -1, -1);
  chain.add_activate(NYBBLE_ACT_GELU, 2, 2, 0);
  chain.add_norm(Norm{}, 2, 1, 0, -1);
  for (auto [to, threads] : {std::pair(&y, 1), {&other, 3}})
    chain.run(1, rows, {{span(x.bytes), x.stride}, {span(to->bytes), to->stride}}, {}, threads);
  return y.bytes == other.bytes ? "" : "chain: threads change the result";
}

// "" or the first thing that is wrong.
std::string check(const KernelEntry& kernel, int seed) {
  Random random(static_cast<uint64_t>(seed));
  for (const auto part : {check_norm, check_activate, check_rotate, check_cells, check_mix, check_chain})
    if (std::string wrong = part(kernel, random); !wrong.empty()) return wrong;
  return "";
}

}  // namespace

int main(int argc, char** argv) {
  return compare_all(argc, argv, kCases, [](const KernelEntry& kernel) { return kernel.rows != nullptr; }, check);
}
