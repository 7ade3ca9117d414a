// The part of the module _C for layers of LSTMs and GRUs.
#include "bindings.h"
#include "recurrent.h"

namespace {

// plan, packed weight, bias and its dtype
using WeightArgument = std::tuple<const LinearPlan*, Pair, std::optional<std::tuple<uintptr_t, size_t, int>>>;

LinearCall call_of(const WeightArgument& argument) {
  const auto& [plan, packed, bias] = argument;
  LinearCall call = plan->call();
  call.packed = span(packed);
  if (bias) {
    call.bias = {std::get<0>(*bias), std::get<1>(*bias)};
    call.bias_dtype = dtype_of(std::get<2>(*bias));
  }
  return call;
}

void recurrent(const std::string& rows, const std::string& cell, int dtype,
               const std::vector<std::pair<std::optional<WeightArgument>, WeightArgument>>& directions,
               const std::vector<int64_t>& sizes, const Pair& x, int64_t stride, const Pair& y, const Pair& h,
               const Pair& c, int threads) {
  if (cell != "lstm" && cell != "gru")
    throw std::invalid_argument("cell=\"" + cell + "\": must be \"lstm\" or \"gru\"");
  RecurrentCall call{};
  call.rows = &find_kernel(rows);
  call.gru = cell == "gru";
  call.dtype = dtype_of(dtype);
  for (const auto& [input, hidden] : directions)
    call.directions.push_back({input ? call_of(*input) : LinearCall{}, call_of(hidden)});
  call.sizes = sizes;
  call.x = span(x);
  call.stride = stride;
  call.y = span(y);
  call.h = span(h);
  call.c = span(c);
  py::gil_scoped_release release;
  run_recurrent(call, threads);
}

}  // namespace

void bind_recurrent(py::module_& m) {
  m.def("recurrent", &recurrent, py::arg("rows"), py::arg("cell"), py::kw_only(), py::arg("dtype"),
        py::arg("directions"), py::arg("sizes"), py::arg("x"), py::arg("stride"), py::arg("y"), py::arg("h"),
        py::arg("c"), py::arg("threads"));
}
