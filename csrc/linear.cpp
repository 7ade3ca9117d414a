#include "linear.h"

#include "parallel.h"
#include "pieces.h"

namespace nybble {

namespace {

// Packs and multiplies the rows of a chunk; false if a kernel rejects its arguments.
bool run_chunk(const LinearCall& call, const Chunk& chunk, int threads) {
  const NybblePrepareArgs prepare = prepare_args(call, chunk);
  const NybbleLinearArgs linear = linear_args(call, chunk);
  const Cut& cut = chunk.cut;
  const int64_t blocks = (chunk.rows + cut.block_rows - 1) / cut.block_rows;
  const bool together = cut.tile_parts == 1;
  std::atomic<bool> ok{true};
  const auto prepare_blocks = [&](int64_t begin, int64_t end) {
    NybblePrepareArgs one = prepare;
    one.block_begin = begin;
    one.block_end = end;
    if (call.prepare->prepare(&one) != NYBBLE_OK) ok.store(false, std::memory_order_relaxed);
  };
  if (!together) {
    const int preparing = chunk.rows * prepare.k < kSerialProducts / 16 ? 1 : threads;
    parallel_for(blocks, preparing, [&](int64_t block) { prepare_blocks(block, block + 1); });
  }
  parallel_for(cut.tile_parts * cut.block_parts, threads, [&](int64_t part) {
    const NybbleLinearArgs one = piece_args(call, chunk, linear, part);
    if (together) prepare_blocks(one.block_begin, one.block_end);
    if (!run_piece(call, cut, one)) ok.store(false, std::memory_order_relaxed);
  });
  return ok.load();
}

}  // namespace

Product product_of(const KernelEntry& kernel, const WeightShape& shape, int64_t rows, int threads) {
  return {rows,
          shape.tiles() * NYBBLE_TILE_N,
          shape.k_padded(),
          shape.strip() * NYBBLE_TILE_N,
          shape.group(),
          shape.bits,
          shape.by_group(),
          shape.form,
          kernel.block_rows,
          kernel.columns,
          nybble_panel_row(kernel.panel, shape.k_padded()),
          kernel.decoded,
          kernel.decode_rows,
          kernel.multiplies_tiles(),
          kernel.panel == NYBBLE_PANEL_F32 && shape.bits != 3,
          threads};
}

void run_prepare(const PrepareCall& call) {
  if (!call.kernel->prepare) refuse(std::string("kernel=\"") + call.kernel->name + "\": not a prepare kernel");
  if (call.k < 1 || call.k_padded < call.k || call.k_padded % 4 || call.block_rows < 1 || call.dtype == NYBBLE_S32)
    refuse("prepare: k, k_padded, block_rows or dtype out of range");
  if (call.group < 1 || call.k_padded % call.group) refuse("group: must divide k_padded");
  const int64_t groups = call.k_padded / call.group;
  if (groups > 1 && call.group % 16) refuse("group: must be a multiple of 16, or equal to k_padded");
  if (call.panel_format == NYBBLE_PANEL_U8_LINES && (call.k_padded % NYBBLE_LINE_K || call.group % NYBBLE_LINE_K))
    refuse("k_padded, group: must be multiples of 64 for panel format U8_LINES");
  require("x", call.x, strided_extent(call.rows, call.stride, call.k), dtype_bytes(call.dtype));
  if (call.panel_format >= NYBBLE_PANEL_U8_LINES && groups > 1 && call.group % NYBBLE_LINE_K &&
      NYBBLE_LINE_K % call.group)
    refuse("group: must divide 64 or be a multiple of it for panels of lines");
  if (call.order.address) {
    require("order", call.order, call.k, 4);
    const int32_t* order = reinterpret_cast<const int32_t*>(call.order.address);
    for (int64_t k = 0; k < call.k; k++)
      if (order[k] < 0 || order[k] >= call.k) refuse("order: must be in [0, k)");
  }
  require("panel", call.panel, call.rows, nybble_panel_row(call.panel_format, call.k_padded));
  if (int_panel(call.panel_format)) {
    require("scale", call.scale, call.rows, 4);
    require("zero", call.zero, call.rows, 4);
    check_steps(call.panel_format, call.act_steps);
    if (call.given.scale != 0) check_given(call.given, call.act_steps);
  }
  if (call.sums.address) require("sums", call.sums, call.rows * groups, 4);
  NybblePrepareArgs args{};
  args.x = reinterpret_cast<const void*>(call.x.address);
  args.ldx = call.stride;
  args.x_dtype = call.dtype;
  args.panel_format = call.panel_format;
  args.rows = call.rows;
  args.k = call.k;
  args.k_padded = call.k_padded;
  args.block_rows = call.block_rows;
  args.group = call.group;
  args.groups = groups;
  args.order = reinterpret_cast<const int32_t*>(call.order.address);
  args.panel = reinterpret_cast<void*>(call.panel.address);
  args.act_scale = reinterpret_cast<float*>(call.scale.address);
  args.act_zero = reinterpret_cast<int32_t*>(call.zero.address);
  args.act_sum = reinterpret_cast<int32_t*>(call.sums.address);
  args.sum_factor = 1;
  args.act_steps = call.act_steps;
  args.given_scale = call.given.scale;
  args.given_zero = call.given.zero;
  args.block_end = (call.rows + call.block_rows - 1) / call.block_rows;
  if (call.kernel->prepare(&args) != NYBBLE_OK)
    refuse(std::string("kernel=\"") + call.kernel->name + "\": does not support panel_format=" +
           std::to_string(call.panel_format) + " with dtype=" + std::to_string(call.dtype));
}

void run_linear(const LinearCall& asked, int threads) {
  const LinearCall call = resolved(asked);
  require("x", call.x, strided_extent(call.rows, call.stride, call.shape.k), dtype_bytes(call.x_dtype));
  int64_t outputs;
  if (__builtin_mul_overflow(call.rows, call.shape.n, &outputs)) refuse("y: size out of range");
  require("y", call.y, outputs, dtype_bytes(call.y_dtype));
  if (call.rows == 0) return;
  thread_local Scratch scratch;
  const bool small = call.shape.n * call.shape.k <= kSerialProducts / call.rows;
  const int workers = small ? 1 : usable_threads(threads);
  const Cut cut = cut_for(product_of(*call.kernel, call.shape, call.rows, workers), caches());
  uint8_t* base = scratch.reserve(static_cast<size_t>(chunk_bytes(call, cut.chunk_rows)));
  for (int64_t row = 0; row < call.rows; row += cut.chunk_rows) {
    if (!run_chunk(call, carve(call, row, cut, base), workers))
      throw std::runtime_error(std::string(call.kernel->name) + ": rejected its arguments, or ran out of memory");
  }
}

}  // namespace nybble
