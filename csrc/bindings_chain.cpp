// The part of the module _C for chains, and for the row kernels and linear layers of one call.
#include "bindings.h"
#include "chain.h"

namespace {

// kind, weight, bias, eps, weight_offset
using NormArgument = std::optional<std::tuple<std::string, VectorArgument, VectorArgument, float, float>>;
using ExternalArgument = std::tuple<uintptr_t, size_t, int64_t>;  // pointer, bytes, row stride
// pointer, bytes, dtype, sizes, strides
using TableArgument = std::optional<
    std::tuple<uintptr_t, size_t, int, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>>;

Norm norm_from(const NormArgument& argument) {
  if (!argument) return {};
  const auto& [kind, weight, bias, eps, offset] = *argument;
  return {norm_of(kind), vector_of(weight), vector_of(bias), eps, offset};
}

Table table_of(const TableArgument& argument) {
  const auto& [address, bytes, dtype, s0, s1, s2, s3, t0, t1, t2, t3] = *argument;
  if (dtype < NYBBLE_F32 || dtype > kBool) throw std::invalid_argument("tables: dtype=" + std::to_string(dtype));
  return {{address, bytes}, dtype, {s0, s1, s2, s3}, {t0, t1, t2, t3}};
}

// A weight of a step, and the slots of what follows its product.
struct ChainWeight {
  LinearsWeight weight;
  LinearsStep::Of of;
};

ChainWeight chain_weight(const LinearPlan& plan, const Pair& packed, const VectorArgument& bias, int y,
                         const std::string& act, int other, int residual) {
  ChainWeight made{{plan.call(), act_of(act), {}}, {y, other, residual}};
  const Vector held = vector_of(bias);
  made.weight.call.packed = span(packed);
  made.weight.call.bias = held.span;
  made.weight.call.bias_dtype = held.dtype;
  return made;
}

void add_linears(Chain& chain, int x, const std::vector<ChainWeight>& weights, const NormArgument& norm, int residual,
                 int sum, int normed) {
  std::vector<LinearsWeight> all;
  std::vector<LinearsStep::Of> of;
  for (const ChainWeight& each : weights) {
    all.push_back(each.weight);
    of.push_back(each.of);
  }
  chain.add_linears(norm_from(norm), std::move(all), std::move(of), x, residual, sum, normed);
}

void add_rotate(Chain& chain, int x, int y, int heads, int head_dim, int offset, int cos, int sin, bool interleaved,
                const std::optional<std::tuple<VectorArgument, float, float>>& norm) {
  RotateStep step;
  step.heads = heads, step.head_dim = head_dim, step.offset = offset;
  step.x = x, step.y = y, step.cos = cos, step.sin = sin;
  step.interleaved = interleaved;
  if (norm) {
    const auto& [weight, eps, weight_offset] = *norm;
    step.norm = {NYBBLE_NORM_RMS, vector_of(weight), {}, eps, weight_offset};
  }
  chain.add_rotate(std::move(step));
}

void run(const Chain& chain, int64_t batch, int64_t length, const std::vector<ExternalArgument>& external,
         const std::vector<TableArgument>& tables, int threads) {
  std::vector<External> matrices;
  for (const auto& [address, bytes, stride] : external) matrices.push_back({{address, bytes}, stride});
  std::vector<std::optional<Table>> held;
  for (const TableArgument& each : tables) held.push_back(each ? std::optional<Table>(table_of(each)) : std::nullopt);
  py::gil_scoped_release release;
  chain.run(batch, length, matrices, held, threads);
}

}  // namespace

void bind_chain(py::module_& m) {
  py::class_<ChainWeight>(m, "ChainWeight")
      .def(py::init(&chain_weight), py::arg("plan"), py::arg("packed"), py::arg("bias"), py::arg("y"),
           py::arg("act") = "", py::arg("other") = -1, py::arg("residual") = -1);
  py::class_<Chain>(m, "Chain")
      .def(py::init([](int dtype, const std::vector<int64_t>& widths, int externals, const std::string& rows,
                       const std::string& attention) {
             return std::make_unique<Chain>(dtype_of(dtype), widths, externals, rows, attention);
           }),
           py::arg("dtype"), py::arg("widths"), py::arg("externals"), py::kw_only(), py::arg("rows"),
           py::arg("attention"))
      .def(
          "add_norm",
          [](Chain& chain, int x, int y, const std::string& kind, const VectorArgument& weight,
             const VectorArgument& bias, float eps, int residual, int sum, float offset) {
            chain.add_norm({norm_of(kind), vector_of(weight), vector_of(bias), eps, offset}, x, y, residual, sum);
          },
          py::arg("x"), py::arg("y"), py::arg("kind"), py::arg("weight"), py::arg("bias"), py::arg("eps"),
          py::kw_only(), py::arg("residual") = -1, py::arg("sum") = -1, py::arg("weight_offset") = 0.0f)
      .def("add_linears", &add_linears, py::arg("x"), py::arg("weights"), py::kw_only(), py::arg("norm") = py::none(),
           py::arg("residual") = -1, py::arg("sum") = -1, py::arg("normed") = -1)
      .def(
          "add_activate",
          [](Chain& chain, int x, int y, const std::string& act, int other) {
            chain.add_activate(act_of(act), x, y, other);
          },
          py::arg("x"), py::arg("y"), py::arg("act"), py::kw_only(), py::arg("other") = -1)
      .def("add_rotate", &add_rotate, py::arg("x"), py::arg("y"), py::arg("heads"), py::kw_only(),
           py::arg("head_dim") = 0, py::arg("offset") = 0, py::arg("cos"), py::arg("sin"), py::arg("interleaved"),
           py::arg("norm") = py::none())
      .def(
          "add_attention",
          [](Chain& chain, int q, int k, int v, int y, int64_t heads, int64_t kv_heads, int64_t head_dim, float scale,
             int64_t q_offset, int64_t k_offset, int64_t v_offset, bool causal, int64_t window, int mask, bool cached,
             int k_scale, int v_scale, const std::string& int8) {
            AttentionStep step;
            if (!int8.empty()) step.kernel8 = &find_kernel(int8);
            step.q = q, step.k = k, step.v = v, step.y = y, step.mask = mask;
            step.k_scale = k_scale, step.v_scale = v_scale;
            step.heads = heads, step.kv_heads = kv_heads, step.head_dim = head_dim, step.scale = scale;
            step.q_offset = q_offset, step.k_offset = k_offset, step.v_offset = v_offset, step.window = window;
            step.causal = causal, step.cached = cached;
            chain.add_attention(std::move(step));
          },
          py::arg("q"), py::arg("k"), py::arg("v"), py::arg("y"), py::arg("heads"), py::arg("kv_heads"),
          py::arg("head_dim"), py::arg("scale"), py::kw_only(), py::arg("q_offset") = 0, py::arg("k_offset") = 0,
          py::arg("v_offset") = 0, py::arg("causal"), py::arg("window") = 0, py::arg("mask") = -1,
          py::arg("cached") = false, py::arg("k_scale") = -1, py::arg("v_scale") = -1, py::arg("int8") = "")
      .def("run", &run, py::arg("batch"), py::arg("length"), py::arg("external"), py::arg("tables"),
           py::arg("threads"));
}
