#include <algorithm>
#include <cstring>
#include <mutex>

#include "conv.h"
#include "parallel.h"

namespace nybble {

namespace {

// The pixels of an axis that the window at `out` has, from `begin` to `end`.
struct Window {
  int64_t begin, end;
  Window(int64_t out, int64_t stride, int64_t pad, int64_t kernel, int64_t size)
      : begin(std::max<int64_t>(out * stride - pad, 0)), end(std::min(out * stride - pad + kernel, size)) {}
};

// Where pixels of an image lie.
struct Frame {
  int64_t pad_height, pad_width, height, width;
  Frame(const Coded& coded, int64_t image_height, int64_t image_width)
      : pad_height(coded.pad_height),
        pad_width(coded.pad_width),
        height(image_height + 2 * pad_height),
        width(image_width + 2 * pad_width) {}
  int64_t pixel(int64_t sample, int64_t y, int64_t x) const {
    return (sample * height + y + pad_height) * width + x + pad_width;
  }
};

// The ranges of y as they are before its pixels are seen: those of codes are final.
void write_ranges(const ConvCall& call) {
  if (!call.y_range.address) return;
  float* y = reinterpret_cast<float*>(call.y_range.address);
  std::memset(y, 0, static_cast<size_t>(call.shape.batch * 12));
  if (!call.x_coded) return;
  const float* x = reinterpret_cast<const float*>(call.x_range.address);
  for (int64_t sample = 0; sample < call.shape.batch; sample++) y[sample * 3 + 2] = x[sample * 3 + 2];
}

}  // namespace

void run_pool(const ConvCall& call, int threads) {
  const ConvShape& s = call.shape;
  if (!call.kernel->conv) refuse(std::string("kernel=\"") + call.kernel->name + "\": not a kernel of convolutions");
  check_pool_spans(call);
  const int dtype = call.x_dtype();
  const int64_t bytes = pixel_bytes(dtype);
  const Frame x(call.x_coded, s.height, s.width), y(call.y_coded, s.out_height, s.out_width);
  write_ranges(call);
  std::atomic<bool> ok{true};
  std::mutex mutex;
  parallel_for(s.batch * s.out_height, usable_threads(threads), [&](int64_t i) {
    const int64_t sample = i / s.out_height;
    const Window rows(i % s.out_height, s.stride_height, s.pad_height, s.kernel_height, s.height);
    NybbleRangeArgs range{};
    NybblePoolArgs args{};
    args.rows = rows.end - rows.begin;
    args.column = s.channels;
    args.row = x.width * s.channels;
    args.channels = s.channels;
    args.pool = call.pool;
    args.dtype = dtype;
    args.range = call.y_range.address && !call.y_coded ? &range : nullptr;
    args.step = s.stride_width * s.channels;
    const auto window = [&](int64_t x) { return Window(x, s.stride_width, s.pad_width, s.kernel_width, s.width); };
    for (int64_t at = 0; at < s.out_width; at += args.count) {
      const Window columns = window(at);
      args.columns = columns.end - columns.begin;
      // As many windows as are whole, or this one.
      args.count = 1;
      if (args.columns == s.kernel_width)
        while (at + args.count < s.out_width &&
               window(at + args.count).end - window(at + args.count).begin == args.columns)
          args.count++;
      args.factor = 1.0f / static_cast<float>(args.rows * args.columns);
      const int64_t from = x.pixel(sample, rows.begin, columns.begin) * s.channels;
      args.x = reinterpret_cast<const void*>(call.linear.x.address + static_cast<uintptr_t>(from * bytes));
      const int64_t to = y.pixel(sample, i % s.out_height, at) * s.channels;
      args.y = reinterpret_cast<void*>(call.linear.y.address + static_cast<uintptr_t>(to * bytes));
      if (call.kernel->conv->pool(&args) != NYBBLE_OK) ok.store(false, std::memory_order_relaxed);
    }
    if (!args.range) return;
    const std::lock_guard<std::mutex> lock(mutex);
    float* all = reinterpret_cast<float*>(call.y_range.address) + sample * 3;
    all[0] = std::min(all[0], range.low);
    all[1] = std::max(all[1], range.high);
    if (range.bad) all[2] = 1.0f;
  });
  if (!ok.load()) throw std::runtime_error("nybble: a kernel of pools rejected its arguments");
}

}  // namespace nybble
