#include "conv.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>

#include "conv_depthwise.h"
#include "conv_direct.h"
#include "pieces.h"

namespace nybble {

namespace {

// Elements of an image below which its range is found by one thread.
constexpr int64_t kRangeElements = 1 << 15;
// Bytes of outputs that are finished at a time, where weights stay in the cache
// meanwhile.
constexpr int64_t kFinishedBytes = 1 << 16;
constexpr int64_t kMostBlockRows = 64;

int64_t blocks_of(int64_t count, int64_t of) { return (count + of - 1) / of; }

// A convolution, and everything about it that its parts share.
class Convolution {
 public:
  Convolution(const ConvCall& call, int threads) : call_(call), s_(call_.shape) {
    check_conv(s_, call.linear.shape);
    if (!call.kernel->conv) refuse(std::string("kernel=\"") + call.kernel->name + "\": not a kernel of convolutions");
    if (call.linear.shape.form != Form::dense || call.linear.shape.ordered)
      refuse("weight: must not be sparse, nor have an order of its own");
    LinearCall& linear = call_.linear;
    linear.rows = s_.batch * s_.positions();
    linear = resolved(linear);
    if (call_.x_coded) linear.given = {call_.x_coded.scale, call_.x_coded.zero};
    if (linear.kernel->block_rows > kMostBlockRows) refuse("kernel: multiplies too many rows at a time");
    check_spans(call_);
    const bool small = linear.shape.n * linear.shape.k <= kSerialProducts / std::max<int64_t>(linear.rows, 1);
    workers_ = small ? 1 : usable_threads(threads);
    codes_ = linear.kernel->int_activations();
    direct_ = runs_direct(call_);
    each_channel_ = !direct_ && codes_ && !linear.shape.by_group() && s_.groups == s_.channels &&
                    linear.shape.n == s_.channels && linear.shape.k <= NYBBLE_MOST_TAPS;
    format_ = each_channel_ ? NYBBLE_PANEL_S8 : linear.kernel->panel;
    element_ = nybble_panel_element(format_);
    panel_row_ = nybble_panel_row(linear.kernel->panel, linear.shape.k_padded());
    frame_width_ = call.x_coded ? s_.width + 2 * call.x_coded.pad_width : s_.frame_width();
    set_runs();
    if (call.more) {
      check_more(call_);
      more_ = std::make_shared<Convolution>(*call.more, threads);
    }
    if (each_channel_) tables_->taps = depthwise_taps(call_.linear);
  }

  int workers() const { return workers_; }

  // Bytes of memory that a run needs.
  int64_t bytes() {
    int64_t most = 0;
    each_chunk([&] { most = std::max(most, carve(nullptr)); });
    return most + (more_ ? more_->bytes() : 0);
  }

  // Every thread of a team runs a copy. base: so many bytes for all of them.
  void run(Team& team, uint8_t* base) {
    if (call_.y_range.address)
      team.each(1, [&](int64_t) {
        std::memset(reinterpret_cast<void*>(call_.y_range.address), 0, static_cast<size_t>(s_.batch * 12));
      });
    if (more_) more_ = std::make_shared<Convolution>(*more_);  // of this thread
    each_chunk([&] {
      const int64_t held = carve(base);
      if (more_) more_->plan_all(team, base + held);
      run_chunk(team);
    });
  }

  void check() const {
    if (!shared_->ok.load())
      throw std::runtime_error("nybble::conv: a kernel rejected its arguments, or ran out of memory");
  }

 private:
  struct Tables {
    std::vector<int64_t> offsets;  // of the runs of a patch
    std::vector<float> taps;       // [K][channels], if each_channel_
  };
  struct Shared {
    std::mutex mutex;
    std::atomic<bool> ok{true};
  };
  // Memory of a chunk of samples.
  struct Held {
    uint8_t* frames;
    NybbleRangeArgs* ranges;  // [samples][parts]
    NybbleRounding* how;      // [samples]
    float* act_scale;         // [rows], and for each group of the weights
                              // [rows][groups] sums
    int32_t *act_zero, *act_sum;
    uint8_t* panel;
  };

  // The runs of a patch, as offsets from its first pixel.
  void set_runs() {
    run_ = run_of(s_);
    const bool joined = run_ > s_.group_channels();
    for (int64_t y = 0; y < s_.kernel_height; y++)
      for (int64_t x = 0; x < (joined ? 1 : s_.kernel_width); x++)
        tables_->offsets.push_back((y * s_.dilation_height * frame_width_ + x * s_.dilation_width) * s_.channels *
                                   element_);
  }

  int64_t runs() const { return static_cast<int64_t>(tables_->offsets.size()); }

  // The arguments of a kernel for a chunk of rows.
  NybbleLinearArgs args_of(const Chunk& chunk) const {
    NybbleLinearArgs args = linear_args(call_.linear, chunk);
    if (call_.scale.address) args.scale = reinterpret_cast<const void*>(call_.scale.address);
    return args;
  }

  // 0 if x is given as a frame.
  int64_t frame_bytes() const {
    if (call_.x_coded) return 0;
    return s_.frame_height() * s_.frame_width() * s_.channels * element_;
  }

  // Calls fn() for chunks of samples: as many as have rows enough for the weights to be worth reading, and whose codes
  // stay in the cache.
  template <class Fn>
  void each_chunk(const Fn& fn) {
    const int64_t frame = frame_bytes(), most = frame ? std::max<int64_t>(caches().l2 / frame, 1) : s_.batch;
    WeightShape one = call_.linear.shape;
    one.n /= s_.groups;
    for (first_ = 0; first_ < s_.batch; first_ += samples_) {
      samples_ = blocks_of(s_.batch - first_, blocks_of(s_.batch - first_, most));
      rows_ = samples_ * s_.positions();
      cut_ = cut_for(product_of(*call_.linear.kernel, one, rows_, workers_), caches());
      parts_ = std::clamp<int64_t>(s_.channels * s_.height * s_.width / kRangeElements, 1, 4 * workers_);
      fn();
    }
  }

  void run_chunk(Team& team) {
    if (codes_) find_ranges(team);
    if (!call_.x_coded)
      team.each(samples_ * s_.frame_height(),
                [&](int64_t i) { write_row(i / s_.frame_height(), i % s_.frame_height()); });
    if (direct_) return multiply_in_place(team);
    if (each_channel_) return multiply_channels(team);
    for (int64_t row = 0; row < rows_; row += cut_.chunk_rows)
      for (int64_t g = 0; g < s_.groups; g++) multiply(team, row, std::min(cut_.chunk_rows, rows_ - row), g);
  }

  // How the samples of codes, which are one chunk, are rounded.
  void plan_all(Team& team, uint8_t* base) {
    each_chunk([&] {
      carve(base);
      find_ranges(team);
    });
    first_ = 0;
  }

  // The memory of a chunk from `base` on; returns its bytes.
  int64_t carve(uint8_t* base) {
    int64_t at = 0;
    const auto take = [&](int64_t bytes) {
      uint8_t* here = base ? base + at : nullptr;
      at += round_up(bytes, 64);
      return here;
    };
    held_.frames = take(samples_ * frame_bytes() + 64);
    held_.ranges =
        reinterpret_cast<NybbleRangeArgs*>(take(samples_ * parts_ * static_cast<int64_t>(sizeof(NybbleRangeArgs))));
    held_.how = reinterpret_cast<NybbleRounding*>(take(samples_ * static_cast<int64_t>(sizeof(NybbleRounding))));
    held_.act_scale = reinterpret_cast<float*>(take(cut_.chunk_rows * 4));
    held_.act_zero = reinterpret_cast<int32_t*>(take(cut_.chunk_rows * 4));
    held_.act_sum = reinterpret_cast<int32_t*>(take(cut_.chunk_rows * 4 * call_.linear.shape.groups()));
    held_.panel = take(cut_.tile_parts == 1 ? 0 : cut_.chunk_rows * panel_row_);
    return at;
  }

  const uint8_t* x_at(int64_t sample, int64_t element) const {
    const int64_t all = s_.channels * s_.height * s_.width;
    return reinterpret_cast<const uint8_t*>(call_.linear.x.address) +
           ((first_ + sample) * all + element) * dtype_bytes(call_.linear.x_dtype);
  }

  // The ranges of the samples, and how they are rounded.
  void find_ranges(Team& team) {
    const int64_t all = s_.channels * s_.height * s_.width;
    if (!call_.x_range.address && !call_.x_coded)
      team.each(samples_ * parts_, [&](int64_t i) {
        const int64_t sample = i / parts_, part = i % parts_, begin = all * part / parts_;
        NybbleRangeArgs& range = held_.ranges[i];
        range = {x_at(sample, begin), call_.linear.x_dtype, 0, all * (part + 1) / parts_ - begin, 0.0f, 0.0f};
        note(call_.kernel->conv->range(&range));
      });
    team.each(samples_, [&](int64_t sample) { plan(sample, range_of(sample)); });
  }

  NybbleRangeArgs range_of(int64_t sample) const {
    NybbleRangeArgs all{};
    if (call_.x_coded && !call_.x_range.address) return all;
    if (call_.x_range.address) {
      const float* given = reinterpret_cast<const float*>(call_.x_range.address) + (first_ + sample) * 3;
      all.low = given[0];
      all.high = given[1];
      all.bad = given[2] != 0.0f;
      return all;
    }
    for (int64_t part = 0; part < parts_; part++) {
      const NybbleRangeArgs& one = held_.ranges[sample * parts_ + part];
      all.low = std::min(all.low, one.low);
      all.high = std::max(all.high, one.high);
      all.bad |= one.bad;
    }
    return all;
  }

  void plan(int64_t sample, const NybbleRangeArgs& range) {
    const int steps = call_.linear.act_steps;
    const Given& given = call_.linear.given;
    NybbleRounding& how = held_.how[sample];
    if (call_.linear.static_activations && !range.bad)
      how = {given.scale, 1.0f, 1.0f / given.scale, given.zero, steps, 0, 1};
    else
      call_.kernel->conv->plan(&range, steps, &how);
  }

  DirectRun direct_run() const {
    const Coded& coded = call_.x_coded;
    const int64_t row = frame_width_ * s_.channels;
    DirectRun run{&call_, args_of(Chunk{}), held_.frames, row,      frame_bytes(), tables_->offsets.data(), runs(),
                  run_,   held_.how,        first_,       samples_, workers_};
    if (coded) {
      run.sample_bytes = (s_.height + 2 * coded.pad_height) * row;
      run.x = reinterpret_cast<const uint8_t*>(call_.linear.x.address) + first_ * run.sample_bytes +
              (coded.pad_height - s_.pad_height) * row + (coded.pad_width - s_.pad_width) * s_.channels;
    }
    return run;
  }

  // All outputs of a chunk of samples, from patches where they lie.
  void multiply_in_place(Team& team) {
    DirectRun run = direct_run(), more{};
    if (more_) {
      more = more_->direct_run();
      run.more = &more;
    }
    if (!run_direct(run, team, [&](int64_t sample, const NybbleRangeArgs& range) { extend(sample, range); }))
      note(NYBBLE_UNSUPPORTED);
  }

  // Extends the range of a sample of y; several threads may do so at a time.
  void extend(int64_t sample, const NybbleRangeArgs& by) {
    const std::lock_guard<std::mutex> lock(shared_->mutex);
    float* range = reinterpret_cast<float*>(call_.y_range.address) + (first_ + sample) * 3;
    range[0] = std::min(range[0], by.low);
    range[1] = std::max(range[1], by.high);
    if (by.bad) range[2] = 1.0f;
  }

  // All rows of the outputs of a chunk of samples, a few at a time.
  void multiply_channels(Team& team) {
    const int64_t step = std::clamp<int64_t>(kFinishedBytes / (s_.out_width * s_.channels * 4), 1, s_.out_height);
    const int64_t parts = blocks_of(s_.out_height, step);
    team.each(samples_ * parts, [&](int64_t i) {
      const int64_t begin = i % parts * step, end = std::min(begin + step, s_.out_height);
      for (int64_t y = begin; y < end; y++) multiply_row(i / parts, y);
    });
  }

  // Row y of the output of a sample.
  void multiply_row(int64_t sample, int64_t y) {
    const int64_t row = s_.frame_width() * s_.channels, first = sample * s_.positions() + y * s_.out_width;
    const DepthwiseRun run{&call_, args_of(Chunk{}), tables_->offsets.data(), tables_->taps.data(), held_.how[sample]};
    const uint8_t* x = held_.frames + sample * frame_bytes() + y * s_.stride_height * row;
    const float* sums = run_depthwise(run, x);
    if (!sums) return note(NYBBLE_UNSUPPORTED);
    const int64_t stride = call_.linear.shape.tiles() * NYBBLE_TILE_N;
    finish_rows(sums, stride, first, first + s_.out_width, 0, s_.channels);
  }

  // What a panel holds in place of the number 0, in pixels from `to` on.
  void write_zeros(const NybbleRounding& how, int64_t pixels, uint8_t* to) const {
    const int64_t count = pixels * s_.channels;
    if (format_ == NYBBLE_PANEL_S16) {
      std::fill_n(reinterpret_cast<int16_t*>(to), count, static_cast<int16_t>(how.zero));
      return;
    }
    const int code = codes_ ? how.zero + (format_ == NYBBLE_PANEL_U8 ? 128 : format_ == NYBBLE_PANEL_U7 ? 64 : 0) : 0;
    std::memset(to, code, static_cast<size_t>(count * element_));
  }

  // Row y of a sample's frame.
  void write_row(int64_t sample, int64_t y) {
    const NybbleRounding how = codes_ ? held_.how[sample] : NybbleRounding{};
    const int64_t width = s_.frame_width(), pixel = s_.channels * element_, row = y - s_.pad_height;
    uint8_t* to = held_.frames + (sample * s_.frame_height() + y) * width * pixel;
    const int64_t left = std::min(s_.pad_width, width);
    const int64_t inside = row < 0 || row >= s_.height || how.empty ? 0 : std::min(s_.width, width - left);
    if (inside <= 0) return write_zeros(how, width, to);
    write_zeros(how, left, to);
    const int64_t from = row * s_.width * (call_.x_last ? s_.channels : 1);
    const NybblePixelsArgs args{x_at(sample, from),
                                call_.linear.x_dtype,
                                format_,
                                s_.channels,
                                inside,
                                call_.x_last ? 1 : s_.height * s_.width,
                                how,
                                to + left * pixel};
    note(call_.kernel->conv->pixels(&args));
    write_zeros(how, width - left - inside, to + (left + inside) * pixel);
  }

  // The rows [row, row + rows) of the chunk with the weights of a group.
  void multiply(Team& team, int64_t row, int64_t rows, int64_t g) {
    const int64_t blocks = blocks_of(rows, cut_.block_rows);
    if (cut_.tile_parts > 1) {
      team.each(blocks,
                [&](int64_t block) { fill(row, rows, g, block, held_.panel + block * cut_.block_rows * panel_row_); });
      team.each(cut_.tile_parts * cut_.block_parts, [&](int64_t part) {
        const int64_t t = part / cut_.block_parts, b = part % cut_.block_parts;
        piece(row, rows, g, blocks * b / cut_.block_parts, blocks * (b + 1) / cut_.block_parts, t, nullptr);
      });
      return;
    }
    team.each(cut_.block_parts, [&](int64_t b) {
      thread_local Scratch scratch;
      const int64_t begin = blocks * b / cut_.block_parts, end = blocks * (b + 1) / cut_.block_parts;
      if (begin == end) return;
      // The panel of the whole piece: passes of columns read it again.
      const int64_t bytes = (end - begin) * cut_.block_rows * panel_row_;
      uint8_t* panel = scratch.try_reserve(static_cast<size_t>(bytes));
      if (!panel) return note(NYBBLE_UNSUPPORTED);
      for (int64_t block = begin; block < end; block++)
        fill(row, rows, g, block, panel + (block - begin) * cut_.block_rows * panel_row_);
      piece(row, rows, g, begin, end, 0, panel);
    });
  }

  // Packs a row block, and notes the scales of its rows.
  void fill(int64_t row, int64_t rows, int64_t g, int64_t block, uint8_t* panel) {
    thread_local Scratch scratch;
    const WeightShape& shape = call_.linear.shape;
    const uint8_t* at[kMostBlockRows];
    const int64_t first = block * cut_.block_rows, count = std::min(cut_.block_rows, rows - first);
    for (int64_t r = 0; r < count; r++) {
      const int64_t all = row + first + r, sample = all / s_.positions(), position = all % s_.positions();
      const int64_t y = position / s_.out_width * s_.stride_height, x = position % s_.out_width * s_.stride_width;
      at[r] = held_.frames + sample * frame_bytes() +
              ((y * s_.frame_width() + x) * s_.channels + g * s_.group_channels()) * element_;
      held_.act_scale[first + r] = codes_ ? held_.how[sample].scale : 1.0f;
      held_.act_zero[first + r] = codes_ ? held_.how[sample].zero : 0;
    }
    NybbleFillArgs args{};
    args.row = at;
    args.offset = tables_->offsets.data();
    args.rows = count;
    args.runs = runs();
    args.run = run_;
    args.k_padded = shape.k_padded();
    args.panel_format = call_.linear.kernel->panel;
    args.sum_factor = sum_factor(shape);
    args.group = shape.group();
    args.groups = shape.groups();
    args.act_sum = codes_ && shape.by_group() ? held_.act_sum + first * args.groups : nullptr;
    args.panel = panel;
    args.scratch = scratch.try_reserve(static_cast<size_t>(4 * panel_row_ + 16));
    note(args.scratch ? call_.kernel->conv->fill(&args) : NYBBLE_UNSUPPORTED);
  }

  // The row blocks [begin, end) times the columns of part t of a group; panel:
  // that of block `begin`, or null for the shared one.
  void piece(int64_t row, int64_t rows, int64_t g, int64_t begin, int64_t end, int64_t t, const uint8_t* panel) {
    const int64_t n = call_.linear.shape.n / s_.groups, tiles = blocks_of(n, NYBBLE_TILE_N);
    // Columns of this piece in the group. Those of other groups that share its
    // tiles are computed and left.
    const int64_t from = g * n + tiles * t / cut_.tile_parts * NYBBLE_TILE_N;
    const int64_t to = g * n + std::min(n, tiles * (t + 1) / cut_.tile_parts * NYBBLE_TILE_N);
    if (from >= to || begin == end) return;
    NybbleLinearArgs args = args_of(
        Chunk{first_ * s_.positions() + row, rows, cut_, held_.panel, held_.act_scale, held_.act_zero, held_.act_sum});
    if (panel)
      args.panel = reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(panel) -
                                                 static_cast<uintptr_t>(begin * cut_.block_rows * panel_row_));
    args.tile_begin = from / NYBBLE_TILE_N;
    args.tile_end = blocks_of(to, NYBBLE_TILE_N);
    args.block_begin = begin;
    args.block_end = end;
    if (is_plain()) return note(run_piece(call_.linear, cut_, args) ? NYBBLE_OK : NYBBLE_UNSUPPORTED);
    finish_piece(args, row, from, to);
  }

  // Whether the kernel may write y itself.
  bool is_plain() const {
    return call_.y_last && s_.groups == 1 && !call_.residual.address && call_.act == NYBBLE_ACT_IDENTITY &&
           !call_.y_range.address && call_.most == std::numeric_limits<float>::infinity();
  }

  // Multiplies into scratch memory, a few row blocks at a time, and finishes
  // columns [from, to).
  void finish_piece(NybbleLinearArgs args, int64_t row, int64_t from, int64_t to) {
    thread_local Scratch scratch;
    const int64_t end = args.block_end, columns = (args.tile_end - args.tile_begin) * NYBBLE_TILE_N;
    const int64_t step = cut_.tile_parts > 1 ? end - args.block_begin
                                             : std::max<int64_t>(kFinishedBytes / (columns * 4 * cut_.block_rows), 2);
    const int64_t held = std::min(step, end - args.block_begin) * cut_.block_rows;
    uint8_t* base = scratch.try_reserve(static_cast<size_t>(held * args.n * 4));
    if (!base) return note(NYBBLE_UNSUPPORTED);
    if (args.y_dtype != NYBBLE_S32) args.y_dtype = NYBBLE_F32;
    for (int64_t block = args.block_begin; block < end; block += step) {
      args.block_begin = block;
      args.block_end = std::min(block + step, end);
      const int64_t first = block * cut_.block_rows, last = std::min(args.block_end * cut_.block_rows, args.rows);
      args.y = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(base) - static_cast<uintptr_t>(first * args.n * 4));
      if (!run_piece(call_.linear, cut_, args)) return note(NYBBLE_UNSUPPORTED);
      finish_rows(reinterpret_cast<const float*>(base), args.n, row + first, row + last, from, to);
    }
  }

  // Rows [begin, end) of the chunk, `stride` apart from x on, sample by sample.
  void finish_rows(const float* x, int64_t stride, int64_t begin, int64_t end, int64_t from, int64_t to) {
    const int64_t n = call_.linear.shape.n, plane = s_.positions();
    const int64_t bytes = dtype_bytes(call_.linear.y_dtype);
    for (int64_t row = begin; row < end;) {
      const int64_t sample = row / plane, position = row % plane, rows = std::min(plane - position, end - row);
      const int64_t row_step = call_.y_last ? n : 1, column_step = call_.y_last ? 1 : plane;
      const int64_t at = ((first_ + sample) * plane * n + position * row_step + from * column_step) * bytes;
      const uintptr_t residual = call_.residual.address;
      NybbleRangeArgs range{};
      const NybbleFinishArgs args{
          x + (row - begin) * stride + from,
          stride,
          rows,
          to - from,
          row_step,
          column_step,
          residual ? reinterpret_cast<const void*>(residual + static_cast<uintptr_t>(at)) : nullptr,
          reinterpret_cast<void*>(call_.linear.y.address + static_cast<uintptr_t>(at)),
          call_.linear.y_dtype,
          call_.act,
          call_.most,
          call_.y_range.address ? &range : nullptr};
      note(call_.kernel->conv->finish(&args));
      if (args.range) extend(sample, range);
      row += rows;
    }
  }

  void note(NybbleStatus status) {
    if (status != NYBBLE_OK) shared_->ok.store(false, std::memory_order_relaxed);
  }

  ConvCall call_;
  ConvShape s_;
  int workers_ = 1;
  bool codes_ = false;
  bool each_channel_ = false;  // depthwise: each has a weight of its own
  bool direct_ = false;        // patches are read where they lie
  int format_ = 0;             // of the frames
  int64_t element_ = 0, panel_row_ = 0, run_ = 0, frame_width_ = 0;
  std::shared_ptr<Tables> tables_ = std::make_shared<Tables>();
  int64_t first_ = 0, samples_ = 0, rows_ = 0, parts_ = 1;  // of the chunk
  Cut cut_{};
  Held held_{};
  std::shared_ptr<Shared> shared_ = std::make_shared<Shared>();
  std::shared_ptr<Convolution> more_;
};

}  // namespace

void run_convs(const std::vector<const ConvCall*>& calls, int threads) {
  thread_local Scratch scratch;
  std::vector<Convolution> all;
  int64_t bytes = 0;
  int workers = 1;
  for (const ConvCall* call : calls) {
    all.emplace_back(*call, threads);
    bytes = std::max(bytes, all.back().bytes());
    workers = std::max(workers, all.back().workers());
  }
  uint8_t* base = scratch.reserve(static_cast<size_t>(bytes));
  run_team(workers, [&](Team& team) {
    for (const Convolution& one : all) Convolution(one).run(team, base);
  });
  for (const Convolution& one : all) one.check();
}

}  // namespace nybble
