// Compares the experts of the given targets, on random problems and without Python: with each dense linear kernel on
// one thread and on several, bit for bit, and with the scalar kernels, bit for bit for quantized activations.
//   compare_experts TARGET...        targets of kernels.def that this CPU supports
// Every buffer has its exact size, so that a sanitizer detects out-of-bounds accesses.
#include "../../csrc/experts.h"
#include "random_weight.h"

namespace {

constexpr int kExpertsCases = kCases * 3 / 20;

// Random experts, and what their call reads.
struct Layer {
  int64_t experts, inputs, outputs, columns, tokens, stride, top_k;
  NybbleDtype dtype;
  int steps;
  Gate gate;
  int64_t many = 1;  // rows from which the kernel is used, where a second one serves fewer
  std::vector<Weight> up, down;
  std::vector<Bytes> bias;
  Bytes x, index, weight;

  Layer(const KernelEntry& kernel, Random& random)
      : experts(random.integer(1, 5)),
        inputs(random.integer(1, 100)),
        outputs(random.integer(1, 60)),
        columns(random.integer(1, 60)),
        tokens(random.integer(0, 3) ? random.integer(1, 9) : random.integer(20, 60)),
        stride(inputs + random.integer(0, 3)),
        top_k(random.integer(1, 3)),
        dtype(random_dtype(kernel, random)),
        steps(random_steps(kernel, random)) {
    // Those that all targets compute alike, so that the second product rounds the same numbers.
    gate.act = random.integer(0, 1) ? NYBBLE_ACT_RELU : NYBBLE_ACT_IDENTITY;
    gate.gated = random.integer(0, 1);
    gate.interleaved = random.integer(0, 1);
    if (random.integer(0, 1)) gate.limit = 2.0f, gate.other_offset = 1.0f;
    many = random.integer(1, 4);
    const WeightShape shape = random_shape(kernel, columns * (gate.gated ? 2 : 1), inputs, random);
    const WeightShape back = random_shape(kernel, outputs, columns, random);
    for (int64_t i = 0; i < experts; i++) {
      up.push_back(random_weight(shape, random, 1));
      down.push_back(random_weight(back, random, 1));
      bias.push_back(random_activations(1, shape.n, shape.n, dtype, false, random));
    }
    x = random_activations(tokens, stride, inputs, dtype, false, random);
    index.resize(static_cast<size_t>(tokens * top_k) * 8);
    weight.resize(static_cast<size_t>(tokens * top_k) * 4);
    for (size_t i = 0; i < index.size(); i += 8) {
      const int64_t expert = random.integer(0, experts);  // the last of them stands for none
      std::memcpy(&index[i], &expert, 8);
      store(&weight[i / 2], NYBBLE_F32, random.real());
    }
  }
};

// The kernels: from `many` rows on this one, for fewer a slower one of the layout if there is one.
ExpertsSide side_of(const KernelEntry& kernel, bool scalar, const Layer& layer, std::vector<Weight>& weights) {
  ExpertsSide side;
  LinearCall call = call_with(kernel, scalar, layer.steps);
  take_weight(call, weights[0], scalar);
  const KernelEntry* slower = nearest(kernel, [&](const KernelEntry& e) {
    return &e != &kernel && is_asked(e) && e.linear && !std::strcmp(e.scheme, kernel.scheme) &&
           !std::strcmp(e.layout, kernel.layout);
  });
  const bool mixes = slower && !scalar && layer.many > 1 && kernel.int_activations();
  if (mixes) {
    LinearCall few = call;
    few.kernel = slower;
    few.prepare = prepare_for(*slower);
    side.kernels.push_back({1, few});
  }
  side.kernels.push_back({mixes ? layer.many : 1, call});
  for (Weight& weight : weights) {
    side.packed.push_back(span(scalar ? weight.plain : weight.packed));
    side.bias.push_back({});
  }
  return side;
}

Bytes result_of(const KernelEntry& kernel, bool scalar, Layer& layer, int threads) {
  Bytes y(static_cast<size_t>(layer.tokens * layer.outputs) * bytes_of(layer.dtype), 0x55);
  ExpertsCall call;
  call.rows = nearest(scalar ? find_kernel("w8a8_scalar") : kernel, [](const KernelEntry& e) { return e.rows; });
  call.dtype = layer.dtype;
  call.up = side_of(kernel, scalar, layer, layer.up);
  call.down = side_of(kernel, scalar, layer, layer.down);
  for (size_t i = 0; i < layer.bias.size(); i++) call.up.bias[i] = {span(layer.bias[i]), layer.dtype};
  call.gate = layer.gate;
  const ExpertsAt at{layer.tokens,      layer.stride,       layer.top_k, span(layer.x),
                     span(layer.index), span(layer.weight), span(y)};
  Experts(std::move(call)).run(at, threads);
  return y;
}

std::string check(const KernelEntry& kernel, int seed) {
  Random random(static_cast<uint64_t>(seed));
  Layer layer(kernel, random);
  const Bytes got = result_of(kernel, false, layer, 1), again = result_of(kernel, false, layer, 3);
  if (again != got) return "threads change the result";
  const Bytes other = result_of(kernel, true, layer, 1);
  const double least = 0.1 * std::sqrt(static_cast<double>(layer.tokens * layer.outputs * layer.columns));
  const bool same = kernel.int_activations() ? other == got : close(got, other, layer.dtype, least);
  return same ? "" : "differs from the scalar kernels";
}

}  // namespace

int main(int argc, char** argv) { return compare_all(argc, argv, kExpertsCases, is_dense_linear, check); }
