#include "pieces.h"

#include <algorithm>
#include <cstring>

#include "shape.h"
#include "sparse.h"

namespace nybble {

namespace {

// Most row blocks for which a kernel of the mask layout is used: it expands the weights again for each.
constexpr int64_t kFewBlocks = 4;
// Largest K: so many products of (q - act_zero) in [-act_steps, act_steps] and weight codes cannot overflow an int32,
// nor those of q and codes less their zero points.
int64_t most_products(int act_steps, const WeightShape& shape) {
  if (shape.bits != 8) return INT32_MAX / (act_steps * ((1 << shape.bits) - 1));
  return INT32_MAX / std::max(act_steps * 128, shape.symmetric ? 0 : (act_steps + 1) / 2 * 255);
}

// Bytes that a kernel needs beside its arguments: sums between K blocks, and decoded weights.
struct PieceScratch {
  int64_t partial, decoded;
  PieceScratch(const LinearCall& call, const Cut& cut, const NybbleLinearArgs& args) {
    const int64_t columns = std::min(cut.pass, (args.tile_end - args.tile_begin) * NYBBLE_TILE_N);
    const int64_t rows = (args.block_end - args.block_begin) * call.kernel->block_rows;
    // Kernels of the other layouts multiply all of K at a time.
    const bool cuts = call.expand || call.shape.form == Form::dense || call.shape.form == Form::blocks;
    partial = cuts && cut.k_block < args.k_padded ? rows * columns * NYBBLE_PARTIAL_BYTES : 0;
    // Filled up to whole lines of activations.
    const int64_t ks = round_up(std::min(cut.k_block, args.k_padded), NYBBLE_LINE_K);
    decoded = cut.decode ? columns * ks * call.kernel->decoded : 0;
  }
};

// The sections from the call's first row on.
Sections sections_of_rows(const LinearCall& call) {
  const WeightShape& s = call.shape;
  Sections at = sections_of(call.packed_shape());
  const size_t columns = static_cast<size_t>(call.first_row), groups = columns * static_cast<size_t>(s.groups());
  at.codes += columns * static_cast<size_t>(s.k_padded() * s.bits) / 8;
  const size_t scales = columns * static_cast<size_t>(s.scales()) * s.scale_item();
  at.scale += scales;
  at.zero_point += s.symmetric ? 0 : groups;
  at.minimum += s.minimum ? scales : 0;
  at.levels += s.levels ? groups * 2 : 0;
  at.sum += columns * 4;
  if (at.large) at.large += columns / NYBBLE_TILE_N * static_cast<size_t>(nybble_large_bytes(s.k_padded()));
  return at;
}

void check_rows(const LinearCall& call) {
  const int64_t first = call.first_row, all = call.all_rows;
  if (first == 0 && all == 0) return;
  if (call.shape.form != Form::dense || first < 0 || first % NYBBLE_TILE_N || call.shape.n > all - first)
    refuse("first_row=" + std::to_string(first) + ": must be a multiple of 16, and the rows lie in a dense weight of " +
           std::to_string(all));
}

}  // namespace

void take_given(LinearCall& call) {
  require("packed", call.packed, kGivenBytes, 1);
  const uint8_t* at = reinterpret_cast<const uint8_t*>(call.packed.address);
  std::memcpy(&call.given.scale, at, 4);
  std::memcpy(&call.given.zero, at + 4, 4);
  check_given(call.given, call.act_steps);
  call.packed.address += kGivenBytes;
  call.packed.bytes -= kGivenBytes;
}

int64_t strided_extent(int64_t rows, int64_t stride, int64_t k) {
  int64_t extent;
  if (rows < 0 || stride < 0) refuse("rows and stride must not be negative");
  if (rows > 1 && stride < k && stride != 0) refuse("stride=" + std::to_string(stride) + ": below in_features");
  if (rows == 0) return 0;
  if (__builtin_mul_overflow(rows - 1, stride, &extent) || __builtin_add_overflow(extent, k, &extent))
    refuse("x: size out of range");
  return extent;
}

int64_t chunk_bytes(const LinearCall& call, int64_t rows) {
  return round_up(rows * nybble_panel_row(call.kernel->panel, call.shape.k_padded()), 64) + 2 * round_up(rows * 4, 64) +
         round_up(rows * call.shape.groups() * 4, 64);
}

Chunk carve(const LinearCall& call, int64_t row, const Cut& cut, uint8_t* base) {
  const int64_t most = cut.chunk_rows, rows = std::min(most, call.rows - row);
  const int64_t panel = round_up(most * nybble_panel_row(call.kernel->panel, call.shape.k_padded()), 64);
  const int64_t scales = round_up(most * 4, 64);
  return {row,
          rows,
          cut,
          base,
          reinterpret_cast<float*>(base + panel),
          reinterpret_cast<int32_t*>(base + panel + scales),
          reinterpret_cast<int32_t*>(base + panel + 2 * scales)};
}

int32_t sum_factor(const WeightShape& shape) {
  return shape.minimum ? 1 : shape.symmetric ? -(shape.zero() + shape.flipped()) : -1;
}

NybblePrepareArgs prepare_args(const LinearCall& call, const Chunk& chunk) {
  NybblePrepareArgs args{};
  args.x = reinterpret_cast<const uint8_t*>(call.x.address) + chunk.row * call.stride * dtype_bytes(call.x_dtype);
  args.ldx = call.stride;
  args.x_dtype = call.x_dtype;
  args.panel_format = call.kernel->panel;
  args.rows = chunk.rows;
  args.k = call.shape.k;
  args.k_padded = call.shape.k_padded();
  args.block_rows = chunk.cut.block_rows;
  args.group = call.shape.group();
  args.groups = call.shape.groups();
  if (call.shape.ordered)
    args.order = reinterpret_cast<const int32_t*>(call.packed.address + sections_of(call.packed_shape()).order);
  args.panel = chunk.panel;
  args.act_scale = chunk.act_scale;
  args.act_zero = chunk.act_zero;
  args.act_sum = call.shape.by_group() && call.kernel->int_activations() ? chunk.act_sum : nullptr;
  args.sum_factor = sum_factor(call.shape);
  args.act_steps = call.act_steps;
  args.given_scale = call.given.scale;
  args.given_zero = call.given.zero;
  return args;
}

NybbleLinearArgs linear_args(const LinearCall& call, const Chunk& chunk) {
  const WeightShape& shape = call.shape;
  const uint8_t* packed = reinterpret_cast<const uint8_t*>(call.packed.address);
  const Sections at =
      shape.form == Form::dense ? sections_of_rows(call) : sparse_sections(shape, packed, call.packed.bytes);
  NybbleLinearArgs args{};
  args.panel = chunk.panel;
  args.act_scale = chunk.act_scale;
  args.act_zero = chunk.act_zero;
  args.act_sum = chunk.act_sum;
  args.codes = packed + at.codes;
  args.scale = packed + at.scale;
  args.scale_dtype = shape.scale_dtype();
  args.zero_point = shape.symmetric ? nullptr : packed + at.zero_point;
  args.minimum = shape.minimum ? packed + at.minimum : nullptr;
  args.levels = shape.levels ? packed + at.levels : nullptr;
  args.column_sum = reinterpret_cast<const int32_t*>(packed + at.sum);
  args.weight_sum = reinterpret_cast<const float*>(packed + at.sum);
  args.book = shape.book ? reinterpret_cast<const float*>(packed + at.book) : nullptr;
  args.large = at.large ? packed + at.large : nullptr;
  args.bias = reinterpret_cast<const void*>(call.bias.address);
  args.y = reinterpret_cast<uint8_t*>(call.y.address) + chunk.row * shape.n * dtype_bytes(call.y_dtype);
  args.bias_dtype = call.bias_dtype;
  args.y_dtype = call.y_dtype;
  args.rows = chunk.rows;
  args.n = shape.n;
  args.k_padded = shape.k_padded();
  args.block_rows = chunk.cut.block_rows;
  args.group = shape.group();
  args.groups = shape.groups();
  args.code_bits = shape.bits;
  args.k_block = chunk.cut.k_block;
  args.pass = chunk.cut.pass;
  args.pass_bytes = chunk.cut.pass_bytes;
  args.one_stream = chunk.cut.one_stream;
  args.in_order = chunk.cut.in_order;
  if (shape.form == Form::dense) return args;
  args.start = reinterpret_cast<const uint64_t*>(packed + at.start);
  args.window = reinterpret_cast<const uint16_t*>(packed + at.index);
  const bool reordered = shape.form == Form::gather && args.start[shape.tiles() + 1];
  args.order = reordered ? reinterpret_cast<const int32_t*>(packed + at.order) : nullptr;
  args.index = reinterpret_cast<const int32_t*>(packed + at.index);
  args.block_n = shape.block_n;
  args.block_k = shape.block_k;
  return args;
}

NybbleLinearArgs piece_args(const LinearCall& call, const Chunk& chunk, const NybbleLinearArgs& all, int64_t piece) {
  const Cut& cut = chunk.cut;
  const int64_t t = piece / cut.block_parts, b = piece % cut.block_parts;
  const int64_t strip = call.shape.strip(), strips = call.shape.tiles() / strip;
  const int64_t blocks = (chunk.rows + cut.block_rows - 1) / cut.block_rows;
  NybbleLinearArgs one = all;
  one.tile_begin = strips * t / cut.tile_parts * strip;
  one.tile_end = strips * (t + 1) / cut.tile_parts * strip;
  one.block_begin = blocks * b / cut.block_parts;
  one.block_end = blocks * (b + 1) / cut.block_parts;
  return one;
}

bool run_piece(const LinearCall& call, const Cut& cut, NybbleLinearArgs args) {
  if (args.tile_begin == args.tile_end || args.block_begin == args.block_end) return true;  // more pieces than parts
  thread_local Scratch scratch;
  const PieceScratch needs(call, cut, args);
  const int64_t tile_bytes = NYBBLE_TILE_N * args.k_padded * args.code_bits / 8, pass = cut.expand / NYBBLE_TILE_N;
  const int64_t lines_bytes = call.expand ? pass * tile_bytes : 0, partial = round_up(needs.partial, 64);
  uint8_t* base = nullptr;
  if (const int64_t bytes = partial + round_up(needs.decoded, 64) + lines_bytes; bytes > 0) {
    base = scratch.try_reserve(static_cast<size_t>(bytes));
    if (!base) return false;
  }
  args.partial = needs.partial ? base : nullptr;
  args.decoded = needs.decoded ? base + partial : nullptr;
  args.partial_bytes = needs.partial;
  args.decoded_bytes = needs.decoded;
  if (!call.expand) return call.kernel->linear(&args) == NYBBLE_OK;
  uint8_t* lines = base + partial + round_up(needs.decoded, 64);
  NybbleLinearArgs one = args;
  NybbleExpandArgs expand{args.start, args.codes, lines, tile_bytes / 64, args.code_bits, 0, 0};
  for (int64_t tile = args.tile_begin; tile < args.tile_end; tile += pass) {
    one.tile_begin = expand.tile_begin = tile;
    one.tile_end = expand.tile_end = std::min(tile + pass, args.tile_end);
    if (call.expand->expand(&expand) != NYBBLE_OK) return false;
    // Offset such that tile `tile` is at `lines`.
    one.codes = reinterpret_cast<const uint8_t*>(reinterpret_cast<uintptr_t>(lines) -
                                                 static_cast<uintptr_t>(tile * tile_bytes));
    if (call.kernel->linear(&one) != NYBBLE_OK) return false;
  }
  return true;
}

void check_steps(int panel, int act_steps) {
  if (act_steps == 127 || (act_steps == 255 && panel != NYBBLE_PANEL_U7)) return;
  refuse("act_steps=" + std::to_string(act_steps) + ": must be 127, or 255 with another panel format than U7");
}

void check_given(const Given& given, int act_steps) {
  if (!(given.scale >= 0x1p-126f && given.scale <= 0x1p126f)) refuse("act_scale: must be in [2^-126, 2^126]");
  const int half = (act_steps + 1) / 2;
  if (given.zero < -half || given.zero >= half)
    refuse("act_zero_point: must be in [" + std::to_string(-half) + ", " + std::to_string(half - 1) + "]");
}

void check_weight(const LinearCall& call) {
  const WeightShape& shape = call.shape;
  if (!call.kernel->linear) refuse(std::string("kernel=\"") + call.kernel->name + "\": not a linear kernel");
  if (call.kernel->weight_bits() != shape.bits)
    refuse(std::string("kernel=\"") + call.kernel->name + "\": does not support " + std::to_string(shape.bits) +
           "-bit weights");
  if (call.kernel->reads_book() != shape.book)
    refuse(std::string("kernel=\"") + call.kernel->name + "\": takes weights " + (shape.book ? "without" : "with") +
           " a book");
  if (call.kernel->reads_levels() != shape.levels)
    refuse(std::string("kernel=\"") + call.kernel->name + "\": takes weights " + (shape.levels ? "without" : "with") +
           " levels");
  if (call.kernel->int_activations()) {
    check_steps(call.kernel->panel, call.act_steps);
    const int64_t most = most_products(call.act_steps, shape);
    if (shape.k > most)
      refuse("in_features=" + std::to_string(shape.k) + ": must be at most " + std::to_string(most) +
             ", or an int32 accumulator could overflow");
  }
  if (call.static_activations && !call.kernel->int_activations())
    refuse(std::string("kernel=\"") + call.kernel->name +
           "\": takes float activations; static_activations must be false");
  if (call.kernel->bf16_activations() && call.x_dtype != NYBBLE_BF16)
    refuse(std::string("kernel=\"") + call.kernel->name + "\": takes only bfloat16 activations");
  if (call.kernel->panel == NYBBLE_PANEL_BF16_LINES && shape.minimum)
    refuse(std::string("kernel=\"") + call.kernel->name + "\": does not support weights with a minimum");
  if (call.x_dtype == NYBBLE_S32 || call.bias_dtype == NYBBLE_S32) refuse("dtype: activations and bias must be float");
  if (call.y_dtype == NYBBLE_S32 && !(call.kernel->int_activations() && !shape.by_group()))
    refuse("y: int32 output is supported only for 8-bit weights with a scale a column and 8-bit activations");
  check_rows(call);
  require("packed", call.packed, static_cast<int64_t>(sections_of(call.packed_shape()).total), 1);
  const char* layout = layout_of(shape);
  const bool expands = shape.form == Form::mask && call.expand;
  if (!expands && std::strcmp(call.kernel->layout, layout) != 0)
    refuse(std::string("kernel=\"") + call.kernel->name + "\": reads layout " + call.kernel->layout +
           ", the weight has layout " + layout);
  if (call.bias.address) require("bias", call.bias, shape.n, dtype_bytes(call.bias_dtype));
}

LinearCall resolved(const LinearCall& asked) {
  asked.shape.validate();
  LinearCall call = asked;
  if (call.static_activations) take_given(call);
  if (call.few && call.rows <= kFewBlocks * call.few->block_rows) {
    call.kernel = call.few;
    call.expand = nullptr;
  }
  check_weight(call);
  return call;
}

}  // namespace nybble
