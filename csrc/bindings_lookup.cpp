// The part of the module _C for lookups of rows.
#include "bindings.h"
#include "lookup.h"

namespace {

// A kernel bound to a weight.
class Lookup {
 public:
  Lookup(const std::string& kernel, const WeightShape& shape, bool tiled) : call_{} {
    call_.kernel = &find_kernel(kernel);
    if (!call_.kernel->rows) throw std::invalid_argument("kernel=\"" + kernel + "\": is not of the op rows");
    call_.shape = shape;
    call_.tiled = tiled;
  }

  // Plain numbers, since pairs take longer than reading a few rows. The ids are `count` of id_bytes.
  void run(uintptr_t packed, size_t packed_bytes, uintptr_t ids, int id_bytes, int64_t count, uintptr_t y,
           size_t y_bytes, int dtype, int threads) const {
    if (count < 0) throw std::invalid_argument("count=" + std::to_string(count) + ": must be at least 0");
    const Pair held{ids, static_cast<size_t>(count) * static_cast<size_t>(id_bytes)};
    const LookupCall call = with({packed, packed_bytes}, held, id_bytes, count, {y, y_bytes}, dtype);
    py::gil_scoped_release release;
    run_lookup(call, threads);
  }

  // start: where each bag begins, and where the last one ends.
  void bag(const Pair& packed, const Pair& ids, int id_bytes, int64_t count, const Pair& y, int dtype,
           const std::string& mode, const Pair& start, int64_t bags, const Pair& weights, int64_t left_out,
           int threads) const {
    LookupCall call = with(packed, ids, id_bytes, count, y, dtype);
    call.bag = bag_of(mode);
    call.start = span(start);
    call.bags = bags;
    call.weights = span(weights);
    call.left_out = left_out;
    py::gil_scoped_release release;
    run_lookup(call, threads);
  }

 private:
  LookupCall with(const Pair& packed, const Pair& ids, int id_bytes, int64_t count, const Pair& y, int dtype) const {
    LookupCall call = call_;
    call.packed = span(packed);
    call.ids = span(ids);
    call.id_bytes = id_bytes;
    call.count = count;
    call.y = span(y);
    call.dtype = dtype_of(dtype);
    return call;
  }

  LookupCall call_;
};

}  // namespace

void bind_lookup(py::module_& m) {
  py::class_<Lookup>(m, "Lookup")
      .def(py::init<const std::string&, const WeightShape&, bool>(), py::arg("kernel"), py::arg("shape"),
           py::arg("tiled"))
      .def("run", &Lookup::run)
      .def("bag", &Lookup::bag, py::arg("packed"), py::arg("ids"), py::arg("id_bytes"), py::arg("count"), py::arg("y"),
           py::arg("dtype"), py::arg("mode"), py::arg("start"), py::arg("bags"), py::arg("weights"),
           py::arg("left_out"), py::arg("threads"));
}
