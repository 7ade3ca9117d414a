// Compares the convolutions of the given targets with the scalar ones, on random problems and without Python: with each
// dense linear kernel, bit for bit for quantized activations, and on one thread with several; and pools likewise; and
// codes of outputs with floats.
//   compare_conv TARGET...           targets of kernels.def that this CPU supports
// Every buffer has its exact size, so that a sanitizer detects out-of-bounds accesses.
#include "../../csrc/conv.h"
#include "random_weight.h"

namespace {

constexpr int kConvCases = kCases * 3 / 10;

const KernelEntry* conv_for(const KernelEntry& kernel) {
  return nearest(kernel, [](const KernelEntry& e) { return e.conv != nullptr; });
}

// An axis: pixels, kernel, stride, padding and dilation such that there is an output.
struct Axis {
  int64_t size, kernel, stride, pad, dilation, out;
  explicit Axis(Random& random)
      : size(random.integer(1, random.integer(0, 3) ? 14 : 40)),
        kernel(random.integer(1, 4)),
        stride(random.integer(1, 3)),
        pad(random.integer(0, 3)),
        dilation(random.integer(1, 2)) {
    size = std::max(size, (kernel - 1) * dilation + 1 - 2 * pad);
    out = (size + 2 * pad - (kernel - 1) * dilation - 1) / stride + 1;
  }
};

// A convolution of any kind: whole, in groups, or with a weight for each channel.
ConvShape random_conv(int64_t group_channels, int64_t groups, Random& random) {
  const Axis y(random), x(random);
  ConvShape s;
  s.batch = random.integer(1, 3);
  s.groups = groups;
  s.channels = groups * group_channels;
  s.height = y.size, s.width = x.size;
  s.out_height = y.out, s.out_width = x.out;
  s.kernel_height = y.kernel, s.kernel_width = x.kernel;
  s.stride_height = y.stride, s.stride_width = x.stride;
  s.pad_height = y.pad, s.pad_width = x.pad;
  s.dilation_height = y.dilation, s.dilation_width = x.dilation;
  return s;
}

size_t image_bytes(int64_t batch, int64_t channels, int64_t pixels, NybbleDtype dtype) {
  return static_cast<size_t>(batch * channels * pixels) * bytes_of(dtype);
}

// What a run writes.
struct Result {
  Bytes y, range;
  explicit Result(const ConvCall& call)
      : y(image_bytes(call.shape.batch, call.linear.shape.n, call.shape.positions(), call.linear.y_dtype), 0x55),
        range(call.y_range.bytes, 0x55) {}
};

Result result_of(ConvCall call, int threads) {
  Result result(call);
  call.linear.y = span(result.y);
  if (call.y_range.bytes) call.y_range = span(result.range);
  run_convs({&call, &call}, threads);
  return result;
}

void random_end(ConvCall& call, Bytes& residual, Bytes& range, Random& random) {
  const int acts[] = {NYBBLE_ACT_IDENTITY, NYBBLE_ACT_RELU};
  call.most = INFINITY;
  if (call.linear.y_dtype == NYBBLE_S32) return;
  call.act = random.pick(acts);
  if (random.integer(0, 1)) call.most = 2.0f;
  if (random.integer(0, 1)) call.residual = span(residual);
  if (random.integer(0, 1)) call.y_range = span(range);
}

std::string check(const KernelEntry& kernel, int seed) {
  Random random(static_cast<uint64_t>(seed));
  const bool exact = kernel.int_activations(), each_channel = random.integer(0, 3) == 0;
  const int64_t groups = each_channel ? random.integer(1, 40) : random.integer(0, 2) ? 1 : random.integer(1, 4);
  const ConvShape s = random_conv(each_channel ? 1 : random.integer(1, 20), groups, random);
  const int64_t n = groups * (each_channel ? 1 : random.integer(1, 20));
  const int64_t k = s.kernel_height * s.kernel_width * s.group_channels();
  Weight weight = random_weight(random_shape(kernel, n, k, random), random, 1);
  const NybbleDtype dtype = random_dtype(kernel, random);
  const bool sums = exact && !weight.shape.by_group() && random.integer(0, 3) == 0;
  Bytes x = random_activations(s.batch, s.channels * s.height * s.width, s.channels * s.height * s.width, dtype, exact,
                               random);
  Bytes bias = random.integer(0, 1) ? random_activations(1, n, n, dtype, false, random) : Bytes();
  ConvCall call{};
  const int steps = random_steps(kernel, random);
  const bool arranged = random.integer(0, 1) == 1;
  const bool channels_last[] = {random.integer(0, 1) == 1, random.integer(0, 1) == 1};
  const NybbleDtype y_dtype = sums ? NYBBLE_S32 : dtype;
  Bytes residual(image_bytes(s.batch, n, s.positions(), y_dtype)), range(static_cast<size_t>(s.batch) * 12);
  for (size_t i = 0; i < residual.size(); i += bytes_of(y_dtype)) store(&residual[i], y_dtype, random.real());
  call.linear.y_dtype = y_dtype;
  random_end(call, residual, range, random);
  const auto with = [&](bool scalar) {
    ConvCall one = call;
    one.linear = call_with(kernel, scalar, steps);
    one.kernel = conv_for(*one.linear.kernel);
    one.shape = s;
    take_weight(one.linear, weight, scalar);
    one.linear.x = span(x);
    one.linear.bias = span(bias);
    one.linear.x_dtype = one.linear.bias_dtype = dtype;
    one.linear.y_dtype = y_dtype;
    one.x_last = channels_last[0], one.y_last = channels_last[1];
    if (arranged) arrange(one);
    return one;
  };
  const Result got = result_of(with(false), 1), again = result_of(with(false), 3), other = result_of(with(true), 1);
  if (again.y != got.y || again.range != got.range) return "threads change the result";
  const double least = 0.1 * std::sqrt(static_cast<double>(s.batch * s.positions() * n * k));
  if (exact) return other.y == got.y && other.range == got.range ? "" : "differs from the scalar kernel";
  return close(got.y, other.y, y_dtype, least) ? "" : "differs from the scalar kernel";
}

std::string check_pool(const KernelEntry& kernel, int seed) {
  Random random(static_cast<uint64_t>(seed));
  const NybbleDtype dtypes[] = {NYBBLE_F32, NYBBLE_BF16, NYBBLE_F16};
  ConvCall call{};
  call.kernel = &kernel;
  ConvShape& s = call.shape;
  s = random_conv(random.integer(1, 40), 1, random);
  s.pad_height = random.integer(0, s.kernel_height - 1), s.pad_width = random.integer(0, s.kernel_width - 1);
  s.out_height = (s.height + s.pad_height - 1) / s.stride_height + 1;
  s.out_width = (s.width + s.pad_width - 1) / s.stride_width + 1;
  const NybbleDtype dtype = random.pick(dtypes);
  const int64_t image = s.height * s.width * s.channels;
  Bytes x = random_activations(s.batch, image, image, dtype, false, random), range(static_cast<size_t>(s.batch) * 12);
  call.linear.x = span(x);
  call.linear.x_dtype = call.linear.y_dtype = dtype;
  call.linear.shape.n = s.channels;
  call.pool = random.integer(0, 1) ? NYBBLE_POOL_MAX : NYBBLE_POOL_MEAN;
  if (random.integer(0, 1)) call.y_range = span(range);
  const auto pooled = [&](const KernelEntry& by, int threads) {
    call.kernel = &by;
    Result result(call);
    call.linear.y = span(result.y);
    if (call.y_range.bytes) call.y_range = span(result.range);
    run_pool(call, threads);
    return result;
  };
  const Result got = pooled(kernel, 1), again = pooled(kernel, 3), other = pooled(find_kernel("conv_scalar"), 1);
  if (again.y != got.y || again.range != got.range) return "threads change the result";
  return other.y == got.y && other.range == got.range ? "" : "differs from the scalar kernel";
}

// An image of random codes in a frame that is padded at least so far, and the same as floats.
struct CodedImage {
  Coded coded;
  Bytes frame, floats;
  CodedImage(int64_t batch, int64_t channels, int64_t height, int64_t width, int64_t pad_height, int64_t pad_width,
             Random& random) {
    coded = {0.01f * static_cast<float>(random.integer(1, 4)), static_cast<int32_t>(random.integer(-128, 127)),
             pad_height + random.integer(0, 2), pad_width + random.integer(0, 2)};
    const int64_t wide = width + 2 * coded.pad_width, high = height + 2 * coded.pad_height;
    frame.assign(static_cast<size_t>(batch * high * wide * channels + 64), static_cast<uint8_t>(128 + coded.zero));
    floats.resize(static_cast<size_t>(batch * height * width * channels) * 4);
    uint8_t* to = floats.data();
    for (int64_t row = 0; row < batch * height; row++) {
      const int64_t y = row / height * high + row % height + coded.pad_height;
      uint8_t* from = &frame[static_cast<size_t>((y * wide + coded.pad_width) * channels)];
      for (int64_t i = 0; i < width * channels; i++, to += 4) {
        from[i] = static_cast<uint8_t>(random.integer(0, 255));
        store(to, NYBBLE_F32, coded.scale * static_cast<float>(from[i] - 128 - coded.zero));
      }
    }
  }
};

// Convolutions of codes, which few kernels compute: the same bytes on any number of threads, each the nearest code to
// the float that the same kernel writes.
std::string check_codes(const KernelEntry& kernel, int seed) {
  Random random(static_cast<uint64_t>(seed));
  const bool each_channel = random.integer(0, 3) == 0;
  const int64_t few = random.integer(1, 3), fours = 4 * random.integer(1, 40);
  const int64_t channels = each_channel ? random.integer(2, 140) : random.integer(0, 3) ? fours : fours - few;
  const int64_t n = each_channel ? channels : 16 * random.integer(1, 10) + 5 * random.integer(0, 1);
  ConvShape s = random_conv(each_channel ? 1 : channels, each_channel ? channels : 1, random);
  CodedImage x(s.batch, channels, s.height, s.width, s.pad_height, s.pad_width, random);
  CodedImage added(s.batch, n, s.out_height, s.out_width, 0, 0, random);
  CodedImage y(s.batch, n, s.out_height, s.out_width, 0, 0, random);
  y.frame.resize(y.frame.size() - 64);
  Weight weight = random_weight({8, n, s.kernel_height * s.kernel_width * s.group_channels()}, random, 1);
  Bytes range(static_cast<size_t>(s.batch) * 12), packed(kGivenBytes);
  std::memcpy(&packed[0], &x.coded.scale, 4);
  std::memcpy(&packed[4], &x.coded.zero, 4);
  packed.insert(packed.end(), weight.packed.begin(), weight.packed.end());
  ConvCall call{};
  call.linear = call_with(kernel, false, 255);
  call.kernel = conv_for(kernel);
  call.shape = s;
  call.linear.shape = weight.shape;
  call.linear.packed = span(packed);
  call.linear.x = span(x.frame);
  call.linear.static_activations = true;
  call.x_last = call.y_last = true;
  call.x_coded = x.coded;
  call.most = random.integer(0, 1) ? INFINITY : 2.0f;
  const int acts[] = {NYBBLE_ACT_IDENTITY, NYBBLE_ACT_RELU, NYBBLE_ACT_SILU};
  call.act = random.pick(acts);
  const bool adds = random.integer(0, 1) == 1;
  arrange(call);
  if (!runs_direct(call)) return "";  // reads no codes
  const auto run = [&](bool codes, int threads) {
    ConvCall one = call;
    Bytes result = codes ? y.frame : Bytes(y.floats.size());
    one.linear.y = span(result);
    if (codes) one.y_coded = y.coded, one.y_range = span(range);
    if (adds) one.residual = span(codes ? added.frame : added.floats);
    if (adds && codes) one.residual_coded = added.coded;
    run_convs({&one, &one}, threads);
    return result;
  };
  const Bytes got = run(true, 1), again = run(true, 3), floats = run(false, 1);
  if (again != got) return "threads change the result";
  const int64_t wide = s.out_width + 2 * y.coded.pad_width, high = s.out_height + 2 * y.coded.pad_height;
  for (int64_t row = 0; row < s.batch * s.out_height; row++)
    for (int64_t i = 0; i < s.out_width * n; i++) {
      const int64_t at = row / s.out_height * high + row % s.out_height + y.coded.pad_height;
      const float value = load(&floats[static_cast<size_t>(row * s.out_width * n + i) * 4], NYBBLE_F32);
      const double ideal = std::clamp(value / double{y.coded.scale} + y.coded.zero, -128.0, 127.0);
      const int code = got[static_cast<size_t>((at * wide + y.coded.pad_width) * n + i)] - 128;
      if (std::abs(code - ideal) > 0.501) return "is not the nearest code";
    }
  return "";
}

}  // namespace

int main(int argc, char** argv) {
  const auto conv = [](const KernelEntry& kernel) { return kernel.conv != nullptr; };
  const Count pools = compare_each(argc, argv, kCases, conv, check_pool);
  const auto bytes = [](const KernelEntry& kernel) {
    return kernel.linear && !std::strcmp(kernel.layout, "n16k4") && kernel.int_activations();
  };
  const Count codes = compare_each(argc, argv, kConvCases, bytes, check_codes);
  return verdict(argc, {pools, codes, compare_each(argc, argv, kConvCases, is_dense_linear, check)});
}
