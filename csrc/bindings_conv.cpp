// The part of the module _C for convolutions.
#include "bindings.h"
#include "conv.h"
#include "rows.h"

namespace {

using Image = std::tuple<Pair, int, bool>;  // memory, dtype, whether channels are last
using Held = std::pair<Pair, int>;          // memory, dtype

using Codes = std::optional<std::tuple<float, int, int64_t, int64_t>>;  // scale, zero point, padding
using ManyCodes = std::array<Codes, 3>;                                 // of x, y and the residual

Coded coded(const Codes& codes) {
  if (!codes) return {};
  const auto& [scale, zero, height, width] = *codes;
  if (!(scale > 0)) refuse("codes: scale must be above 0");
  return {scale, zero, height, width};
}

// The dtype that a call has for an image: that of floats, if it is codes.
NybbleDtype image_dtype(const Codes& codes, int dtype) {
  if (codes && dtype != NYBBLE_U8) refuse("codes: must be bytes");
  return codes ? NYBBLE_F32 : dtype_of(dtype);
}

ConvShape conv_shape(const std::array<int64_t, 15>& sizes) {
  ConvShape s;
  std::tie(s.batch, s.channels, s.height, s.width, s.out_height, s.out_width, s.kernel_height, s.kernel_width,
           s.stride_height, s.stride_width, s.pad_height, s.pad_width, s.dilation_height, s.dilation_width, s.groups) =
      std::tuple_cat(sizes);
  return s;
}

ConvCall conv_call(const LinearPlan& plan, const std::string& kernel, const std::array<int64_t, 15>& sizes,
                   const Image& x, const Pair& packed, const Pair& scale, const Pair& bias, int bias_dtype,
                   const Image& y, const Held& residual, const std::string& act, float most, const Pair& x_range,
                   const Pair& y_range, const ManyCodes& codes) {
  ConvCall call{plan.call(),    &find_kernel(kernel), conv_shape(sizes),    std::get<2>(x),
                std::get<2>(y), span(scale),          span(residual.first), act_of(act),
                most,           span(x_range),        span(y_range)};
  call.linear.x = span(std::get<0>(x));
  call.linear.x_dtype = image_dtype(codes[0], std::get<1>(x));
  call.linear.y = span(std::get<0>(y));
  call.linear.y_dtype = image_dtype(codes[1], std::get<1>(y));
  call.linear.packed = span(packed);
  call.linear.bias = span(bias);
  call.linear.bias_dtype = dtype_of(bias_dtype);
  call.x_coded = coded(codes[0]);
  call.y_coded = coded(codes[1]);
  call.residual_coded = coded(codes[2]);
  call.residual_float = image_dtype(codes[2], residual.second);
  if (residual.first.second && !codes[1] && !codes[2] && call.residual_float != call.linear.y_dtype)
    refuse("residual: must have the dtype of y");
  arrange(call);
  return call;
}

ConvCall pool_call(const std::string& kernel, const std::array<int64_t, 15>& sizes, const std::string& pool,
                   const Image& x, const Pair& y, const Pair& x_range, const Pair& y_range,
                   const std::array<Codes, 2>& codes) {
  if (pool != "max" && pool != "mean") throw std::invalid_argument("pool=\"" + pool + "\": must be max or mean");
  ConvCall call{};
  call.kernel = &find_kernel(kernel);
  call.shape = conv_shape(sizes);
  call.linear.x = span(std::get<0>(x));
  call.linear.x_dtype = image_dtype(codes[0], std::get<1>(x));
  call.linear.y = span(y);
  call.x_coded = coded(codes[0]);
  call.y_coded = coded(codes[1]);
  call.x_range = span(x_range);
  call.y_range = span(y_range);
  call.pool = pool == "max" ? NYBBLE_POOL_MAX : NYBBLE_POOL_MEAN;
  return call;
}

// Runs the calls in order; convolutions in a row together.
void run_all(const std::vector<const ConvCall*>& calls, int threads) {
  py::gil_scoped_release release;
  std::vector<const ConvCall*> row;
  const auto run_row = [&] {
    if (!row.empty()) run_convs(row, threads);
    row.clear();
  };
  for (const ConvCall* call : calls) {
    if (!call->pool) {
      row.push_back(call);
      continue;
    }
    run_row();
    run_pool(*call, threads);
  }
  run_row();
}

}  // namespace

void bind_conv(py::module_& m) {
  py::class_<ConvCall>(m, "ConvCall")
      .def(py::init(&conv_call), py::arg("plan"), py::arg("kernel"), py::arg("sizes"), py::arg("x"), py::arg("packed"),
           py::arg("scale"), py::arg("bias"), py::arg("bias_dtype"), py::arg("y"), py::arg("residual"), py::arg("act"),
           py::arg("most"), py::arg("x_range"), py::arg("y_range"), py::arg("codes") = ManyCodes{})
      .def(
          "add",
          [](ConvCall& call, const ConvCall& more) {
            call.more = std::make_shared<ConvCall>(more);
            check_more(call);
          },
          py::arg("more"))
      .def_property_readonly("runs_direct", &runs_direct);
  m.attr("U8") = int{NYBBLE_U8};
  m.def("pool_call", &pool_call, py::arg("kernel"), py::arg("sizes"), py::arg("pool"), py::arg("x"), py::arg("y"),
        py::arg("x_range"), py::arg("y_range"), py::arg("codes") = std::array<Codes, 2>{});
  m.def("run_convs", &run_all);
}
