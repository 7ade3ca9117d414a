// Compares the LSTMs and GRUs of the given targets, on random problems and without Python: with each dense linear
// kernel on one thread and on several, bit for bit, and with the scalar kernels.
//   compare_recurrent TARGET...      targets of kernels.def that this CPU supports
// Every buffer has its exact size, so that a sanitizer detects out-of-bounds accesses.
#include "../../csrc/recurrent.h"
#include "random_weight.h"

namespace {

constexpr int kRecurrentCases = kCases * 3 / 20;

// Steps, and the rows of each, no more than of the one before.
std::vector<int64_t> random_sizes(int64_t steps, int64_t rows, Random& random) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < steps; i++) sizes.push_back(rows = random.integer(std::max<int64_t>(1, rows - 2), rows));
  return sizes;
}

// A random layer, and what its call reads.
struct Layer {
  std::vector<int64_t> sizes;
  bool gru, multiplied;
  int64_t units, inputs, directions, rows = 0, stride = 0;
  NybbleDtype dtype;
  int steps;
  std::vector<Weight> input, hidden;
  std::vector<Bytes> input_bias, hidden_bias;
  Bytes x, h, c;

  Layer(const KernelEntry& kernel, Random& random)
      : gru(random.integer(0, 1)),
        multiplied(random.integer(0, 3) == 0),
        units(random.integer(0, 1) ? 16 * random.integer(1, 3) : random.integer(1, 40)),
        inputs(random.integer(1, 70)),
        directions(random.integer(1, 2)),
        dtype(random_dtype(kernel, random)),
        steps(random_steps(kernel, random)) {
    sizes = random_sizes(random.integer(1, 9), random.integer(1, 9), random);
    if (random.integer(0, 7) == 0) {  // products that threads share
      units = random.integer(0, 1) ? 96 : 101;
      sizes = random_sizes(2, 20, random);
    }
    for (const int64_t each : sizes) rows += each;
    const int64_t columns = (gru ? 3 : 4) * units;
    const int64_t wide = multiplied ? directions * columns : inputs;
    stride = wide + random.integer(0, 3);
    x = random_activations(rows, stride, wide, multiplied ? NYBBLE_F32 : dtype, false, random);
    h = random_activations(directions * sizes[0], units, units, dtype, false, random);
    c = random_activations(directions * sizes[0], units, units, NYBBLE_F32, false, random);
    for (int64_t i = 0; i < directions; i++) {
      input.push_back(random_weight(random_shape(kernel, columns, inputs, random), random, 1));
      hidden.push_back(random_weight(random_shape(kernel, columns, units, random), random, 1));
      for (std::vector<Bytes>* bias : {&input_bias, &hidden_bias})
        bias->push_back(random_activations(1, columns, columns, dtype, false, random));
    }
  }
};

LinearCall call_of(const KernelEntry& kernel, bool scalar, const Layer& layer, Weight& weight, Bytes& bias) {
  LinearCall call = call_with(kernel, scalar, layer.steps);
  take_weight(call, weight, scalar);
  call.bias = span(bias);
  call.bias_dtype = layer.dtype;
  return call;
}

// What a run writes.
struct Result {
  Bytes y, h, c;
};

Result result_of(const KernelEntry& kernel, bool scalar, Layer& layer, int threads) {
  Result result{Bytes(static_cast<size_t>(layer.rows * layer.directions * layer.units) * bytes_of(layer.dtype), 0x55),
                layer.h, layer.c};
  RecurrentCall call;
  call.rows = nearest(scalar ? find_kernel("w8a8_scalar") : kernel, [](const KernelEntry& e) { return e.rows; });
  call.gru = layer.gru;
  call.dtype = layer.dtype;
  for (size_t i = 0; i < layer.hidden.size(); i++) {
    RecurrentDirection each{{}, call_of(kernel, scalar, layer, layer.hidden[i], layer.hidden_bias[i])};
    if (!layer.multiplied) each.input = call_of(kernel, scalar, layer, layer.input[i], layer.input_bias[i]);
    call.directions.push_back(each);
  }
  call.sizes = layer.sizes;
  call.x = span(layer.x);
  call.stride = layer.stride;
  call.y = span(result.y), call.h = span(result.h);
  if (!layer.gru) call.c = span(result.c);
  run_recurrent(call, threads);
  return result;
}

// Gates differ in the last bits, and with them a few codes of the states.
bool alike(const Bytes& a, const Bytes& b, NybbleDtype dtype) { return within(2e-2, a, b, dtype, 0.0); }

std::string check(const KernelEntry& kernel, int seed) {
  Random random(static_cast<uint64_t>(seed));
  Layer layer(kernel, random);
  const Result got = result_of(kernel, false, layer, 1), again = result_of(kernel, false, layer, 3);
  if (again.y != got.y || again.h != got.h || again.c != got.c) return "threads change the result";
  const Result other = result_of(kernel, true, layer, 1);
  const bool same =
      alike(got.y, other.y, layer.dtype) && alike(got.h, other.h, layer.dtype) && alike(got.c, other.c, NYBBLE_F32);
  return same ? "" : "differs from the scalar kernels";
}

}  // namespace

int main(int argc, char** argv) { return compare_all(argc, argv, kRecurrentCases, is_dense_linear, check); }
