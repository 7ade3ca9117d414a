// The pybind11 module _cuda: takes device addresses, turns errors into exceptions. Nothing here waits for the device.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "maps.h"

namespace py = pybind11;

extern "C" {
#define NYBBLE_CUDA(name, scheme, target, layout, min_m, max_m, rows, least, most) \
  int nybble_##name##_load(NybbleCudaInstance*, int32_t, int32_t*);                \
  int nybble_##name(const NybbleCudaProduct*, const NybbleCudaLaunch*);
#include "cuda_built.def"
#undef NYBBLE_CUDA
int nybble_quantize_rows(const NybbleCudaRows*, void* stream);
}

namespace {

// Device memory passed from Python: address, size, and dtype of the elements.
struct Memory {
  uintptr_t address;
  int64_t bytes;
  int dtype;
};
using Offsets = std::array<int64_t, 6>;

struct Kernel {
  const char *name, *scheme, *target, *layout;
  NybbleCudaLoadFn load;
  NybbleCudaRunFn run;
  int rows, least, most;
  bool codes() const { return std::strcmp(scheme + 2, "a8") == 0; }
  int32_t order() const {  // of the activation codes
    if (std::strcmp(layout, "frag4")) return NYBBLE_PLAIN_ORDER;
    return std::strcmp(target, "sm90") ? NYBBLE_FRAG4_ORDER : NYBBLE_WGMMA_ORDER;
  }
};

constexpr Kernel kKernels[] = {
#define NYBBLE_CUDA(name, scheme, target, layout, min_m, max_m, rows, least, most) \
  {#name, #scheme, #target, #layout, nybble_##name##_load, nybble_##name, rows, least, most},
#include "cuda_built.def"
#undef NYBBLE_CUDA
};

void refuse(const std::string& what) { throw std::invalid_argument(what); }

// Throws on a CUDA error, and clears it in the runtime, which would otherwise report it again to a later call.
void check(int error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(static_cast<cudaError_t>(error)));
}

uintptr_t at(const Memory& memory, int64_t needed, const char* name) {
  if (needed && (!memory.address || memory.bytes < needed))
    refuse(std::string(name) + ": has " + std::to_string(memory.bytes) + " bytes, needs " + std::to_string(needed));
  return memory.address;
}

// Kernels load vectors of 16 bytes; a misaligned address would be a fatal error for the process's CUDA context.
uintptr_t vectors_at(const Memory& memory, int64_t needed, const char* name) {
  if (memory.address % 16)
    refuse(std::string(name) + ": begins at address " + std::to_string(memory.address) + ", must be a multiple of 16");
  return at(memory, needed, name);
}

int64_t bytes_of(int dtype) {
  if (dtype < NYBBLE_F32 || dtype > NYBBLE_F16) refuse("dtype=" + std::to_string(dtype));
  return dtype == NYBBLE_F32 ? 4 : 2;
}

// Makes a device current during the object's lifetime.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    changed_ = device != before_;
    if (changed_) check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }

 private:
  int before_ = 0;
  bool changed_ = false;
};

constexpr int kMostInstances = 64;  // per kernel
using Instances = std::vector<NybbleCudaInstance>;

// Prepares the current device for a kernel, and returns its instances.
int load(const Kernel& kernel, Instances& found) {
  found.resize(kMostInstances);
  int32_t count = 0;
  const int error = kernel.load(found.data(), kMostInstances, &count);
  found.resize(count);
  return error;
}

// Occupancy of the instances of a kernel with the same number of tokens.
struct Occupancy {
  std::array<int32_t, NYBBLE_MAX_SPLITS + 1>
      slots{};            // by splits of K: blocks that run at the same time; 0: unsupported
  bool clusters = false;  // whether partial sums are added by clusters

  Occupancy(const Instances& instances, int token_groups, int multiprocessors) {
    const auto least = [&](auto of) {
      int32_t found = INT32_MAX;
      for (const NybbleCudaInstance& each : instances)
        if (each.token_groups == token_groups) found = std::min(found, of(each));
      return found;
    };
    const int32_t blocks = least([](const auto& each) { return each.blocks_per_sm; }) * multiprocessors;
    slots.fill(blocks);
    if (least([](const auto& each) { return each.whole_k; })) std::fill(slots.begin() + 2, slots.end(), 0);
    for (int s = 2; s <= NYBBLE_MAX_SPLITS; s++)
      clusters |= least([=](const auto& each) { return each.clusters[s]; }) > 0;
    if (!clusters) return;
    for (int s = 2; s <= NYBBLE_MAX_SPLITS; s++)
      slots[s] = s * least([=](const auto& each) { return each.clusters[s]; });
  }
};

int multiprocessors(int device) {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return count;
}

// By groups of 8 tokens per block.
using Occupancies = std::map<int, Occupancy>;

// Occupancies of a kernel on the current device; cached, because the query takes milliseconds.
const Occupancies& occupancies_of(const Kernel& kernel, int device) {
  static std::mutex mutex;
  static std::map<std::pair<const Kernel*, int>, Occupancies> known;
  const std::lock_guard<std::mutex> lock(mutex);
  Occupancies& found = known[{&kernel, device}];
  if (found.empty()) {
    Instances instances;
    check(load(kernel, instances), kernel.name);
    const int count = multiprocessors(device);
    for (const NybbleCudaInstance& each : instances)
      found.emplace(each.token_groups, Occupancy(instances, each.token_groups, count));
  }
  return found;
}

// A kernel for one device and one shape of packed weight.
class Plan {
 public:
  // offsets: of codes, scale, zero_point, sums and places in the packed weight, -1 if absent; last, its size in bytes.
  Plan(const std::string& kernel, int device, int64_t n, int64_t k, int64_t n_padded, int64_t k_padded, int group_shift,
       const Offsets& offsets)
      : device_(device), offsets_(offsets) {
    for (const Kernel& each : kKernels)
      if (kernel == each.name) kernel_ = &each;
    if (!kernel_) refuse("kernel=\"" + kernel + "\": not in the table, or not built");
    if (n < 1 || k < 1 || n > n_padded || k > k_padded || n_padded % 64 || k_padded % 64 || k_padded > INT32_MAX)
      refuse("n=" + std::to_string(n) + ", k=" + std::to_string(k) + ", n_padded=" + std::to_string(n_padded) +
             ", k_padded=" + std::to_string(k_padded) +
             ": must be 1 <= n <= n_padded and 1 <= k <= k_padded < 2^31, padded to multiples of 64");
    product_.n = static_cast<int32_t>(n);
    product_.k = static_cast<int32_t>(k);
    product_.n_padded = n_padded;
    product_.k_padded = k_padded;
    product_.group_shift = group_shift;
    OnDevice here(device);
    occupancies_ = &occupancies_of(*kernel_, device);
  }

  // Bytes of scratch memory that run needs for m tokens.
  int64_t scratch(int64_t m) const { return codes_bytes(m) + (occupancy(m).clusters ? 0 : launch(m).plan.parts_bytes); }

  void run(const Memory& x, int64_t m, int64_t ldx, const Memory& packed, const Memory& bias, const Memory& y,
           const Memory& scratch, uintptr_t stream) const {
    if (m == 0) return;
    if (m < 0 || m > INT32_MAX || ldx < product_.k)
      refuse("x: has " + std::to_string(m) + " rows with stride " + std::to_string(ldx) +
             ", must have 0 to 2^31 - 1 rows with a stride of at least " + std::to_string(product_.k));
    const bool codes = kernel_->codes();
    const uintptr_t weight = vectors_at(packed, offsets_.back(), "packed");
    const auto section = [&](int i) {
      return reinterpret_cast<const void*>(offsets_[i] < 0 ? 0 : weight + offsets_[i]);
    };
    NybbleCudaLaunch how = launch(m);
    how.x_dtype = x.dtype;
    how.stream = reinterpret_cast<void*>(stream);
    NybbleCudaProduct p = product_;
    p.m = static_cast<int32_t>(m);
    p.splits = how.plan.splits;
    p.token_tiles = how.plan.token_tiles;
    p.clusters = occupancy(m).clusters;
    p.x = reinterpret_cast<const void*>(at(x, ((m - 1) * ldx + p.k) * bytes_of(x.dtype), "x"));
    p.ldx = ldx;
    p.codes = static_cast<const uint8_t*>(section(0));
    p.scale = static_cast<const uint16_t*>(section(1));
    p.row_scale = static_cast<const float*>(section(1));
    p.zero_point = static_cast<const uint8_t*>(section(2));
    p.weight_sum = static_cast<const float*>(section(3));
    p.column_sum = static_cast<const int32_t*>(section(3));
    p.places = static_cast<const uint8_t*>(section(4));
    p.bias = reinterpret_cast<const void*>(bias.address ? at(bias, p.n * bytes_of(bias.dtype), "bias") : 0);
    p.bias_dtype = bias.dtype;
    p.y = reinterpret_cast<void*>(vectors_at(y, m * p.n * bytes_of(y.dtype), "y"));
    p.y_dtype = y.dtype;
    const uintptr_t extra = vectors_at(scratch, this->scratch(m), "scratch");
    p.parts = reinterpret_cast<float*>(extra + codes_bytes(m));
    if (!codes && (x.dtype == NYBBLE_F32 || x.address % 16 || ldx % 8))
      refuse("x: dtype=" + std::to_string(x.dtype) + " at address " + std::to_string(x.address) + " with stride " +
             std::to_string(ldx) + ", must be bfloat16 or float16, and each row must start at a multiple of 16 bytes");
    OnDevice here(device_);
    if (codes) {
      NybbleCudaRows rows{p.x,     ldx,        x.dtype,          p.m,
                          p.k,     p.k_padded, kernel_->order(), reinterpret_cast<int8_t*>(extra),
                          nullptr, nullptr};
      rows.act_scale = reinterpret_cast<float*>(extra + m * p.k_padded);
      rows.act_zero = reinterpret_cast<int32_t*>(extra + m * (p.k_padded + 4));
      check(nybble_quantize_rows(&rows, how.stream), "quantize_rows");
      p.x = rows.codes;
      p.ldx = p.k_padded;
      p.act_scale = rows.act_scale;
      p.act_zero = rows.act_zero;
    }
    check(kernel_->run(&p, &how), kernel_->name);
  }

 private:
  int token_groups(int64_t m) const { return nybble::cuda::token_groups(m, kernel_->least, kernel_->most); }
  const Occupancy& occupancy(int64_t m) const { return occupancies_->at(token_groups(m)); }
  NybbleCudaLaunch launch(int64_t m) const {
    const int groups = token_groups(m);
    return {0, groups,
            nybble::cuda::plan(m, product_.n_padded, product_.k_padded, occupancy(m).slots.data(), kernel_->rows,
                               groups * nybble::cuda::kTokens),
            nullptr};
  }
  // Size of the activations' codes, scales and zero points, rounded up to 16 bytes.
  int64_t codes_bytes(int64_t m) const { return kernel_->codes() ? (m * (product_.k_padded + 8) + 15) / 16 * 16 : 0; }

  const Kernel* kernel_ = nullptr;
  int device_;
  Offsets offsets_;
  NybbleCudaProduct product_{};
  const Occupancies* occupancies_ = nullptr;
};

// All instances of all kernels that have code for a device, with their resources and occupancy.
std::vector<py::dict> instances(int device) {
  OnDevice here(device);
  std::vector<py::dict> found;
  for (const Kernel& kernel : kKernels) {
    Instances forms;
    const int error = load(kernel, forms);
    if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
      cudaGetLastError();
      continue;
    }
    check(error, kernel.name);
    for (const NybbleCudaInstance& each : forms) {
      py::dict clusters;
      for (int blocks = 2; blocks <= NYBBLE_MAX_SPLITS; blocks++) clusters[py::int_(blocks)] = each.clusters[blocks];
      py::dict row;
      row["kernel"] = kernel.name;
      row["instance"] = each.name;
      row["shared_bytes"] = each.shared_bytes;
      row["registers"] = each.registers;
      row["blocks_per_sm"] = each.blocks_per_sm;
      row["clusters"] = clusters;
      found.push_back(row);
    }
  }
  return found;
}

}  // namespace

PYBIND11_MODULE(_cuda, m, py::mod_gil_not_used()) {
  m.attr("version") = NYBBLE_VERSION;
  m.def("instances", &instances, py::arg("device"));
  py::class_<Plan>(m, "Plan")
      .def(py::init<const std::string&, int, int64_t, int64_t, int64_t, int64_t, int, const Offsets&>(), py::kw_only(),
           py::arg("kernel"), py::arg("device"), py::arg("n"), py::arg("k"), py::arg("n_padded"), py::arg("k_padded"),
           py::arg("group_shift"), py::arg("offsets"))
      .def("scratch", &Plan::scratch)
      // Plain numbers, which are faster to pass than tuples: host time dominates small products.
      .def("run",
           [](const Plan& plan, uintptr_t x, int64_t x_bytes, int x_dtype, int64_t m, int64_t ldx, uintptr_t packed,
              int64_t packed_bytes, uintptr_t bias, int64_t bias_bytes, int bias_dtype, uintptr_t y, int64_t y_bytes,
              int y_dtype, uintptr_t scratch, int64_t scratch_bytes, uintptr_t stream) {
             plan.run({x, x_bytes, x_dtype}, m, ldx, {packed, packed_bytes, 0}, {bias, bias_bytes, bias_dtype},
                      {y, y_bytes, y_dtype}, {scratch, scratch_bytes, 0}, stream);
           });
}
