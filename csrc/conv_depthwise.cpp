#include "conv_depthwise.h"

#include "pieces.h"

namespace nybble {

std::vector<float> depthwise_taps(const LinearCall& linear) {
  const WeightShape& shape = linear.shape;
  const NybbleLinearArgs args = linear_args(linear, Chunk{});
  const int64_t stride = shape.tiles() * NYBBLE_TILE_N;
  std::vector<float> taps(static_cast<size_t>(shape.k * stride));
  for (int64_t k = 0; k < shape.k; k++)
    for (int64_t c = 0; c < stride; c++)
      taps[static_cast<size_t>(k * stride + c)] = static_cast<int8_t>(args.codes[shape.place_of(c, k)]);
  return taps;
}

const float* run_depthwise(const DepthwiseRun& run, const uint8_t* x) {
  thread_local Scratch scratch;
  const ConvShape& s = run.call->shape;
  NybbleDepthwiseArgs args{};
  args.stride = run.call->linear.shape.tiles() * NYBBLE_TILE_N;
  args.y = scratch.try_reserve(static_cast<size_t>(s.out_width * args.stride * 4));
  if (!args.y) return nullptr;
  args.x = reinterpret_cast<const int8_t*>(x);
  args.position = s.stride_width * s.channels;
  args.offset = run.offset;
  args.taps = run.call->linear.shape.k;
  args.positions = s.out_width;
  args.channels = s.channels;
  args.weight = run.taps;
  args.scale = static_cast<const float*>(run.weight.scale);
  args.column_sum = run.weight.column_sum;
  args.bias = run.weight.bias;
  args.bias_dtype = run.weight.bias_dtype;
  args.act_scale = run.how.scale;
  args.act_zero = run.how.zero;
  args.sums = run.weight.y_dtype == NYBBLE_S32;
  return run.call->kernel->conv->depthwise(&args) == NYBBLE_OK ? static_cast<const float*>(args.y) : nullptr;
}

}  // namespace nybble
