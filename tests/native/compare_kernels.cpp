// Compares every dense linear kernel of the given targets with the scalar kernel of its scheme, on random problems and
// without Python: bit for bit for quantized activations, within an error bound for float activations.
//   compare_kernels TARGET...        targets of kernels.def that this CPU supports
// Every buffer has its exact size, so that a sanitizer detects out-of-bounds accesses.
#include "by_hand.h"
#include "random_weight.h"

namespace {

// The activations in the order of the weight's inputs, without gaps between rows.
Bytes gathered(const Bytes& x, const LinearCall& call, const Weight& weight) {
  const size_t k = static_cast<size_t>(call.shape.k), element = bytes_of(call.x_dtype);
  Bytes to(static_cast<size_t>(call.rows) * k * element);
  for (size_t row = 0; row < static_cast<size_t>(call.rows); row++)
    for (size_t j = 0; j < k; j++) {
      int32_t from;
      std::memcpy(&from, &weight.order[j * 4], 4);
      const size_t at = row * static_cast<size_t>(call.stride) + static_cast<size_t>(from);
      std::memcpy(&to[(row * k + j) * element], &x[at * element], element);
    }
  return to;
}

// Whether some rows of the weight give the columns of y that all of them give; floats may be added in another order.
// call: has the result of all.
bool part_agrees(LinearCall call, const Bytes& all, Random& random, int threads) {
  const int64_t n = call.shape.n;
  call.all_rows = n;
  call.first_row = 16 * random.integer(0, (n - 1) / 16);
  call.shape.n = random.integer(1, n - call.first_row);
  const size_t element = bytes_of(call.y_dtype), bytes = static_cast<size_t>(call.shape.n) * element;
  Bytes part(static_cast<size_t>(call.rows) * bytes);
  if (call.bias.address) {
    call.bias.address += static_cast<size_t>(call.first_row) * bytes_of(call.bias_dtype);
    call.bias.bytes = static_cast<size_t>(call.shape.n) * bytes_of(call.bias_dtype);
  }
  call.y = span(part);
  run_linear(call, threads);
  Bytes wanted;
  for (int64_t row = 0; row < call.rows; row++) {
    const auto from = all.begin() + static_cast<ptrdiff_t>(row * n + call.first_row) * static_cast<ptrdiff_t>(element);
    wanted.insert(wanted.end(), from, from + static_cast<ptrdiff_t>(bytes));
  }
  if (call.kernel->int_activations()) return part == wanted;
  return close(part, wanted, call.y_dtype,
               0.1 * std::sqrt(static_cast<double>(call.rows * call.shape.n * call.shape.k)));
}

// Returns "" if the kernel agrees with the scalar one, else what is wrong.
std::string check(const KernelEntry& kernel, int seed) {
  Random random(static_cast<uint64_t>(seed));
  const NybbleDtype dtypes[] = {NYBBLE_F32, NYBBLE_BF16, NYBBLE_F16};
  const int64_t n = random.integer(1, 70), k = random.integer(1, 300);
  WeightShape shape = random_shape(kernel, n, k, random);
  shape.ordered = random.integer(0, 3) == 0;
  if (shape.by_group() && !shape.levels) {
    const NybbleDtype scales[] = {NYBBLE_BF16, NYBBLE_F16, NYBBLE_F32};
    shape.group_scale = random.pick(scales);
    const bool takes_minimum = kernel.panel != NYBBLE_PANEL_BF16_LINES && shape.symmetric && !shape.book;
    shape.minimum = takes_minimum && random.integer(0, 3) == 0;
  }
  const int64_t rows = random.integer(1, 40), stride = shape.k + random.integer(0, 1) * random.integer(0, 7);
  const NybbleDtype dtype = random_dtype(kernel, random);
  const NybbleDtype out_dtype = random.pick(dtypes);
  const bool with_bias = random.integer(0, 1), exact = kernel.int_activations();
  const int threads = static_cast<int>(random.integer(1, 3));
  const bool given = exact && random.integer(0, 1);  // static activations
  const int steps = random_steps(kernel, random);
  const Given fixed{
      std::ldexp(1.0f + static_cast<float>(random.integer(0, 99)) / 100, -static_cast<int>(random.integer(0, 9))),
      static_cast<int32_t>(random.integer(-(steps + 1) / 2, steps / 2))};
  char text[200];
  std::snprintf(text, sizeof text,
                "m %d, n %d, k %d, group size %d, symmetric %d, ordered %d, dtype %d to %d, bias %d, threads "
                "%d, static %d, steps %d: ",
                static_cast<int>(rows), static_cast<int>(shape.n), static_cast<int>(shape.k),
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
    Bytes plain = held;
    held.insert(held.end(), weight.packed.begin(), weight.packed.end());
    plain.insert(plain.end(), weight.plain.begin(), weight.plain.end());
    Bytes bias = with_bias ? random_activations(1, shape.n, shape.n, dtype, false, random) : Bytes();
    for (const NybbleDtype y_dtype : {out_dtype, NYBBLE_S32}) {
      if (y_dtype == NYBBLE_S32 && !(exact && !shape.by_group())) continue;
      const size_t y_bytes = static_cast<size_t>(rows * shape.n) * bytes_of(y_dtype);
      Bytes expected(y_bytes), got(y_bytes), by_hand(y_bytes, 0x55);
      LinearCall call = call_with(kernel, true, steps);
      call.shape = plain_shape(shape);
      call.x = span(x);
      call.packed = span(plain);
      call.static_activations = given;
      call.bias = span(bias);
      call.y = span(expected);
      call.rows = rows;
      call.stride = stride;
      call.x_dtype = call.bias_dtype = dtype;
      call.y_dtype = y_dtype;
      run_linear(call, 1);
      call.kernel = &kernel;
      call.prepare = prepare_for(kernel);
      call.shape = shape;
      call.packed = span(held);
      call.y = span(got);
      run_linear(call, threads);
      const double least = 0.1 * std::sqrt(static_cast<double>(rows * shape.n * shape.k));
      const auto agrees = [&](const Bytes& y) { return exact ? y == expected : close(y, expected, y_dtype, least); };
      if (!agrees(got)) return problem + "differs from the scalar kernel";
      if (!part_agrees(call, got, random, threads)) return problem + "some rows of the weight differ from all";
      call.y = span(by_hand);
      call.packed = span(weight.packed);
      if (given) call.given = fixed;
      Bytes inner = shape.ordered ? gathered(x, call, weight) : Bytes();
      if (shape.ordered) call.x = span(inner), call.stride = shape.k;
      run_by_hand(call, sections_of(shape), random);
      if (!agrees(by_hand)) return problem + "differs from the scalar kernel when called without the driver";
    }
  } catch (const std::exception& error) {
    return problem + error.what();
  }
  return "";
}

}  // namespace

int main(int argc, char** argv) { return compare(argc, argv, is_dense, check); }
