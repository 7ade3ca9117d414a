// The op nybble_aot::linear in C++, for AOTInductor packages in processes that never import nybble:
//
//   linear(Tensor x, Tensor packed, Tensor bias, Tensor plan, int out_features) -> Tensor
//
// x (..., K), float32, bfloat16 or float16, any strides; packed, plan: uint8, a packed weight and the text of
// csrc/plan.h; bias: (out_features,), or empty. Built without torch: the functions are those of its C interface
// (torch/csrc/inductor/ aoti_torch/c/shim.h of PyTorch, which keeps them from release to release), found in the
// libtorch_cpu.so that the process has loaded. The kernels are in the file beside this library: libnybble_kernels.so,
// or nybble's extension.
#include <dlfcn.h>
#include <omp.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "plan.h"

namespace {

using Handle = void*;  // torch's AtenTensorHandle
using Boxed = void (*)(uint64_t* stack, uint64_t inputs, uint64_t outputs);

// torch's functions; each of those that return int gives 0 where it has succeeded.
struct Torch {
  int (*aoti_torch_library_init_fragment)(const char*, const char*, uint32_t, void**);
  int (*aoti_torch_library_init_impl)(const char*, const char*, const char*, uint32_t, void**);
  int (*aoti_torch_library_def)(void*, const char*);
  int (*aoti_torch_library_impl)(void*, const char*, Boxed);
  int (*aoti_torch_get_data_ptr)(Handle, void**);
  int (*aoti_torch_get_dim)(Handle, int64_t*);
  int (*aoti_torch_get_numel)(Handle, int64_t*);
  int (*aoti_torch_get_sizes)(Handle, int64_t**);
  int (*aoti_torch_get_strides)(Handle, int64_t**);
  int (*aoti_torch_get_dtype)(Handle, int32_t*);
  int (*aoti_torch_empty_strided)(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, Handle*);
  int (*aoti_torch_delete_tensor_object)(Handle);
  int32_t (*aoti_torch_dtype_float32)();
  int32_t (*aoti_torch_dtype_bfloat16)();
  int32_t (*aoti_torch_dtype_float16)();
  int32_t (*aoti_torch_dtype_uint8)();
  int32_t (*aoti_torch_device_type_cpu)();
} torch;

struct Kernels {
  decltype(&::nybble_plan_make) nybble_plan_make;
  decltype(&::nybble_plan_run) nybble_plan_run;
  decltype(&::nybble_plan_inputs) nybble_plan_inputs;
  decltype(&::nybble_plan_outputs) nybble_plan_outputs;
} kernels;

void check(int status, const char* what) {
  if (status) throw std::runtime_error(std::string("nybble_aot::linear: torch failed at ") + what);
}
#define NYBBLE_TORCH(call) check(torch.call, #call)

struct Tensor {
  Handle handle;
  void* data;
  int64_t dim, numel;
  int64_t *sizes, *strides;
  int32_t dtype;

  // Takes the handle.
  explicit Tensor(Handle taken) : handle(taken) {
    NYBBLE_TORCH(aoti_torch_get_data_ptr(handle, &data));
    NYBBLE_TORCH(aoti_torch_get_dim(handle, &dim));
    NYBBLE_TORCH(aoti_torch_get_numel(handle, &numel));
    NYBBLE_TORCH(aoti_torch_get_sizes(handle, &sizes));
    NYBBLE_TORCH(aoti_torch_get_strides(handle, &strides));
    NYBBLE_TORCH(aoti_torch_get_dtype(handle, &dtype));
  }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  ~Tensor() { torch.aoti_torch_delete_tensor_object(handle); }

  bool contiguous() const {
    int64_t step = 1;
    for (int64_t i = dim - 1; i >= 0; step *= sizes[i--])
      if (sizes[i] != 1 && strides[i] != step) return false;
    return true;
  }
};

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument("nybble_aot::linear: " + what); }

NybbleDtype dtype_of(const char* name, const Tensor& tensor) {
  if (tensor.dtype == torch.aoti_torch_dtype_float32()) return NYBBLE_F32;
  if (tensor.dtype == torch.aoti_torch_dtype_bfloat16()) return NYBBLE_BF16;
  if (tensor.dtype == torch.aoti_torch_dtype_float16()) return NYBBLE_F16;
  refuse(std::string(name) + ": must be float32, bfloat16 or float16");
}

size_t bytes_of(NybbleDtype dtype) { return dtype == NYBBLE_F32 ? 4 : 2; }

// Appends the elements of a tensor, of some bytes each, from a dimension on, to memory.
void gather(const Tensor& from, size_t bytes, int64_t dim, const char* source, char*& to) {
  const bool is_row = dim == from.dim - 1 && from.strides[dim] == 1;
  if (is_row || dim == from.dim) {
    const size_t size = is_row ? static_cast<size_t>(from.sizes[dim]) * bytes : bytes;
    std::memcpy(to, source, size);
    to += size;
    return;
  }
  for (int64_t i = 0; i < from.sizes[dim]; i++)
    gather(from, bytes, dim + 1, source + i * from.strides[dim] * static_cast<int64_t>(bytes), to);
}

// The plan of a text, made once.
const NybblePlan* plan_of(const Tensor& text, int32_t uint8) {
  if (text.dtype != uint8 || !text.contiguous()) refuse("plan: must be a contiguous vector of uint8");
  static std::mutex mutex;
  static std::map<std::string, NybblePlan*, std::less<>> plans;
  const std::string_view words(static_cast<const char*>(text.data), static_cast<size_t>(text.numel));
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = plans.find(words);
  if (found != plans.end()) return found->second;
  char error[512] = "";
  NybblePlan* plan = kernels.nybble_plan_make(words.data(), words.size(), error, sizeof error);
  if (!plan) refuse(error);
  return plans.emplace(words, plan).first->second;
}

Handle empty_like_rows(const Tensor& x, int64_t outputs) {
  std::vector<int64_t> sizes(x.sizes, x.sizes + x.dim), strides(sizes.size());
  sizes.back() = outputs;
  int64_t step = 1;
  for (size_t i = sizes.size(); i-- > 0; step *= sizes[i] > 1 ? sizes[i] : 1) strides[i] = step;
  Handle y = nullptr;
  NYBBLE_TORCH(aoti_torch_empty_strided(x.dim, sizes.data(), strides.data(), x.dtype,
                                        torch.aoti_torch_device_type_cpu(), 0, &y));
  return y;
}

void linear(uint64_t* stack, uint64_t, uint64_t) {
  const auto handle = [&](int i) { return reinterpret_cast<Handle>(stack[i]); };
  const Tensor x(handle(0)), packed(handle(1)), bias(handle(2)), text(handle(3));
  const int64_t outputs = static_cast<int64_t>(stack[4]);
  const int32_t uint8 = torch.aoti_torch_dtype_uint8();
  const NybblePlan* plan = plan_of(text, uint8);
  const int64_t n = kernels.nybble_plan_outputs(plan), k = kernels.nybble_plan_inputs(plan);
  if (outputs != n) refuse("out_features=" + std::to_string(outputs) + ": the plan has " + std::to_string(n));
  if (x.dim < 1 || x.sizes[x.dim - 1] != k) refuse("x: the last dimension must be " + std::to_string(k));
  if (packed.dtype != uint8 || !packed.contiguous()) refuse("packed: must be a contiguous vector of uint8");
  if (bias.numel && (bias.numel != n || !bias.contiguous()))
    refuse("bias: must be empty, or a contiguous vector of " + std::to_string(n));
  NybbleProduct product{};
  product.dtype = dtype_of("x", x);
  product.bias_dtype = bias.numel ? dtype_of("bias", bias) : product.dtype;
  product.rows = x.numel / k;
  product.stride = k;
  const size_t bytes = bytes_of(product.dtype), x_bytes = static_cast<size_t>(x.numel) * bytes;
  std::vector<char> copy;
  product.x = {x.data, x_bytes};
  if (!x.contiguous()) {
    copy.resize(x_bytes);
    char* to = copy.data();
    gather(x, bytes, 0, static_cast<const char*>(x.data), to);
    product.x.data = copy.data();
  }
  product.packed = {packed.data, static_cast<size_t>(packed.numel)};
  product.bias = {bias.numel ? bias.data : nullptr, static_cast<size_t>(bias.numel) * bytes_of(product.bias_dtype)};
  const Handle y = empty_like_rows(x, outputs);
  void* to = nullptr;
  char error[512] = "could not be written to";
  const bool ok = !torch.aoti_torch_get_data_ptr(y, &to) && [&] {
    product.y = {to, static_cast<size_t>(product.rows * n) * bytes};
    return kernels.nybble_plan_run(plan, &product, omp_get_max_threads(), error, sizeof error);
  }();
  if (!ok) {
    torch.aoti_torch_delete_tensor_object(y);
    refuse(error);
  }
  stack[0] = reinterpret_cast<uint64_t>(y);
}

template <class F>
void look_up(void* library, const char* name, F& to) {
  to = reinterpret_cast<F>(dlsym(library, name));
  if (!to) throw std::runtime_error(std::string(name) + ": not found");
}

void look_up_torch() {
#if defined(__APPLE__)
  constexpr const char* kTorch = "@rpath/libtorch_cpu.dylib";
#else
  constexpr const char* kTorch = "libtorch_cpu.so";
#endif
  void* library = dlopen(kTorch, RTLD_NOLOAD | RTLD_LAZY);
  if (!library) throw std::runtime_error(std::string("load torch, or link ") + kTorch + ", before this library");
#define NYBBLE_FIND(name) look_up(library, #name, torch.name)
  NYBBLE_FIND(aoti_torch_library_init_fragment);
  NYBBLE_FIND(aoti_torch_library_init_impl);
  NYBBLE_FIND(aoti_torch_library_def);
  NYBBLE_FIND(aoti_torch_library_impl);
  NYBBLE_FIND(aoti_torch_get_data_ptr);
  NYBBLE_FIND(aoti_torch_get_dim);
  NYBBLE_FIND(aoti_torch_get_numel);
  NYBBLE_FIND(aoti_torch_get_sizes);
  NYBBLE_FIND(aoti_torch_get_strides);
  NYBBLE_FIND(aoti_torch_get_dtype);
  NYBBLE_FIND(aoti_torch_empty_strided);
  NYBBLE_FIND(aoti_torch_delete_tensor_object);
  NYBBLE_FIND(aoti_torch_dtype_float32);
  NYBBLE_FIND(aoti_torch_dtype_bfloat16);
  NYBBLE_FIND(aoti_torch_dtype_float16);
  NYBBLE_FIND(aoti_torch_dtype_uint8);
  NYBBLE_FIND(aoti_torch_device_type_cpu);
#undef NYBBLE_FIND
}

void look_up_kernels() {
  Dl_info here;
  if (!dladdr(&torch, &here) || !here.dli_fname) throw std::runtime_error("cannot tell its own path");
  // Without Python, this library's stubs of it (no_python.cpp) must be seen by the extension.
  if (!dlsym(RTLD_DEFAULT, "Py_IsInitialized")) dlopen(here.dli_fname, RTLD_NOLOAD | RTLD_LAZY | RTLD_GLOBAL);
  const std::string path = here.dli_fname;
  const std::string folder = path.substr(0, path.rfind('/') + 1);
  void* library = dlopen((folder + "libnybble_kernels.so").c_str(), RTLD_LAZY | RTLD_LOCAL);
  if (!library) library = dlopen((folder + NYBBLE_EXTENSION).c_str(), RTLD_LAZY | RTLD_LOCAL);
  if (!library) throw std::runtime_error(dlerror());
  look_up(library, "nybble_plan_make", kernels.nybble_plan_make);
  look_up(library, "nybble_plan_run", kernels.nybble_plan_run);
  look_up(library, "nybble_plan_inputs", kernels.nybble_plan_inputs);
  look_up(library, "nybble_plan_outputs", kernels.nybble_plan_outputs);
}

void register_op() {
  void *definition = nullptr, *cpu = nullptr;  // they live as long as the process
  NYBBLE_TORCH(aoti_torch_library_init_fragment("nybble_aot", __FILE__, __LINE__, &definition));
  NYBBLE_TORCH(aoti_torch_library_def(
      definition, "linear(Tensor x, Tensor packed, Tensor bias, Tensor plan, int out_features) -> Tensor"));
  NYBBLE_TORCH(aoti_torch_library_init_impl("nybble_aot", "CPU", __FILE__, __LINE__, &cpu));
  NYBBLE_TORCH(aoti_torch_library_impl(cpu, "linear", &linear));
}

std::string problem;  // why the op is not there; empty if it is

__attribute__((constructor)) void load() {
  try {
    look_up_torch();
    look_up_kernels();
    register_op();
  } catch (const std::exception& e) {
    problem = e.what();
    std::fprintf(stderr, "libnybble_aot.so: %s\n", e.what());
  }
}

}  // namespace

// Why the op could not be registered when the library was loaded; "" if it was.
extern "C" __attribute__((visibility("default"))) const char* nybble_aot_problem() { return problem.c_str(); }
