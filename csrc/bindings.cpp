// Python's view of the library: numbers in, exceptions out. No logic.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu_features.h"
#include "linear.h"
#include "parallel.h"
#include "probe.h"

namespace py = pybind11;
using namespace nybble;

namespace {

using Pair = std::pair<uintptr_t, size_t>;  // pointer and bytes

Span span(const Pair& pair) { return {pair.first, pair.second}; }

NybbleDtype dtype_of(int value) {
  if (value < NYBBLE_F32 || value > NYBBLE_S32) throw std::invalid_argument("dtype=" + std::to_string(value));
  return static_cast<NybbleDtype>(value);
}

uint8_t* bytes_of(const Pair& pair, size_t needed, const char* name) {
  if (needed && (!pair.first || pair.second < needed))
    throw std::invalid_argument(std::string(name) + ": has " + std::to_string(pair.second) + " bytes, needs " +
                                std::to_string(needed));
  return reinterpret_cast<uint8_t*>(pair.first);
}

Portable portable_of(const WeightShape& s, const Pair& qweight, const Pair& scale, const Pair& zero_point) {
  return {bytes_of(qweight, s.qweight_bytes(), "qweight"), bytes_of(scale, s.scale_bytes(), "scale"),
          bytes_of(zero_point, s.zero_point_bytes(), "zero_point")};
}

WeightShape weight_shape(int bits, int64_t n, int64_t k, int64_t group_size, bool symmetric) {
  WeightShape shape{bits, n, k, group_size, symmetric};
  shape.validate();
  return shape;
}

py::list table() {
  py::list rows;
  for (const KernelEntry& e : kernel_table()) {
    py::dict row;
    row["name"] = e.name;
    row["op"] = e.op;
    row["scheme"] = e.scheme;
    row["target"] = e.target;
    row["layout"] = e.layout;
    row["panel"] = e.panel;
    row["block_rows"] = e.block_rows;
    row["built"] = e.linear != nullptr || e.prepare != nullptr;
    rows.append(row);
  }
  return rows;
}

// A kernel bound to a weight shape: what stays the same from call to call is checked once.
class LinearPlan {
 public:
  LinearPlan(const std::string& kernel, const std::string& prepare, const WeightShape& shape)
      : call_{&find_kernel(kernel), &find_kernel(prepare), shape, {}, {}, {}, {}, 0, 0, {}, {}, {}} {}

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

}  // namespace

PYBIND11_MODULE(_C, m) {
  if (watch_forks() != 0) throw std::runtime_error("pthread_atfork failed");
  m.attr("version") = NYBBLE_VERSION;
  m.def("kernel_table", &table);
  m.def("cpu", [] {
    const CpuFeatures cpu = detect_cpu();
    return py::make_tuple(cpu.brand, cpu.features);
  });

  m.def("probes", [] {
    std::vector<std::tuple<std::string, std::string, std::string>> rows;
    for (const ProbeEntry& e : probe_table()) rows.emplace_back(e.name, e.kind, e.why_not);
    return rows;
  });
  m.def(
      "probe",
      [](const std::string& name, int threads, uint64_t amount, int64_t passes, int runs, bool huge_pages) {
        py::gil_scoped_release release;
        const ProbeResult result = run_probe({name, threads, amount, passes, runs, huge_pages});
        return std::make_pair(result.seconds, result.work);
      },
      py::arg("name"), py::kw_only(), py::arg("threads"), py::arg("amount"), py::arg("passes") = 1, py::arg("runs") = 1,
      py::arg("huge_pages") = false);

  m.attr("F32") = static_cast<int>(NYBBLE_F32);
  m.attr("BF16") = static_cast<int>(NYBBLE_BF16);
  m.attr("F16") = static_cast<int>(NYBBLE_F16);
  m.attr("S32") = static_cast<int>(NYBBLE_S32);

  py::class_<WeightShape>(m, "WeightShape")
      .def(py::init(&weight_shape), py::kw_only(), py::arg("bits"), py::arg("n"), py::arg("k"), py::arg("group_size"),
           py::arg("symmetric"))
      .def_property_readonly("packed_bytes", [](const WeightShape& s) { return sections_of(s).total; });

  m.def("pack", [](const WeightShape& s, const Pair& qweight, const Pair& scale, const Pair& zero_point,
                   const Pair& packed, int threads) {
    const Portable from = portable_of(s, qweight, scale, zero_point);
    uint8_t* to = bytes_of(packed, sections_of(s).total, "packed");
    py::gil_scoped_release release;
    pack(s, from, to, threads);
  });
  m.def("unpack", [](const WeightShape& s, const Pair& packed, const Pair& qweight, const Pair& scale,
                     const Pair& zero_point, int threads) {
    const uint8_t* from = bytes_of(packed, sections_of(s).total, "packed");
    const Portable to = portable_of(s, qweight, scale, zero_point);
    py::gil_scoped_release release;
    unpack(s, from, to, threads);
  });
  m.def(
      "prepare",
      [](const std::string& kernel, int panel_format, int dtype, const Pair& x, int64_t rows, int64_t stride, int64_t k,
         int64_t k_padded, int64_t block_rows, int64_t group, const Pair& panel, const Pair& scale, const Pair& zero,
         const Pair& sums) {
        run_prepare({&find_kernel(kernel), static_cast<NybblePanel>(panel_format), dtype_of(dtype), span(x), rows,
                     stride, k, k_padded, block_rows, group, span(panel), span(scale), span(zero), span(sums)});
      },
      py::kw_only(), py::arg("kernel"), py::arg("panel_format"), py::arg("dtype"), py::arg("x"), py::arg("rows"),
      py::arg("stride"), py::arg("k"), py::arg("k_padded"), py::arg("block_rows"), py::arg("group"), py::arg("panel"),
      py::arg("scale"), py::arg("zero"), py::arg("sums"));

  py::class_<LinearPlan>(m, "LinearPlan")
      .def(py::init<const std::string&, const std::string&, const WeightShape&>(), py::arg("kernel"),
           py::arg("prepare"), py::arg("shape"))
      .def("run", &LinearPlan::run);
}
