#include "conv.h"

namespace nybble {

namespace {

// Most elements of an image, such that no product of sizes and bytes overflows.
constexpr int64_t kMostElements = int64_t{1} << 48;

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

}  // namespace nybble
