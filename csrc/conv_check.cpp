#include <cmath>
#include <limits>

#include "conv.h"

namespace nybble {

namespace {

// Most elements of an image, such that no product of sizes and bytes overflows.
constexpr int64_t kMostElements = int64_t{1} << 48;

void check_coded(const char* name, const Coded& coded, int64_t least_height, int64_t least_width) {
  if (!coded) return;
  const bool padded = coded.pad_height >= least_height && coded.pad_width >= least_width;
  if (!(coded.scale >= 0x1p-126f && coded.scale <= 0x1p126f) || coded.zero < -128 || coded.zero > 127 || !padded ||
      coded.pad_height > INT32_MAX || coded.pad_width > INT32_MAX)
    refuse(std::string(name) + ": scale, zero point or padding out of range");
}

// Elements of an image of n channels.
int64_t coded_elements(const ConvShape& s, int64_t n, int64_t height, int64_t width, const Coded& coded) {
  return image_elements({s.batch, n, height + 2 * coded.pad_height, width + 2 * coded.pad_width});
}

}  // namespace

int64_t image_elements(std::initializer_list<int64_t> sizes) {
  int64_t all = 1;
  for (int64_t size : sizes) {
    if (size < 0 || (size > 0 && all > kMostElements / size)) refuse("x: size out of range");
    all *= size;
  }
  return all;
}

void check_conv(const ConvShape& s, const WeightShape& weight) {
  const auto at_least = [](const char* name, int64_t value, int64_t least) {
    if (value < least || value > INT32_MAX)
      refuse(std::string(name) + "=" + std::to_string(value) + ": must be at least " + std::to_string(least));
  };
  at_least("batch", s.batch, 0);
  for (const auto& [name, value] :
       std::initializer_list<std::pair<const char*, int64_t>>{{"channels", s.channels},
                                                              {"out_height", s.out_height},
                                                              {"out_width", s.out_width},
                                                              {"kernel_height", s.kernel_height},
                                                              {"kernel_width", s.kernel_width},
                                                              {"stride_height", s.stride_height},
                                                              {"stride_width", s.stride_width},
                                                              {"dilation_height", s.dilation_height},
                                                              {"dilation_width", s.dilation_width},
                                                              {"groups", s.groups}})
    at_least(name, value, 1);
  at_least("height", s.height, 0);
  at_least("width", s.width, 0);
  at_least("pad_height", s.pad_height, 0);
  at_least("pad_width", s.pad_width, 0);
  if (s.channels % s.groups) refuse("channels=" + std::to_string(s.channels) + ": must be a multiple of groups");
  if (weight.n % s.groups) refuse("out_channels=" + std::to_string(weight.n) + ": must be a multiple of groups");
  if (image_elements({s.kernel_height, s.kernel_width, s.group_channels()}) != weight.k)
    refuse("weight: has " + std::to_string(weight.k) + " inputs, the kernel and the channels of a group make " +
           std::to_string(s.kernel_height * s.kernel_width * s.group_channels()));
  for (int64_t size : {s.stride_height, s.stride_width, s.dilation_height, s.dilation_width})
    image_elements({size, s.kernel_height, s.kernel_width, s.out_height, s.out_width});
  image_elements({s.frame_height(), s.frame_width(), s.channels, 4});
}

void check_spans(const ConvCall& call) {
  const ConvShape& s = call.shape;
  const LinearCall& linear = call.linear;
  const int64_t n = linear.shape.n;
  check_coded("x_coded", call.x_coded, s.pad_height, s.pad_width);
  check_coded("y_coded", call.y_coded, 0, 0);
  check_coded("residual_coded", call.residual_coded, 0, 0);
  if (call.x_coded && (s.frame_height() > s.height + 2 * s.pad_height || s.frame_width() > s.width + 2 * s.pad_width))
    refuse("x_coded: the kernel leaves the image");
  const int64_t x = coded_elements(s, s.channels, s.height, s.width, call.x_coded);
  require("x", linear.x, x + (call.x_coded ? 64 : 0), pixel_bytes(call.x_dtype()));
  require("y", linear.y, coded_elements(s, n, s.out_height, s.out_width, call.y_coded), pixel_bytes(call.y_dtype()));
  if (call.residual.address)
    require("residual", call.residual, coded_elements(s, n, s.out_height, s.out_width, call.residual_coded),
            pixel_bytes(call.residual_dtype()));
  for (const Span* range : {&call.x_range, &call.y_range})
    if (range->address) require("range", *range, 3 * s.batch, 4);
  if ((call.x_coded || call.y_coded || call.residual_coded) && !runs_direct(call))
    refuse("codes: the kernel reads and writes none");
  if (call.x_coded && !linear.static_activations) refuse("codes: those of x are for a layer with static activations");
  if (call.y_coded && !call.y_range.address) refuse("y_range: missing, for codes");
  if (std::isnan(call.most)) refuse("most: must not be NaN");
  if (!call.scale.address) return;
  if (linear.shape.by_group()) refuse("scale: must be that of a weight with one scale a row");
  require("scale", call.scale, linear.shape.tiles() * NYBBLE_TILE_N, 4);
}

void check_more(const ConvCall& call) {
  const ConvCall& more = *call.more;
  const ConvShape &s = call.shape, &other = more.shape;
  const bool alike = s.batch == other.batch && s.out_height == other.out_height && s.out_width == other.out_width &&
                     call.linear.shape.n == more.linear.shape.n && call.linear.y.address == more.linear.y.address &&
                     call.y_coded.scale == more.y_coded.scale && call.y_coded.zero == more.y_coded.zero &&
                     call.y_coded.pad_height == more.y_coded.pad_height &&
                     call.y_coded.pad_width == more.y_coded.pad_width;
  if (!alike) refuse("more: must have the outputs of the convolution to which it is added");
  if (!call.x_coded || !call.y_coded || !more.x_coded || call.residual.address || more.residual.address || more.more ||
      s.groups != 1 || other.groups != 1 || call.linear.shape.n % 32 || more.act != NYBBLE_ACT_IDENTITY ||
      more.most != std::numeric_limits<float>::infinity() ||
      (call.act != NYBBLE_ACT_IDENTITY && call.act != NYBBLE_ACT_RELU))
    refuse("more: is added only by whole convolutions of codes, with 32, 64, ... outputs and no residual");
}

void check_pool_spans(const ConvCall& call) {
  const ConvShape& s = call.shape;
  for (const int64_t size : {s.batch, s.channels, s.height, s.width, s.out_height, s.out_width, s.kernel_height,
                             s.kernel_width, s.stride_height, s.stride_width})
    if (size < 1 || size > INT32_MAX) refuse("pool: sizes must be at least 1");
  if (s.pad_height < 0 || s.pad_height >= s.kernel_height || s.pad_width < 0 || s.pad_width >= s.kernel_width ||
      (s.out_height - 1) * s.stride_height - s.pad_height >= s.height ||
      (s.out_width - 1) * s.stride_width - s.pad_width >= s.width)
    refuse("pool: a window has no pixel of the image");
  check_coded("x_coded", call.x_coded, 0, 0);
  check_coded("y_coded", call.y_coded, 0, 0);
  const bool coded = bool(call.x_coded);
  if (call.x_coded.scale != call.y_coded.scale || call.x_coded.zero != call.y_coded.zero ||
      (coded && call.pool != NYBBLE_POOL_MAX))
    refuse("codes: a pool of codes must be max, and write those of its input's scale and zero point");
  const int64_t bytes = pixel_bytes(call.x_dtype());
  require("x", call.linear.x, coded_elements(s, s.channels, s.height, s.width, call.x_coded), bytes);
  require("y", call.linear.y, coded_elements(s, s.channels, s.out_height, s.out_width, call.y_coded), bytes);
  if (coded && !(call.x_range.address && call.y_range.address)) refuse("ranges: missing, for codes");
  for (const Span* range : {&call.x_range, &call.y_range})
    if (range->address) require("range", *range, s.batch * 3, 4);
}

}  // namespace nybble
