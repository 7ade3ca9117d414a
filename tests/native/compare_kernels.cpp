// Compares every dense linear kernel of the given targets with the scalar kernel of its scheme, on random problems and
// without Python: bit for bit for quantized activations, within an error bound for float activations.
//   compare_kernels TARGET...        targets of kernels.def that this CPU supports
// Every buffer has its exact size, so that a sanitizer detects out-of-bounds accesses.
#include <cstdlib>
#include <memory>

#include "random_problem.h"
#ifdef NYBBLE_EMULATE_AMX
#include "../../csrc/cpu/emulate_amx.h"
#endif

namespace {

struct Weight {
  WeightShape shape;
  Bytes qweight, scale, zero_point, packed;
  explicit Weight(const WeightShape& s)
      : shape(s), qweight(s.qweight_bytes()), scale(s.scale_bytes()), zero_point(s.zero_point_bytes()) {}
  Portable portable() { return {qweight.data(), scale.data(), zero_point.data()}; }
};

// A random packed weight of magnitude 1. Throws if unpacking does not restore it.
Weight random_weight(const WeightShape& shape, Random& random, int threads) {
  Weight w(shape);
  for (uint8_t& code : w.qweight)
    code = static_cast<uint8_t>(shape.bits == 8 ? random.integer(-128, 127) : random.integer(0, 255));
  if (shape.bits == 4 && shape.k % 2)
    for (int64_t n = 1; n <= shape.n; n++) w.qweight[static_cast<size_t>(n * ((shape.k + 1) / 2) - 1)] &= 15;
  const NybbleDtype dtype = shape.bits == 8 ? NYBBLE_F32 : NYBBLE_BF16;
  for (size_t i = 0; i < w.scale.size(); i += bytes_of(dtype))
    store(&w.scale[i], dtype, (1.5f + 0.5f * random.real()) / (shape.bits == 8 ? 127.0f : 8.0f));
  for (uint8_t& zero : w.zero_point) zero = static_cast<uint8_t>(random.integer(0, 15));
  w.packed.resize(sections_of(shape).total);
  pack(shape, w.portable(), w.packed.data(), threads);
  Weight back(shape);
  unpack(shape, w.packed.data(), back.portable(), threads);
  if (back.qweight != w.qweight || back.scale != w.scale || back.zero_point != w.zero_point)
    throw std::runtime_error("unpack is not the inverse of pack");
  return w;
}

// Scratch memory as the driver gives it: aligned to 64 bytes; null for none.
struct Scratch : std::unique_ptr<void, decltype(&std::free)> {
  explicit Scratch(int64_t bytes) : unique_ptr(bytes ? std::aligned_alloc(64, bytes) : nullptr, &std::free) {}
};

// Calls the prepare and linear kernel once each over the whole problem, with each section of the weights in its own
// buffer, and cut at random.
void run_by_hand(const LinearCall& call, Random& random) {
  const WeightShape& s = call.shape;
  const bool codes_in = call.kernel->int_activations(), grouped = s.bits == 4;
  const size_t rows = static_cast<size_t>(call.rows), columns = static_cast<size_t>(s.tiles() * 16);
  const size_t kp = static_cast<size_t>(s.k_padded()), groups = static_cast<size_t>(s.groups());
  Bytes panel(rows * static_cast<size_t>(nybble_panel_row(call.kernel->panel, s.k_padded())));
  Bytes act_scale(codes_in ? rows * 4 : 0), act_zero(codes_in ? rows * 4 : 0);
  Bytes act_sum(codes_in && grouped ? rows * groups * 4 : 0);
  run_prepare({call.prepare, static_cast<NybblePanel>(call.kernel->panel), call.x_dtype, call.x, call.rows, call.stride,
               s.k, s.k_padded(), call.kernel->block_rows, s.group(), span(panel), span(act_scale), span(act_zero),
               span(act_sum), call.given, call.act_steps});
  for (size_t i = 0; i < act_sum.size(); i += 4) {
    int32_t sum;
    std::memcpy(&sum, &act_sum[i], 4);
    sum *= s.symmetric ? -8 : -1;
    std::memcpy(&act_sum[i], &sum, 4);
  }
  const Sections at = sections_of(s);
  const auto section = [&](size_t offset, size_t bytes) {
    const uint8_t* from = reinterpret_cast<const uint8_t*>(call.packed.address) + offset;
    return Bytes(from, from + bytes);
  };
  const Bytes codes = section(at.codes, columns * kp * static_cast<size_t>(s.bits) / 8);
  const Bytes scale = section(at.scale, columns * groups * (grouped ? 2 : 4));
  const Bytes zero_point = section(at.zero_point, s.symmetric ? 0 : columns * groups);
  const Bytes sum = section(at.sum, columns * 4);
  NybbleLinearArgs args{};
  args.panel = panel.data();
  args.act_scale = reinterpret_cast<const float*>(act_scale.data());
  args.act_zero = reinterpret_cast<const int32_t*>(act_zero.data());
  args.act_sum = reinterpret_cast<const int32_t*>(act_sum.data());
  args.codes = codes.data();
  args.scale = scale.data();
  args.zero_point = s.symmetric ? nullptr : zero_point.data();
  args.column_sum = reinterpret_cast<const int32_t*>(sum.data());
  args.weight_sum = reinterpret_cast<const float*>(sum.data());
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
  args.block_end = (call.rows + args.block_rows - 1) / args.block_rows;
  args.tile_end = s.tiles();
  const int64_t unit = std::max<int64_t>(64, grouped ? s.group() : 0), line_k = NYBBLE_LINE_K;
  args.k_block = s.groups() > 1 || !grouped ? unit * random.integer(1, 4) : s.k_padded();
  args.pass = NYBBLE_TILE_N * random.integer(1, 4);
  const Scratch partial(args.block_end * args.block_rows * args.pass * NYBBLE_PARTIAL_BYTES);
  const int64_t decoded_k = (std::min(args.k_block, args.k_padded) + line_k - 1) / line_k * line_k;
  const Scratch decoded(args.pass * decoded_k * call.kernel->decoded);
  args.partial = partial.get();
  args.decoded = decoded.get();
  if (call.kernel->linear(&args) != NYBBLE_OK) throw std::runtime_error("the kernel rejected its arguments");
#ifdef NYBBLE_EMULATE_AMX
  if (nybble_emulated_tiles.configured) throw std::runtime_error("the kernel left tiles configured");
#endif
}

// Returns "" if the kernel agrees with the scalar one, else what is wrong.
std::string check(const KernelEntry& kernel, int seed) {
  Random random(static_cast<uint64_t>(seed));
  const int64_t group_sizes[] = {0, 32, 64, 128};
  const NybbleDtype dtypes[] = {NYBBLE_F32, NYBBLE_BF16, NYBBLE_F16};
  WeightShape shape{kernel.weight_bits(), random.integer(1, 70), random.integer(1, 300)};
  if (shape.bits == 4) {
    shape.group_size = random.pick(group_sizes);
    shape.symmetric = random.integer(0, 1);
  }
  const int64_t rows = random.integer(1, 40), stride = shape.k + random.integer(0, 1) * random.integer(0, 7);
  const NybbleDtype dtype = kernel.bf16_activations() ? NYBBLE_BF16 : random.pick(dtypes);
  const NybbleDtype out_dtype = random.pick(dtypes);
  const bool with_bias = random.integer(0, 1), exact = kernel.int_activations();
  const int threads = static_cast<int>(random.integer(1, 3));
  const bool given = exact && random.integer(0, 1);  // static activations
  const int steps = kernel.panel == NYBBLE_PANEL_U7 || random.integer(0, 3) == 0 ? 127 : 255;
  const Given fixed{
      std::ldexp(1.0f + static_cast<float>(random.integer(0, 99)) / 100, -static_cast<int>(random.integer(0, 9))),
      static_cast<int32_t>(random.integer(-(steps + 1) / 2, steps / 2))};
  char text[200];
  std::snprintf(text, sizeof text,
                "seed %d, m %d, n %d, k %d, group size %d, symmetric %d, dtype %d to %d, bias %d, threads %d, static "
                "%d, steps %d: ",
                seed, static_cast<int>(rows), static_cast<int>(shape.n), static_cast<int>(shape.k),
                static_cast<int>(shape.group_size), shape.symmetric, dtype, out_dtype, with_bias, threads, given,
                steps);
  const std::string problem = text;
  try {
    Weight weight = random_weight(shape, random, threads);
    Bytes x = random_activations(rows, stride, shape.k, dtype, exact, random);
    Bytes held(given ? kGivenBytes : 0);
    if (given) {
      std::memcpy(&held[0], &fixed.scale, 4);
      std::memcpy(&held[4], &fixed.zero, 4);
    }
    held.insert(held.end(), weight.packed.begin(), weight.packed.end());
    Bytes bias = with_bias ? random_activations(1, shape.n, shape.n, dtype, false, random) : Bytes();
    for (const NybbleDtype y_dtype : {out_dtype, NYBBLE_S32}) {
      if (y_dtype == NYBBLE_S32 && !(exact && shape.bits == 8)) continue;
      const size_t y_bytes = static_cast<size_t>(rows * shape.n) * bytes_of(y_dtype);
      Bytes expected(y_bytes), got(y_bytes), by_hand(y_bytes, 0x55);
      LinearCall call{};
      call.kernel = &find_kernel("w" + std::to_string(shape.bits) + (exact ? "a8_scalar" : "a16_scalar"));
      call.prepare = &find_kernel("prepare_scalar");
      call.shape = shape;
      call.x = span(x);
      call.packed = span(held);
      call.static_activations = given;
      call.act_steps = steps;
      call.bias = span(bias);
      call.y = span(expected);
      call.rows = rows;
      call.stride = stride;
      call.x_dtype = call.bias_dtype = dtype;
      call.y_dtype = y_dtype;
      run_linear(call, 1);
      call.kernel = &kernel;
      call.prepare = prepare_for(kernel);
      call.y = span(got);
      run_linear(call, threads);
      const double least = 0.1 * std::sqrt(static_cast<double>(rows * shape.n * shape.k));
      const auto agrees = [&](const Bytes& y) { return exact ? y == expected : close(y, expected, y_dtype, least); };
      if (!agrees(got)) return problem + "differs from the scalar kernel";
      call.y = span(by_hand);
      call.packed = span(weight.packed);
      if (given) call.given = fixed;
      run_by_hand(call, random);
      if (!agrees(by_hand)) return problem + "differs from the scalar kernel when called without the driver";
    }
  } catch (const std::exception& error) {
    return problem + error.what();
  }
  return "";
}

}  // namespace

int main(int argc, char** argv) {
  const auto dense = [](const KernelEntry& kernel) { return std::strchr(kernel.layout, 'n') == kernel.layout; };
  return compare(argc, argv, dense, check);
}
