// Compares every dense linear kernel of the given targets with the scalar kernel of its scheme, on random problems and
// without Python: bit for bit for quantized activations, within an error bound for float activations.
//   compare_kernels TARGET...        targets of kernels.def that this CPU supports
// Every buffer has its exact size, so that a sanitizer detects out-of-bounds accesses.
#include "by_hand.h"

namespace {

struct Weight {
  WeightShape shape;
  Bytes qweight, scale, zero_point, order, packed;
  explicit Weight(const WeightShape& s)
      : shape(s),
        qweight(s.qweight_bytes()),
        scale(s.scale_bytes()),
        zero_point(s.zero_point_bytes()),
        order(s.order_bytes()) {}
  Portable portable() { return {qweight.data(), scale.data(), zero_point.data(), order.data()}; }
};

// A random packed weight of magnitude 1. Throws if unpacking does not restore it.
Weight random_weight(const WeightShape& shape, Random& random, int threads) {
  Weight w(shape);
  // In some weights, most codes are small: then sums of products fit in fewer bits.
  const int small = shape.bits == 8 && random.integer(0, 1) ? 2 : 0;
  for (uint8_t& code : w.qweight) {
    const int64_t any = shape.bits == 8 ? random.integer(-128, 127) : random.integer(0, 255);
    code = static_cast<uint8_t>(random.integer(0, 63) ? any >> small : any);
  }
  if (shape.bits == 4 && shape.k % 2)
    for (int64_t n = 1; n <= shape.n; n++) w.qweight[static_cast<size_t>(n * ((shape.k + 1) / 2) - 1)] &= 15;
  const NybbleDtype dtype = shape.bits == 8 ? NYBBLE_F32 : NYBBLE_BF16;
  for (size_t i = 0; i < w.scale.size(); i += bytes_of(dtype))
    store(&w.scale[i], dtype, (1.5f + 0.5f * random.real()) / (shape.bits == 8 ? 127.0f : 8.0f));
  for (uint8_t& zero : w.zero_point) zero = static_cast<uint8_t>(random.integer(0, 15));
  for (int32_t k = 0; shape.ordered && k < shape.k; k++) {  // each input changes places with one before it
    const size_t other = static_cast<size_t>(random.integer(0, k));
    std::memcpy(&w.order[static_cast<size_t>(k) * 4], &w.order[other * 4], 4);
    std::memcpy(&w.order[other * 4], &k, 4);
  }
  w.packed.resize(sections_of(shape).total);
  pack(shape, w.portable(), w.packed.data(), threads);
  Weight back(shape);
  unpack(shape, w.packed.data(), back.portable(), threads);
  if (back.qweight != w.qweight || back.scale != w.scale || back.zero_point != w.zero_point || back.order != w.order)
    throw std::runtime_error("unpack is not the inverse of pack");
  return w;
}

// Returns "" if the kernel agrees with the scalar one, else what is wrong.
std::string check(const KernelEntry& kernel, int seed) {
  Random random(static_cast<uint64_t>(seed));
  const int64_t group_sizes[] = {0, 32, 64, 128};
  const NybbleDtype dtypes[] = {NYBBLE_F32, NYBBLE_BF16, NYBBLE_F16};
  WeightShape shape{kernel.weight_bits(), random.integer(1, 70), random.integer(1, 300)};
  if (shape.bits == 4) {
    shape.group_size = random.pick(group_sizes);
    shape.symmetric = random.integer(0, 1);
  }
  shape.ordered = random.integer(0, 3) == 0;
  const int64_t rows = random.integer(1, 40), stride = shape.k + random.integer(0, 1) * random.integer(0, 7);
  const NybbleDtype dtype = kernel.bf16_activations() ? NYBBLE_BF16 : random.pick(dtypes);
  const NybbleDtype out_dtype = random.pick(dtypes);
  const bool with_bias = random.integer(0, 1), exact = kernel.int_activations();
  const int threads = static_cast<int>(random.integer(1, 3));
  const bool given = exact && random.integer(0, 1);  // static activations
  const int steps = kernel.panel == NYBBLE_PANEL_U7 || random.integer(0, 3) == 0 ? 127 : 255;
  const Given fixed{
      std::ldexp(1.0f + static_cast<float>(random.integer(0, 99)) / 100, -static_cast<int>(random.integer(0, 9))),
      static_cast<int32_t>(random.integer(-(steps + 1) / 2, steps / 2))};
  char text[200];
  std::snprintf(text, sizeof text,
                "seed %d, m %d, n %d, k %d, group size %d, symmetric %d, ordered %d, dtype %d to %d, bias %d, threads "
                "%d, static %d, steps %d: ",
                seed, static_cast<int>(rows), static_cast<int>(shape.n), static_cast<int>(shape.k),
                static_cast<int>(shape.group_size), shape.symmetric, shape.ordered, dtype, out_dtype, with_bias,
                threads, given, steps);
  const std::string problem = text;
  try {
    Weight weight = random_weight(shape, random, threads);
    Bytes x = random_activations(rows, stride, shape.k, dtype, exact, random);
    Bytes held(given ? kGivenBytes : 0);
    if (given) {
      std::memcpy(&held[0], &fixed.scale, 4);
      std::memcpy(&held[4], &fixed.zero, 4);
    }
    held.insert(held.end(), weight.packed.begin(), weight.packed.end());
    Bytes bias = with_bias ? random_activations(1, shape.n, shape.n, dtype, false, random) : Bytes();
    for (const NybbleDtype y_dtype : {out_dtype, NYBBLE_S32}) {
      if (y_dtype == NYBBLE_S32 && !(exact && shape.bits == 8)) continue;
      const size_t y_bytes = static_cast<size_t>(rows * shape.n) * bytes_of(y_dtype);
      Bytes expected(y_bytes), got(y_bytes), by_hand(y_bytes, 0x55);
      LinearCall call{};
      call.kernel = &find_kernel("w" + std::to_string(shape.bits) + (exact ? "a8_scalar" : "a16_scalar"));
      call.prepare = &find_kernel("prepare_scalar");
      call.shape = shape;
      call.x = span(x);
      call.packed = span(held);
      call.static_activations = given;
      call.act_steps = steps;
      call.bias = span(bias);
      call.y = span(expected);
      call.rows = rows;
      call.stride = stride;
      call.x_dtype = call.bias_dtype = dtype;
      call.y_dtype = y_dtype;
      run_linear(call, 1);
      call.kernel = &kernel;
      call.prepare = prepare_for(kernel);
      call.y = span(got);
      run_linear(call, threads);
      const double least = 0.1 * std::sqrt(static_cast<double>(rows * shape.n * shape.k));
      const auto agrees = [&](const Bytes& y) { return exact ? y == expected : close(y, expected, y_dtype, least); };
      if (!agrees(got)) return problem + "differs from the scalar kernel";
      call.y = span(by_hand);
      call.packed = span(weight.packed);
      if (given) call.given = fixed;
      run_by_hand(call, sections_of(shape), random);
      if (!agrees(by_hand)) return problem + "differs from the scalar kernel when called without the driver";
    }
  } catch (const std::exception& error) {
    return problem + error.what();
  }
  return "";
}

}  // namespace

int main(int argc, char** argv) {
  const auto dense = [](const KernelEntry& kernel) { return std::strchr(kernel.layout, 'n') == kernel.layout; };
  return compare(argc, argv, dense, check);
}
