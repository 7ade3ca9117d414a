// Convolutions as products: each sample is rounded once, to pixels of codes;
// rows of patches of pixels are packed into panels, which the kernels of linear
// layers multiply.
#pragma once

#include <initializer_list>
#include <memory>
#include <vector>

#include "abi_conv.h"
#include "linear.h"

namespace nybble {

// Sizes in pixels. The image begins `pad` pixels into its frame of zeros, which
// is as large as the output needs.
struct ConvShape {
  int64_t batch = 0, channels = 0, height = 0, width = 0;
  int64_t out_height = 0, out_width = 0;
  int64_t kernel_height = 0, kernel_width = 0, stride_height = 0, stride_width = 0;
  int64_t pad_height = 0, pad_width = 0, dilation_height = 0, dilation_width = 0;
  int64_t groups = 0;

  int64_t positions() const { return out_height * out_width; }
  int64_t frame_height() const { return (out_height - 1) * stride_height + (kernel_height - 1) * dilation_height + 1; }
  int64_t frame_width() const { return (out_width - 1) * stride_width + (kernel_width - 1) * dilation_width + 1; }
  int64_t group_channels() const { return channels / groups; }
};

// The product of sizes. Throws std::invalid_argument if it, or its bytes, could overflow, or one is negative.
int64_t image_elements(std::initializer_list<int64_t> sizes);
// Throws std::invalid_argument for a number out of range, or a weight of other sizes.
void check_conv(const ConvShape& shape, const WeightShape& weight);

// An image as code + 128 in bytes, channels last, x = (code - zero) * scale, if scale is not 0. Around each sample it
// has so many more pixels, which hold the code of 0.
struct Coded {
  float scale = 0;
  int32_t zero = 0;
  int64_t pad_height = 0, pad_width = 0;
  explicit operator bool() const { return scale != 0; }
};

struct ConvCall;
// Throws std::invalid_argument for a span that is too small, or codes out of range. linear.rows is set.
void check_spans(const ConvCall& call);
// Likewise for what call.more adds.
void check_more(const ConvCall& call);
// Likewise for a pool, and for sizes out of range.
void check_pool_spans(const ConvCall& call);

// The weight is (N, K): N outputs of all groups, K = kernel_height *
// kernel_width * group_channels in this order. Images are dense,
// [batch][height][width][channels] if `last`, else
// [batch][channels][height][width].
struct ConvCall {
  LinearCall linear;  // kernel, prepare, shape, packed, bias, x, y and their
                      // dtypes; y S32: the sums of products
  const KernelEntry* kernel;
  ConvShape shape;
  bool x_last, y_last;
  Span scale;     // null, or fp32 [tiles * 16]: in place of the scales of a weight
                  // of 8 bits
  Span residual;  // null, or as y: y = min(act(product + bias + residual), most)
  int act;
  float most;
  Span x_range,
      y_range;   // null, or of each sample the least value and 0, the largest and
                 // 0, and 0, or not 0 if a value is NaN or Inf; fp32 [batch][3].
                 // That of x saves reading x twice; that of y is written
  int pool = 0;  // NybblePool
  // Of x, y and the residual: those that are codes, of which only calls that `direct` computes have any. x is then as
  // padded as the kernel needs at least, and its scale and zero point stand for those of linear.given.
  Coded x_coded{}, y_coded{}, residual_coded{};
  NybbleDtype residual_float = NYBBLE_F32;  // of a residual that is no codes, where y is codes; else that of y
  std::shared_ptr<const std::vector<uint8_t>> arranged{};  // null, or what `arrange` made of the codes
  // Null, or a convolution with the same y, whose product and bias are added; both read and write codes, and have no
  // residual (check_more).
  std::shared_ptr<const ConvCall> more{};
  // linear.x_dtype and linear.y_dtype, and that of the residual; NYBBLE_U8 for codes.
  int x_dtype() const { return x_coded ? int{NYBBLE_U8} : linear.x_dtype; }
  int y_dtype() const { return y_coded ? int{NYBBLE_U8} : linear.y_dtype; }
  int residual_dtype() const { return residual_coded ? int{NYBBLE_U8} : y_coded ? residual_float : linear.y_dtype; }
};

// Bytes of an element of an image.
inline int64_t pixel_bytes(int dtype) { return dtype == NYBBLE_U8 ? 1 : dtype_bytes(dtype); }
// Whether patches are read where they lie, by the kernel `direct`. Only such a call may read and write codes.
bool runs_direct(const ConvCall& call);
// Makes a call ready for that if it lacks just weights whose runs are filled up to multiples of 4 bytes. The weight may
// then change no more.
void arrange(ConvCall& call);

// Likewise, without a weight: y is the largest or the mean (`pool`) of the
// pixels of each window, of which those outside of the image are no part. Both
// are `last` and of linear.x_dtype. Windows lie in the frame. Of codes, y_range has what is bad of x_range.
void run_pool(const ConvCall& call, int threads);

// Throws std::invalid_argument for a span that is too small or a number out of
// range, and std::bad_alloc.
// Runs one after the other.
void run_convs(const std::vector<const ConvCall*>& calls, int threads);

}  // namespace nybble
