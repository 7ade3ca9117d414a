#include "conv_direct.h"

#include <algorithm>
#include <atomic>

#include "caches.h"
#include "pieces.h"

namespace nybble {

namespace {

// Of the weights that no part of the columns divides: a tile of the kernel's registers at most, so that parts change no
// result.
constexpr int64_t kPartTiles = 4;

int64_t blocks_of(int64_t count, int64_t of) { return (count + of - 1) / of; }

// Outputs in lines of adjacent pixels, cut into segments: the last of a line overlaps the one before.
struct Lines {
  int64_t width, count;  // of a sample
  int64_t segments() const { return blocks_of(width, NYBBLE_PIXELS); }
};

bool is_padded(const Coded& coded) { return coded.pad_height > 0 || coded.pad_width > 0; }

// Whether all outputs of a sample are one line: patches are pixels, one after the other.
bool is_one_line(const ConvCall& call) {
  const ConvShape& s = call.shape;
  const bool plain = s.kernel_height * s.kernel_width * s.stride_height * s.stride_width == 1 && !s.pad_height &&
                     !s.pad_width && s.out_height == s.height && s.out_width == s.width;
  return plain && !is_padded(call.x_coded) && !is_padded(call.y_coded) && !is_padded(call.residual_coded) &&
         (!call.more || is_one_line(*call.more));
}

Lines lines_of(const ConvCall& call) {
  const ConvShape& s = call.shape;
  return is_one_line(call) ? Lines{s.positions(), 1} : Lines{s.out_width, s.out_height};
}

// Segments that are multiplied with all columns of a part before the next ones, and parts of the columns.
struct DirectCut {
  int64_t segments, parts;
};

// Threads share the larger of the image and the weights, so that each reads only its part of it. Segments at a time are
// so few that what they read and write stays in the cache.
DirectCut cut_direct(const DirectRun& run, int64_t segments) {
  const ConvShape& s = run.call->shape;
  const int64_t n = run.call->linear.shape.n, most_parts = blocks_of(n, kPartTiles * NYBBLE_TILE_N);
  const int64_t x = s.channels * s.stride_height * s.stride_width;
  const int64_t y = n * (pixel_bytes(run.call->y_dtype()) + (run.call->residual.address ? 2 : 0));
  const int64_t most = std::max<int64_t>(caches().l2 / 4 / (NYBBLE_PIXELS * (x + y)), 2);
  const bool columns = run.workers > 1 && n * run.weight.k_padded > run.samples * s.height * s.width * s.channels;
  const int64_t few = columns ? segments : blocks_of(segments, 4 * run.workers);
  return {round_up(std::min(most, std::max<int64_t>(few, 1)), 2),
          columns ? std::min<int64_t>(most_parts, 2 * run.workers) : 1};
}

// The place of pixel (y, x) of a sample of an image with n channels, in elements.
int64_t place_of(const ConvShape& s, int64_t n, const Coded& coded, int64_t sample, int64_t y, int64_t x) {
  const int64_t height = s.out_height + 2 * coded.pad_height, width = s.out_width + 2 * coded.pad_width;
  return ((sample * height + y + coded.pad_height) * width + x + coded.pad_width) * n;
}

NybbleSegment segment_of(const DirectRun& run, const Lines& lines, int64_t i) {
  const ConvCall& call = *run.call;
  const ConvShape& s = call.shape;
  const int64_t line = i / lines.segments(), sample = line / lines.count, y = line % lines.count;
  const int64_t begin = i % lines.segments() * NYBBLE_PIXELS, x = std::min(begin, lines.width - NYBBLE_PIXELS);
  const NybbleRounding& how = run.how[sample];
  return {run.x + sample * run.sample_bytes + y * s.stride_height * run.row + x * s.stride_width * s.channels,
          place_of(s, call.linear.shape.n, call.y_coded, run.first + sample, y, x),
          place_of(s, call.linear.shape.n, call.residual_coded, run.first + sample, y, x),
          sample,
          begin - x,
          how.scale,
          128 + how.zero};
}

bool has_own_weights(const ConvCall& call) {
  return call.shape.groups == call.shape.channels && call.linear.shape.n == call.shape.channels &&
         call.shape.channels > 1;
}

// What runs_direct asks for besides the form of the patches.
bool may_run(const ConvCall& call) {
  const LinearCall& linear = call.linear;
  return call.kernel->conv && call.kernel->conv->direct && linear.kernel->panel == NYBBLE_PANEL_U8 &&
         !linear.shape.by_group() && linear.shape.form == Form::dense && call.y_last &&
         lines_of(call).width >= NYBBLE_PIXELS;
}

NybbleDirectArgs direct_args(const DirectRun& run) {
  const ConvCall& call = *run.call;
  NybbleDirectArgs args{};
  args.position = call.shape.stride_width * call.shape.channels;
  args.offset = run.offset;
  args.runs = run.runs;
  args.run = run.run;
  args.each_channel = has_own_weights(call);
  args.codes = run.weight.codes;
  args.scale = static_cast<const float*>(run.weight.scale);
  args.column_sum = run.weight.column_sum;
  args.bias = run.weight.bias;
  args.bias_dtype = run.weight.bias_dtype;
  args.k_padded = run.weight.k_padded;
  args.n = call.linear.shape.n;
  args.y = reinterpret_cast<void*>(call.linear.y.address);
  args.y_dtype = call.y_dtype();
  args.residual = reinterpret_cast<const void*>(call.residual.address);
  args.residual_dtype = call.residual_dtype();
  args.residual_scale = call.residual_coded.scale;
  args.residual_zero = call.residual_coded.zero;
  args.act = call.act;
  args.most = call.most;
  if (call.arranged) {
    args.run = round_up(run.run, 4);
    args.k_padded = run.runs * args.run;
    args.codes = call.arranged->data();
  }
  if (call.y_coded) args.how = {call.y_coded.scale, 1.0f, 1.0f / call.y_coded.scale, call.y_coded.zero, 255, 0, 1};
  return args;
}

}  // namespace

int64_t run_of(const ConvShape& s) {
  return s.group_channels() * (s.groups == 1 && s.dilation_width == 1 ? s.kernel_width : 1);
}

void arrange(ConvCall& call) {
  const int64_t run = run_of(call.shape);
  if (!may_run(call) || call.shape.groups != 1 || run % 4 == 0 || call.x_coded) return;
  LinearCall linear = call.linear;
  linear.rows = call.shape.batch * call.shape.positions();
  linear = resolved(linear);
  const uint8_t* codes = linear_args(linear, Chunk{}).codes;
  const int64_t padded = round_up(run, 4), runs = linear.shape.k / run, tiles = linear.shape.tiles();
  const int64_t tile = NYBBLE_TILE_N * linear.shape.k_padded();
  auto to = std::make_shared<std::vector<uint8_t>>(static_cast<size_t>(tiles * NYBBLE_TILE_N * runs * padded));
  const auto at = [](int64_t k) { return k / 4 * 64 + k % 4; };
  for (int64_t t = 0; t < tiles; t++)
    for (int64_t k = 0; k < linear.shape.k; k++) {
      const uint8_t* from = codes + t * tile + at(k);
      uint8_t* here = to->data() + t * NYBBLE_TILE_N * runs * padded + at(k / run * padded + k % run);
      for (int64_t column = 0; column < NYBBLE_TILE_N; column++) here[column * 4] = from[column * 4];
    }
  call.arranged = std::move(to);
}

bool runs_direct(const ConvCall& call) {
  if (!may_run(call)) return false;
  if (has_own_weights(call)) return call.linear.shape.k <= NYBBLE_DIRECT_TAPS;
  return call.shape.groups == 1 && (run_of(call.shape) % 4 == 0 || (call.arranged && !call.x_coded));
}

bool run_direct(const DirectRun& run, Team& team,
                const std::function<void(int64_t sample, const NybbleRangeArgs& range)>& extend) {
  const Lines lines = lines_of(*run.call);
  const int64_t all = run.samples * lines.count * lines.segments(), tiles = run.call->linear.shape.tiles();
  const DirectCut cut = cut_direct(run, all);
  const int64_t units = blocks_of(tiles, kPartTiles);
  std::atomic<bool> ok{true};  // all threads write it
  team.each(cut.parts * blocks_of(all, cut.segments), [&](int64_t item) {
    thread_local Scratch scratch;
    const int64_t part = item % cut.parts, begin = item / cut.parts * cut.segments;
    const int64_t count = std::min(cut.segments, all - begin);
    const size_t bytes = static_cast<size_t>(run.more ? 2 * count : count) * sizeof(NybbleSegment);
    uint8_t* memory = scratch.try_reserve(bytes + static_cast<size_t>(run.samples) * sizeof(NybbleRangeArgs));
    if (!memory) {
      ok = false;
      return;
    }
    NybbleSegment* segments = reinterpret_cast<NybbleSegment*>(memory);
    for (int64_t i = 0; i < count; i++) segments[i] = segment_of(run, lines, begin + i);
    NybbleDirectArgs args = direct_args(run), more{};
    if (run.more) {
      more = direct_args(*run.more);
      more.segment = segments + count;
      for (int64_t i = 0; i < count; i++) segments[count + i] = segment_of(*run.more, lines, begin + i);
      args.more = &more;
    }
    args.segment = segments;
    args.segments = count;
    args.tile_begin = units * part / cut.parts * kPartTiles;
    args.tile_end = std::min(units * (part + 1) / cut.parts * kPartTiles, tiles);
    if (run.call->y_range.address) args.range = reinterpret_cast<NybbleRangeArgs*>(memory + bytes);
    const int64_t from = segments[0].sample, to = segments[count - 1].sample;
    if (args.range) std::fill(args.range + from, args.range + to + 1, NybbleRangeArgs{});
    if (run.call->kernel->conv->direct(&args) != NYBBLE_OK) ok = false;
    if (args.range)
      for (int64_t sample = from; sample <= to; sample++) extend(sample, args.range[sample]);
  });
  return ok;
}

}  // namespace nybble
