// Compares every way to multiply sparse weights (dense kernels on expanded mask layouts, and kernels of the sparse
// layouts) with the dense scalar kernel, like compare_kernels. Also tests packing, checking and unpacking. Then
// corrupts packed weights, which must be rejected or cause no invalid memory access.
//   compare_sparse TARGET...        targets of kernels.def that this CPU supports
#include "../../csrc/portable.h"
#include "../../csrc/sparse.h"
#include "by_hand.h"

namespace {

constexpr int kDamages = kCases / 10;

Form form_of(const KernelEntry& kernel) {
  const std::string layout = kernel.layout;
  return layout == "gather8" ? Form::gather : layout == "blocks8" ? Form::blocks : Form::mask;
}

struct Weight {
  WeightShape shape, dense;
  Bytes qweight, scale, packed, packed_dense;
  explicit Weight(const WeightShape& s)
      : shape(s),
        dense{s.bits, s.n, s.k, s.group_size, s.symmetric},
        qweight(s.qweight_bytes()),
        scale(dense.scale_bytes()) {}
  Portable portable() { return {qweight.data(), scale.data(), nullptr}; }
};

// Random codes of which `zeros` of 256 are 0; in every other row of blocks, also 3 of 4 of the rest. With blocks, whole
// blocks are zero.
void fill_codes(Weight& w, Random& random) {
  const WeightShape& s = w.shape;
  const int64_t zeros = random.integer(0, 8) * 32, rows = s.block_n ? s.block_n : 1, ks = s.block_k ? s.block_k : 1;
  std::vector<bool> kept(static_cast<size_t>((s.n / rows + 1) * (s.k / ks + 1)));
  for (size_t i = 0; i < kept.size(); i++) {
    const bool thin = i / static_cast<size_t>(s.k / ks + 1) % 2;
    kept[i] = random.integer(0, 255) >= zeros && (!thin || random.integer(0, 3) == 0);
  }
  const int64_t row_bytes = (s.k + 1) / 2;
  for (int64_t n = 0; n < s.n; n++)
    for (int64_t k = 0; k < s.k; k++) {
      const bool keep = kept[static_cast<size_t>(n / rows * (s.k / ks + 1) + k / ks)];
      if (s.bits == 8) {
        w.qweight[static_cast<size_t>(n * s.k + k)] = static_cast<uint8_t>(keep ? random.integer(-127, 127) : 0);
        continue;
      }
      const int64_t code = keep ? random.integer(0, 15) : 8;
      w.qweight[static_cast<size_t>(n * row_bytes + k / 2)] |= static_cast<uint8_t>(code << k % 2 * 4);
    }
}

void check_bitmask(const Weight& w) {
  const WeightShape& s = w.dense;
  const size_t kept = static_cast<size_t>(count_kept(s, w.qweight.data()));
  Bytes mask(static_cast<size_t>(s.n * ((s.k + 7) / 8))), values(s.bits == 8 ? kept : (kept + 1) / 2);
  const Bitmask both{mask.data(), values.data(), values.size()};
  to_bitmask(s, w.qweight.data(), both);
  Bytes back(w.qweight.size());
  from_bitmask(s, both, 0, 0, back.data());
  if (back != w.qweight) throw std::runtime_error("from_bitmask is not the inverse of to_bitmask");
}

// A random weight, packed dense and sparse. Throws if unpacking does not restore it.
Weight random_weight(const WeightShape& shape, Random& random, int threads) {
  Weight w(shape);
  fill_codes(w, random);
  const NybbleDtype dtype = shape.bits == 8 ? NYBBLE_F32 : NYBBLE_BF16;
  for (size_t i = 0; i < w.scale.size(); i += bytes_of(dtype))
    store(&w.scale[i], dtype, (1.5f + 0.5f * random.real()) / (shape.bits == 8 ? 127.0f : 8.0f));
  w.packed_dense.resize(sections_of(w.dense).total);
  pack(w.dense, w.portable(), w.packed_dense.data(), threads);
  const SparsePack sparse(shape, w.portable(), threads);
  w.packed.resize(sparse.bytes());
  sparse.write(w.packed.data());
  Weight back(shape);
  unpack_sparse(shape, w.packed.data(), w.packed.size(), back.portable(), threads);
  if (back.qweight != w.qweight || back.scale != w.scale)
    throw std::runtime_error("unpack_sparse is not the inverse of SparsePack");
  check_bitmask(w);
  return w;
}

// Selects the kernels for a sparse form, like registry.py.
void choose(LinearCall& call, const KernelEntry& kernel, Form form) {
  call.kernel = &kernel;
  call.prepare = prepare_for(kernel);
  call.expand = call.few = nullptr;
  if (form != Form::mask) return;
  call.expand = nearest(kernel, [](const KernelEntry& e) { return e.expand != nullptr; });
  if (std::strncmp(kernel.scheme, "sp", 2) != 0) return;
  call.few = &kernel;
  call.kernel = nearest(kernel, [&](const KernelEntry& e) {
    return e.linear && std::strcmp(e.scheme, kernel.scheme + 2) == 0 && e.panel == kernel.panel;
  });
}

// Corrupts offsets and indices in copies of the packed weight: each must be rejected, or run without harm.
void damage(LinearCall call, const Weight& weight, Random& random) {
  const Sections at = sparse_sections(weight.shape, weight.packed.data(), weight.packed.size());
  const size_t sums_end = at.sum + static_cast<size_t>(weight.shape.tiles() * 64);
  // In the mask form, masks are stored among the values; in other forms, codes need no check.
  const size_t end = weight.shape.form == Form::mask ? weight.packed.size() : at.codes;
  for (int i = 0; i < kDamages; i++) {
    Bytes packed = weight.packed;
    for (int64_t n = random.integer(0, 2); n >= 0; n--) {
      const size_t place = static_cast<size_t>(random.integer(0, static_cast<int64_t>(end) - 1));
      if (place < at.scale || place >= sums_end) packed[place] = static_cast<uint8_t>(random.integer(0, 255));
    }
    if (random.integer(0, 7) == 0)
      packed.resize(static_cast<size_t>(random.integer(0, static_cast<int64_t>(packed.size()) - 1)));
    packed.shrink_to_fit();
    try {
      check_packed(weight.shape, packed.data(), packed.size());
    } catch (const std::invalid_argument&) {
      continue;
    }
    Weight back(weight.shape);
    unpack_sparse(weight.shape, packed.data(), packed.size(), back.portable(), 1);
    call.packed = span(packed);
    run_linear(call, 1);
  }
}

WeightShape random_shape(const KernelEntry& kernel, Random& random) {
  const int64_t group_sizes[] = {0, 32, 64, 128};
  WeightShape shape{kernel.weight_bits(), random.integer(1, 70), random.integer(1, 300)};
  if (shape.bits == 4) shape.group_size = random.pick(group_sizes);
  shape.form = form_of(kernel);
  if (shape.form == Form::blocks) {
    shape.block_n = 16 * random.integer(1, 8);
    shape.block_k = 4 * random.integer(1, 32);
  }
  return shape;
}

// Returns "" if the kernel agrees with the dense scalar one, else what is wrong.
std::string check(const KernelEntry& kernel, int seed) {
  Random random(static_cast<uint64_t>(seed));
  const NybbleDtype dtypes[] = {NYBBLE_F32, NYBBLE_BF16, NYBBLE_F16};
  const WeightShape shape = random_shape(kernel, random);
  const int64_t rows = random.integer(1, 40), stride = shape.k + random.integer(0, 1) * random.integer(0, 7);
  const NybbleDtype dtype = kernel.bf16_activations() ? NYBBLE_BF16 : random.pick(dtypes);
  const bool exact = kernel.int_activations();
  const NybbleDtype y_dtype = exact && shape.bits == 8 && random.integer(0, 1) ? NYBBLE_S32 : random.pick(dtypes);
  const int threads = static_cast<int>(random.integer(1, 3));
  char text[200];
  std::snprintf(text, sizeof text,
                "m %d, n %d, k %d, group size %d, blocks %d x %d, dtype %d to %d: ", static_cast<int>(rows),
                static_cast<int>(shape.n), static_cast<int>(shape.k), static_cast<int>(shape.group_size),
                static_cast<int>(shape.block_n), static_cast<int>(shape.block_k), dtype, y_dtype);
  const std::string problem = text;
  try {
    Weight weight = random_weight(shape, random, threads);
    check_packed(shape, weight.packed.data(), weight.packed.size());
    Bytes x = random_activations(rows, stride, shape.k, dtype, exact, random);
    Bytes bias = random.integer(0, 1) ? random_activations(1, shape.n, shape.n, dtype, false, random) : Bytes();
    const size_t y_bytes = static_cast<size_t>(rows * shape.n) * bytes_of(y_dtype);
    Bytes expected(y_bytes), got(y_bytes, 0x55);
    const std::string family = std::string(kernel.scheme).substr(std::strchr(kernel.scheme, 'w') - kernel.scheme);
    LinearCall call{};
    call.kernel = &find_kernel(family + "_scalar");
    call.prepare = &find_kernel("prepare_scalar");
    call.shape = weight.dense;
    call.x = span(x);
    call.packed = span(weight.packed_dense);
    call.bias = span(bias);
    call.y = span(expected);
    call.rows = rows;
    call.stride = stride;
    call.x_dtype = call.bias_dtype = dtype;
    call.y_dtype = y_dtype;
    run_linear(call, 1);
    choose(call, kernel, shape.form);
    call.shape = shape;
    call.packed = span(weight.packed);
    call.y = span(got);
    run_linear(call, threads);
    const double least = 0.1 * std::sqrt(static_cast<double>(rows * shape.n * shape.k));
    const auto agrees = [&](const Bytes& y) { return exact ? y == expected : close(y, expected, y_dtype, least); };
    if (!agrees(got)) return problem + "differs from the dense kernel";
    if (shape.form == Form::blocks) {
      Bytes by_hand(y_bytes, 0x55);
      call.y = span(by_hand);
      run_by_hand(call, sparse_sections(shape, weight.packed.data(), weight.packed.size()), random);
      if (!agrees(by_hand)) return problem + "differs from the dense kernel when called without the driver";
      call.y = span(got);
    }
    damage(call, weight, random);
  } catch (const std::exception& error) {
    return problem + error.what();
  }
  return "";
}

}  // namespace

int main(int argc, char** argv) {
  // There are no sparse weights for activations of 7 bits, and none of 3 bits, of 8 bits by group, with a book or with
  // scales of two levels.
  const auto has_sparse = [](const KernelEntry& kernel) {
    return kernel.panel != NYBBLE_PANEL_U7 && kernel.weight_bits() != 3 && !is_grouped(kernel) && !is_paired(kernel) &&
           !kernel.reads_book() && !kernel.reads_levels();
  };
  return compare(argc, argv, has_sparse, check);
}
