// The part of the module _C for the experts of a layer.
#include "bindings.h"
#include "experts.h"

namespace {

// Kernels by their least rows, packed weights and biases by expert.
using SideArgument =
    std::tuple<std::vector<std::pair<int64_t, const LinearPlan*>>, std::vector<Pair>, std::vector<VectorArgument>>;
// act, gated, interleaved, limit, other_offset
using GateArgument = std::tuple<std::string, bool, bool, float, float>;

ExpertsSide side_of(const SideArgument& argument) {
  const auto& [plans, packed, bias] = argument;
  ExpertsSide side;
  for (const auto& [least, plan] : plans) side.kernels.push_back({least, plan->call()});
  for (const Pair& each : packed) side.packed.push_back(span(each));
  for (const VectorArgument& each : bias) side.bias.push_back(vector_of(each));
  return side;
}

std::unique_ptr<Experts> make(int dtype, const std::string& rows, const SideArgument& up, const SideArgument& down,
                              const GateArgument& gate) {
  const auto& [act, gated, interleaved, limit, offset] = gate;
  const Gate between{act_of(act), gated, interleaved, limit, offset};
  return std::make_unique<Experts>(
      ExpertsCall{&find_kernel(rows), dtype_of(dtype), side_of(up), side_of(down), between});
}

void run(const Experts& experts, const std::tuple<int64_t, int64_t, int64_t>& sizes, const Pair& x, const Pair& index,
         const Pair& weight, const Pair& y, int threads) {
  const auto& [tokens, stride, top_k] = sizes;
  const ExpertsAt at{tokens, stride, top_k, span(x), span(index), span(weight), span(y)};
  py::gil_scoped_release release;
  experts.run(at, threads);
}

}  // namespace

void bind_experts(py::module_& m) {
  py::class_<Experts>(m, "Experts")
      .def(py::init(&make), py::arg("dtype"), py::arg("rows"), py::arg("up"), py::arg("down"), py::arg("gate"))
      .def("run", &run, py::arg("sizes"), py::arg("x"), py::arg("index"), py::arg("weight"), py::arg("y"),
           py::arg("threads"));
}
