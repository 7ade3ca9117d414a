// The interface between the driver and the kernels of convolutions: see abi.h.
#pragma once

#include "abi.h"

// Beside NybbleDtype, of images only: code + 128 in a byte.
enum { NYBBLE_U8 = 5 };

// Convolutions, see tile_conv.h. A sample is an image of [height][width]
// pixels, each of `channels` elements, or of channels of [height][width]
// elements. It is rounded as if it were a row of activations
// (NybblePrepareArgs), to pixels of codes. `range` finds the range of values,
// extended by each call; `plan` how a sample of that range is rounded.
struct NybbleRangeArgs {
  const void* x;
  int32_t dtype, bad;  // bad: a value is NaN or Inf
  int64_t count;
  float low, high;
};
struct NybbleRounding {
  float scale, factor, inverse;
  int32_t zero, steps;
  int32_t empty;  // not 0: all codes are 0
  int32_t given;  // not 0: scale and zero point are given; values outside the
                  // code range are clamped
};

// Writes pixels of a row of an image, to[width][channels] in the format of a
// panel, but not exchanged.
struct NybblePixelsArgs {
  const void* x;
  int32_t x_dtype, panel_format;
  int64_t channels, width;
  int64_t channel;  // from one channel to the next, in elements; 1: pixels are
                    // adjacent
  struct NybbleRounding how;
  void* to;
};

// Packs a row block of a panel, see NybblePrepareArgs: a row is
// `runs` runs of `run` elements at rows[r] + offsets[i] bytes.
struct NybbleFillArgs {
  const uint8_t* const* row;
  const int64_t* offset;
  int64_t rows, runs, run, k_padded;
  int32_t panel_format, sum_factor;
  int32_t* act_sum;  // [rows][groups] as in NybblePrepareArgs, or null
  int64_t group, groups;
  void* panel;
  uint8_t* scratch;  // 4 rows of nybble_panel_row bytes, and 16 more; rows are
                     // followed by 16 readable bytes
};

// y = min(act(x + residual), most) for x [rows][columns] in fp32. Elements of y
// and residual are row_step and column_step apart, one of which is 1. With
// y_dtype S32, y = x, bit for bit.
struct NybbleFinishArgs {
  const float* x;
  int64_t x_stride, rows, columns, row_step, column_step;
  const void* residual;  // or null
  void* y;
  int32_t dtype, act;  // act: identity, relu or silu
  float most;
  struct NybbleRangeArgs* range;  // or null; extended by the range of y: low, high and bad
};

// Convolutions in which each channel has a weight of its own, of 8 bits, and at
// most NYBBLE_MOST_TAPS positions: sums of so many products of codes are exact
// as floats. y = (sum - act_zero * column_sum) * (act_scale * scale) + bias.
enum { NYBBLE_MOST_TAPS = 512 };
struct NybbleDepthwiseArgs {
  const int8_t* x;        // codes of the first tap of the first position
  int64_t position;       // bytes from a position to the next
  const int64_t* offset;  // of the taps, in bytes
  int64_t taps, positions, channels;
  int64_t stride;       // channels, rounded up to a multiple of 16
  const float* weight;  // [taps][stride] codes
  const float* scale;   // [stride], as column_sum
  const int32_t* column_sum;
  const void* bias;  // [channels], or null
  float act_scale;
  int32_t act_zero, bias_dtype, sums;  // sums: y are the sums, int32
  void* y;                             // [positions][stride] float, or int32
};

// Outputs that lie in a row of the image. NYBBLE_PIXELS of them, or for kernels that multiply tiles as many as all
// segments of a call have, at most NYBBLE_TILE_PIXELS.
enum { NYBBLE_PIXELS = 7, NYBBLE_TILE_PIXELS = 16 };
struct NybbleSegment {
  const uint8_t* x;      // codes + 128: the patch of the first output
  int64_t y, residual;   // its place, in elements
  int64_t sample, skip;  // skip: first outputs that are left to another segment
  float act_scale;
  int32_t zero;  // what is subtracted from an element of x: 128 + the zero point
};

// Convolutions with weights of 8 bits whose patches are read where they lie: a patch is `runs` runs of `run` bytes, a
// multiple of 4, and for kernels that multiply tiles of 4 times the fewest steps of 64 bytes, at x + offset[i]; those
// of a segment are `position` bytes apart. For columns of tiles [tile_begin, tile_end): y = min(act((sum - zero *
// column_sum) * (act_scale * scale) + bias + residual), most). y and residual have n adjacent elements a pixel, of a
// float dtype; or, of dtype U8, code + 128 rounded by `how` or read with a scale and a zero point. With y_dtype S32, y
// are the sums of act codes, not centred.
//
// each_channel: 0, or the width of the kernel where each channel has a weight of its own, of as many bytes of its own
// as there are runs, of one byte, row by row; 63 bytes after an image are readable.
enum { NYBBLE_DIRECT_TAPS = 64 };
struct NybbleDirectArgs {
  const struct NybbleSegment* segment;
  int64_t segments, pixels, position;
  const int64_t* offset;
  int64_t runs, run;
  int32_t each_channel;
  const uint8_t* codes;  // as in NybbleLinearArgs, layout n16k4; the next four too
  const float* scale;
  const int32_t* column_sum;
  const void* bias;
  int64_t k_padded, n, tile_begin, tile_end;
  void* y;
  const void* residual;  // or null
  int32_t bias_dtype, y_dtype, residual_dtype, act;
  float most, residual_scale;
  int32_t residual_zero;
  struct NybbleRounding how;
  struct NybbleRangeArgs* range;  // or null; of each sample, extended by the range of y; of codes, only `bad`
  // Or null: a convolution with as many segments, of the same pixels and columns, whose product and bias are added;
  // only where y are codes, n is a multiple of 32, and there is no residual. Its members from segment to n are read.
  const struct NybbleDirectArgs* more;
};

// Pixels of y, `count` adjacent ones: of each channel, the largest of the window's pixels, or their sum times `factor`.
// Of dtype U8 the largest only, and no range.
enum NybblePool { NYBBLE_POOL_NONE = 0, NYBBLE_POOL_MAX = 1, NYBBLE_POOL_MEAN = 2 };
struct NybblePoolArgs {
  const void* x;
  int64_t count, step;  // windows, and elements from one to the next
  int64_t columns, rows, column,
      row;           // pixels of the window, and elements from one to the next
  int64_t channels;  // adjacent
  int32_t pool, dtype;
  float factor;
  void* y;
  struct NybbleRangeArgs* range;  // or null; see NybbleFinishArgs
};

struct NybbleConvKernels {
  enum NybbleStatus (*range)(struct NybbleRangeArgs*);
  void (*plan)(const struct NybbleRangeArgs*, int32_t steps, struct NybbleRounding*);
  enum NybbleStatus (*pixels)(const struct NybblePixelsArgs*);
  enum NybbleStatus (*fill)(const struct NybbleFillArgs*);
  enum NybbleStatus (*finish)(const struct NybbleFinishArgs*);
  enum NybbleStatus (*depthwise)(const struct NybbleDepthwiseArgs*);
  enum NybbleStatus (*pool)(const struct NybblePoolArgs*);
  enum NybbleStatus (*direct)(const struct NybbleDirectArgs*);  // or null
  int32_t multiplies_tiles;                                     // not 0: direct does, see NybbleDirectArgs
};
