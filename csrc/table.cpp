#include "table.h"

#include <set>
#include <stdexcept>
#include <string>

// NYBBLE_IF_<target>(fn) is fn if CMake built that target, else null.
#define NYBBLE_IF_scalar(fn) fn
#if defined(NYBBLE_BUILT_X86)
#define NYBBLE_IF_avx2(fn) fn
#define NYBBLE_IF_avxvnni(fn) fn
#define NYBBLE_IF_avx512bw(fn) fn
#define NYBBLE_IF_avx512vnni(fn) fn
#define NYBBLE_IF_avx512vbmi(fn) fn
#define NYBBLE_IF_avx512bf16(fn) fn
#define NYBBLE_IF_amx(fn) fn
#else
#define NYBBLE_IF_avx2(fn) nullptr
#define NYBBLE_IF_avxvnni(fn) nullptr
#define NYBBLE_IF_avx512bw(fn) nullptr
#define NYBBLE_IF_avx512vnni(fn) nullptr
#define NYBBLE_IF_avx512vbmi(fn) nullptr
#define NYBBLE_IF_avx512bf16(fn) nullptr
#define NYBBLE_IF_amx(fn) nullptr
#endif
#if defined(NYBBLE_BUILT_ARM)
#define NYBBLE_IF_neon(fn) fn
#define NYBBLE_IF_neondot(fn) fn
#define NYBBLE_IF_i8mm(fn) fn
#define NYBBLE_IF_neonbf16(fn) fn
#else
#define NYBBLE_IF_neon(fn) nullptr
#define NYBBLE_IF_neondot(fn) nullptr
#define NYBBLE_IF_i8mm(fn) nullptr
#define NYBBLE_IF_neonbf16(fn) nullptr
#endif

#define NYBBLE_WHOLE_TABLE  // of kernels.def, also lines of another architecture

extern "C" {
#define NYBBLE_PREPARE(name, target) NybbleStatus nybble_##name(const NybblePrepareArgs*);
#define NYBBLE_EXPAND(name, target) NybbleStatus nybble_##name(const NybbleExpandArgs*);
#define NYBBLE_ATTENTION(name, target) NybbleStatus nybble_##name(const NybbleAttentionArgs*);
#define NYBBLE_ATTENTION8(name, target) NYBBLE_ATTENTION(name, target)
#define NYBBLE_ROWS(name, target) extern const NybbleRowKernels nybble_##name;
#define NYBBLE_CONV(name, target) extern const NybbleConvKernels nybble_##name;
#define NYBBLE_LINEAR(name, ...) NybbleStatus nybble_##name(const NybbleLinearArgs*);
#include "kernels.def"
#undef NYBBLE_PREPARE
#undef NYBBLE_EXPAND
#undef NYBBLE_ATTENTION
#undef NYBBLE_ATTENTION8
#undef NYBBLE_ROWS
#undef NYBBLE_CONV
#undef NYBBLE_LINEAR
}

namespace nybble {

const std::vector<KernelEntry>& kernel_table() {
  static const std::vector<KernelEntry> table = {
#define NYBBLE_PREPARE(name, target)                                                                      \
  {#name,   "prepare", #target, "",     "", 0, 0, 0, 0, 0, 1, nullptr, NYBBLE_IF_##target(nybble_##name), \
   nullptr, nullptr,   nullptr, nullptr},
#define NYBBLE_EXPAND(name, target)                                                                           \
  {#name,   "expand", #target, "", "", 0, 0, 0, 0, 0, 1, nullptr, nullptr, NYBBLE_IF_##target(nybble_##name), \
   nullptr, nullptr,  nullptr},
#define NYBBLE_ATTENDS(name, op, target)                                                                             \
  {#name,   op,     #target, "", "", 0, 0, 0, 0, 0, 1, nullptr, nullptr, nullptr, NYBBLE_IF_##target(nybble_##name), \
   nullptr, nullptr},
#define NYBBLE_ATTENTION(name, target) NYBBLE_ATTENDS(name, "attention", target)
#define NYBBLE_ATTENTION8(name, target) NYBBLE_ATTENDS(name, "attention8", target)
#define NYBBLE_ROWS(name, target)                                                                   \
  {#name,  "rows", #target, "",      "",      0,       0,       0,                                  \
   0,      0,      1,       nullptr, nullptr, nullptr, nullptr, NYBBLE_IF_##target(&nybble_##name), \
   nullptr},
#define NYBBLE_CONV(name, target) \
  {#name,                         \
   "conv",                        \
   #target,                       \
   "",                            \
   "",                            \
   0,                             \
   0,                             \
   0,                             \
   0,                             \
   0,                             \
   1,                             \
   nullptr,                       \
   nullptr,                       \
   nullptr,                       \
   nullptr,                       \
   nullptr,                       \
   NYBBLE_IF_##target(&nybble_##name)},
#define NYBBLE_LINEAR(name, scheme, target, layout, panel, ...)                                                        \
  {#name,   "linear", #target, #scheme, #layout, NYBBLE_PANEL_##panel, __VA_ARGS__, NYBBLE_IF_##target(nybble_##name), \
   nullptr, nullptr,  nullptr, nullptr, nullptr},
#include "kernels.def"
#undef NYBBLE_PREPARE
#undef NYBBLE_EXPAND
#undef NYBBLE_ATTENDS
#undef NYBBLE_ATTENTION
#undef NYBBLE_ATTENTION8
#undef NYBBLE_ROWS
#undef NYBBLE_CONV
#undef NYBBLE_LINEAR
  };
  return table;
}

const std::vector<CudaKernelEntry>& cuda_kernel_table() {
  static const std::set<std::string> built = {
#define NYBBLE_CUDA(name, ...) #name,
#include "cuda_built.def"
#undef NYBBLE_CUDA
  };
  static const std::vector<CudaKernelEntry> table = {
#define NYBBLE_CUDA(name, scheme, target, layout, min_m, max_m, rows, least, most) \
  {#name, #scheme, #target, #layout, min_m, max_m, built.count(#name) > 0},
#include "cuda/kernels.def"
#undef NYBBLE_CUDA
  };
  return table;
}

const KernelEntry& find_kernel(const std::string& name) {
  for (const KernelEntry& entry : kernel_table())
    if (name == entry.name && entry.built()) return entry;
  throw std::invalid_argument("kernel=\"" + name + "\": not in the table, or not built");
}

}  // namespace nybble
