// The block_rows of kernels.def, by kernel: a kernel's loops are made for as many rows as its line of the table says.
#pragma once

namespace {
namespace block_rows {

#define NYBBLE_PREPARE(name, target)
#define NYBBLE_EXPAND(name, target)
#define NYBBLE_ATTENTION(name, target)
#define NYBBLE_ATTENTION8(name, target)
#define NYBBLE_ROWS(name, target)
#define NYBBLE_CONV(name, target)
#define NYBBLE_LINEAR(name, scheme, target, layout, panel, block_rows, ...) constexpr int name = block_rows;
#include "../kernels.def"
#undef NYBBLE_PREPARE
#undef NYBBLE_EXPAND
#undef NYBBLE_ATTENTION
#undef NYBBLE_ATTENTION8
#undef NYBBLE_ROWS
#undef NYBBLE_CONV
#undef NYBBLE_LINEAR

}  // namespace block_rows
}  // namespace
