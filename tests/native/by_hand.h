// Calls kernels without the driver: each section of the weights in a buffer of its own, products cut at random, and
// scratch memory of the least size that the kernel accepts, so that a sanitizer sees every access beyond.
#pragma once

#include <cstdlib>
#include <memory>

#include "../../csrc/pieces.h"
#include "random_problem.h"
#ifdef NYBBLE_EMULATE_AMX
#include "../../csrc/cpu/emulate_amx.h"
#endif

namespace {

// The packed activations.
struct Panel {
  Bytes codes, scale, zero, sum;

  explicit Panel(const LinearCall& call) {
    const WeightShape& s = call.shape;
    const bool codes_in = call.kernel->int_activations();
    const size_t rows = static_cast<size_t>(call.rows);
    codes.resize(rows * static_cast<size_t>(nybble_panel_row(call.kernel->panel, s.k_padded())));
    scale.resize(codes_in ? rows * 4 : 0);
    zero.resize(codes_in ? rows * 4 : 0);
    sum.resize(codes_in && s.by_group() ? rows * static_cast<size_t>(s.groups()) * 4 : 0);
    run_prepare({call.prepare, static_cast<NybblePanel>(call.kernel->panel), call.x_dtype, call.x, call.rows,
                 call.stride, s.k, s.k_padded(), call.kernel->block_rows, s.group(), span(codes), span(scale),
                 span(zero), span(sum), call.given, call.act_steps});
    for (size_t i = 0; i < sum.size(); i += 4) {
      int32_t of;
      std::memcpy(&of, &sum[i], 4);
      of *= sum_factor(s);
      std::memcpy(&sum[i], &of, 4);
    }
  }
};

// The sections of a packed weight, dense or in blocks.
struct Parts {
  Bytes codes, scale, zero_point, minimum, levels, sum, large, book, start, index;

  Parts(const LinearCall& call, const Sections& at) {
    const WeightShape& s = call.shape;
    const uint8_t* packed = reinterpret_cast<const uint8_t*>(call.packed.address);
    const auto section = [&](size_t offset, size_t bytes) { return Bytes(packed + offset, packed + offset + bytes); };
    const size_t columns = static_cast<size_t>(s.tiles() * 16), groups = static_cast<size_t>(s.groups());
    scale = section(at.scale, columns * static_cast<size_t>(s.scales()) * s.scale_item());
    levels = section(at.levels, s.levels ? columns * groups * 2 : 0);
    minimum = section(at.minimum, s.minimum ? scale.size() : 0);
    book = section(at.book, s.book_bytes());
    zero_point = section(at.zero_point, s.symmetric ? 0 : columns * groups);
    sum = section(at.sum, s.book ? 0 : columns * 4);
    if (s.form == Form::dense) {
      codes = section(at.codes, columns * static_cast<size_t>(s.k_padded() * s.bits) / 8);
      if (at.large) large = section(at.large, static_cast<size_t>(s.tiles() * nybble_large_bytes(s.k_padded())));
      return;
    }
    const size_t strips = static_cast<size_t>(s.tiles() / s.strip());
    start = section(at.start, (strips + 1) * 8);
    uint64_t blocks;
    std::memcpy(&blocks, &start[strips * 8], 8);
    index = section(at.index, blocks * 4);
    codes = section(at.codes, blocks * static_cast<size_t>(s.block_n * s.block_k));
  }
};

template <class T>
const T* data_of(const Bytes& bytes) {
  return reinterpret_cast<const T*>(bytes.data());
}

NybbleLinearArgs whole_product(const LinearCall& call, const Panel& panel, const Parts& parts) {
  const WeightShape& s = call.shape;
  NybbleLinearArgs args{};
  args.panel = panel.codes.data();
  args.act_scale = data_of<float>(panel.scale);
  args.act_zero = data_of<int32_t>(panel.zero);
  args.act_sum = data_of<int32_t>(panel.sum);
  args.codes = parts.codes.data();
  args.scale = parts.scale.data();
  args.scale_dtype = s.scale_dtype();
  args.minimum = s.minimum ? parts.minimum.data() : nullptr;
  args.levels = s.levels ? parts.levels.data() : nullptr;
  args.book = s.book ? data_of<float>(parts.book) : nullptr;
  args.zero_point = s.symmetric ? nullptr : parts.zero_point.data();
  args.column_sum = data_of<int32_t>(parts.sum);
  args.weight_sum = data_of<float>(parts.sum);
  args.large = parts.large.empty() ? nullptr : parts.large.data();
  args.bias = reinterpret_cast<const void*>(call.bias.address);
  args.y = reinterpret_cast<void*>(call.y.address);
  args.bias_dtype = call.bias_dtype;
  args.y_dtype = call.y_dtype;
  args.rows = call.rows;
  args.n = s.n;
  args.k_padded = s.k_padded();
  args.block_rows = call.kernel->block_rows;
  args.group = s.group();
  args.groups = s.groups();
  args.code_bits = s.bits;
  args.start = data_of<uint64_t>(parts.start);
  args.index = data_of<int32_t>(parts.index);
  args.block_n = s.block_n;
  args.block_k = s.block_k;
  args.block_end = (call.rows + args.block_rows - 1) / args.block_rows;
  args.tile_end = s.tiles();
  return args;
}

// K blocks and passes as short as the kernel allows, or a few times as long.
void cut_at_random(NybbleLinearArgs& args, const Product& p, Random& random) {
  const bool in_groups = p.by_group && !(p.cuts_groups && p.group == p.k);
  args.k_block = std::max<int64_t>(64, in_groups ? p.group : 0) * random.integer(1, 4);
  args.pass = p.column_step * random.integer(1, 4);
  args.pass_bytes = 64 * random.integer(1, 400);
  args.one_stream = random.integer(0, 1);
  args.in_order = random.integer(0, 1);
}

// Memory aligned to 64 bytes; null for none.
struct Scratch : std::unique_ptr<void, decltype(&std::free)> {
  explicit Scratch(int64_t bytes) : unique_ptr(bytes ? std::aligned_alloc(64, bytes) : nullptr, &std::free) {}
};

// Runs the kernel with the least scratch memory of one kind that it accepts. most: what the driver gives; 0: none.
Scratch run_with_least(const KernelEntry& kernel, NybbleLinearArgs& args, void*& memory, int64_t& size, int64_t most) {
  for (int64_t bytes = most ? 64 : 0; bytes <= most; bytes += 64) {
    Scratch scratch(bytes);
    memory = scratch.get();
    size = bytes;
    if (kernel.linear(&args) == NYBBLE_OK) return scratch;
  }
  throw std::runtime_error("the kernel rejected its arguments, or wants more scratch memory than the driver gives");
}

// Calls the prepare and linear kernel over the whole problem. at: the sections of the packed weight.
void run_by_hand(const LinearCall& call, const Sections& at, Random& random) {
  const KernelEntry& kernel = *call.kernel;
  Panel panel(call);
  const Parts parts(call, at);
  NybbleLinearArgs args = whole_product(call, panel, parts);
  cut_at_random(args, product_of(kernel, call.shape, call.rows, 1), random);
  const int64_t ks = std::min(args.k_block, args.k_padded), lines = (ks + NYBBLE_LINE_K - 1) / NYBBLE_LINE_K;
  const bool decodes = kernel.decoded && (kernel.multiplies_tiles() || random.integer(0, 1));
  const int64_t decoded = decodes ? args.pass * lines * NYBBLE_LINE_K * kernel.decoded : 0;
  const int64_t partial = ks < args.k_padded ? args.block_end * args.block_rows * args.pass * NYBBLE_PARTIAL_BYTES : 0;
  const Scratch enough(partial);
  args.partial = enough.get();
  args.partial_bytes = partial;
  const Scratch least_decoded = run_with_least(kernel, args, args.decoded, args.decoded_bytes, decoded);
  if (partial) run_with_least(kernel, args, args.partial, args.partial_bytes, partial);
#ifdef NYBBLE_EMULATE_AMX
  if (nybble_emulated_tiles.configured) throw std::runtime_error("the kernel left tiles configured");
#endif
}

}  // namespace
