// What the files of the binding share.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "linear.h"
#include "rows.h"
#include "shape.h"

namespace py = pybind11;
using namespace nybble;

using Pair = std::pair<uintptr_t, size_t>;  // pointer and bytes

inline Span span(const Pair& pair) { return {pair.first, pair.second}; }

using VectorArgument = std::optional<std::tuple<uintptr_t, size_t, int>>;  // pointer, bytes, dtype

inline Vector vector_of(const VectorArgument& argument) {
  if (!argument) return {};
  const auto& [address, bytes, dtype] = *argument;
  return {{address, bytes}, dtype_of(dtype)};
}

// A kernel bound to a weight shape; names are resolved once.
class LinearPlan {
 public:
  // expand and few: "" for none. first_row, all_rows: as in LinearCall.
  LinearPlan(const std::string& kernel, const std::string& prepare, const std::string& expand, const std::string& few,
             const WeightShape& shape, bool static_activations, int act_steps, int64_t first_row, int64_t all_rows)
      : call_{} {
    const auto find = [](const std::string& name) { return name.empty() ? nullptr : &find_kernel(name); };
    call_.kernel = &find_kernel(kernel);
    call_.prepare = &find_kernel(prepare);
    call_.expand = find(expand);
    call_.few = find(few);
    call_.shape = shape;
    call_.static_activations = static_activations;
    call_.act_steps = act_steps;
    call_.first_row = first_row;
    call_.all_rows = all_rows;
  }

  // The kernels and the shape; the rest is filled in for each call.
  const LinearCall& call() const { return call_; }

  void run(const Pair& x, int x_dtype, int64_t rows, int64_t stride, const Pair& packed, const Pair& bias,
           int bias_dtype, const Pair& y, int y_dtype, int threads) const {
    LinearCall call = call_;
    call.x = span(x);
    call.packed = span(packed);
    call.bias = span(bias);
    call.y = span(y);
    call.rows = rows;
    call.stride = stride;
    call.x_dtype = dtype_of(x_dtype);
    call.bias_dtype = dtype_of(bias_dtype);
    call.y_dtype = dtype_of(y_dtype);
    py::gil_scoped_release release;
    run_linear(call, threads);
  }

 private:
  LinearCall call_;
};

void bind_chain(py::module_& m);
void bind_recurrent(py::module_& m);
void bind_experts(py::module_& m);
void bind_lookup(py::module_& m);
void bind_conv(py::module_& m);
void bind_codes(py::module_& m);
