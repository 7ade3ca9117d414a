// kernels.def as data.
#pragma once

#include <cstring>
#include <string>
#include <vector>

#include "abi.h"

struct NybbleConvKernels;  // abi_conv.h

namespace nybble {

// Whether a panel of this format holds codes.
inline bool int_panel(int format) {
  return format != NYBBLE_PANEL_F32 && format != NYBBLE_PANEL_BF16 && format != NYBBLE_PANEL_BF16_LINES;
}

struct KernelEntry {
  const char* name;
  const char* op;  // "linear", "prepare", "expand", "attention", "attention8", "rows" or "conv"
  const char* target;
  const char* scheme;  // "" unless linear, like the fields below
  const char* layout;
  int panel;
  int block_rows, columns, decoded, decode_rows, least_rows;
  NybbleLinearFn linear;  // one of these is set, if the kernel was built
  NybblePrepareFn prepare;
  NybbleExpandFn expand;
  NybbleAttentionFn attention;
  const NybbleRowKernels* rows;
  const NybbleConvKernels* conv;
  bool built() const { return linear || prepare || expand || attention || rows || conv; }
  int weight_bits() const { return std::strchr(scheme, 'w')[1] - '0'; }
  // Whether codes of its weights index a table (nf), or scales have two levels (k): letters follow the bits.
  bool reads_book() const { return std::strchr(scheme, 'w')[2] == 'n'; }
  bool reads_levels() const { return std::strchr(scheme, 'w')[2] == 'k'; }
  bool int_activations() const { return int_panel(panel); }
  // Whether it multiplies tiles of 16 rows (AMX).
  bool multiplies_tiles() const { return panel == NYBBLE_PANEL_S8_LINES || panel == NYBBLE_PANEL_BF16_LINES; }
  bool bf16_activations() const { return !int_panel(panel) && panel != NYBBLE_PANEL_F32; }
};

const std::vector<KernelEntry>& kernel_table();

// cuda/kernels.def as data. The kernels are in a separate extension, which may not be built for every GPU architecture.
struct CudaKernelEntry {
  const char *name, *scheme, *target, *layout;
  int min_m, max_m;  // max_m 0: any number
  bool built;
};
const std::vector<CudaKernelEntry>& cuda_kernel_table();

// Throws std::invalid_argument if no such kernel was built.
const KernelEntry& find_kernel(const std::string& name);

}  // namespace nybble
