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

}  // namespace

void run_pool(const ConvCall& call, int threads) {
  const ConvShape& s = call.shape;
  if (!call.kernel->conv) refuse(std::string("kernel=\"") + call.kernel->name + "\": not a kernel of convolutions");
  for (const int64_t size : {s.batch, s.channels, s.height, s.width, s.out_height, s.out_width, s.kernel_height,
                             s.kernel_width, s.stride_height, s.stride_width})
    if (size < 1 || size > INT32_MAX) refuse("pool: sizes must be at least 1");
  if (s.pad_height < 0 || s.pad_height >= s.kernel_height || s.pad_width < 0 || s.pad_width >= s.kernel_width ||
      (s.out_height - 1) * s.stride_height - s.pad_height >= s.height ||
      (s.out_width - 1) * s.stride_width - s.pad_width >= s.width)
    refuse("pool: a window has no pixel of the image");
  const int dtype = call.linear.x_dtype;
  const int64_t bytes = dtype_bytes(dtype);
  require("x", call.linear.x, s.batch * s.height * s.width, s.channels * bytes);
  require("y", call.linear.y, s.batch * s.positions(), s.channels * bytes);
  if (call.y_range.address) {
    require("y_range", call.y_range, s.batch * 3, 4);
    std::memset(reinterpret_cast<void*>(call.y_range.address), 0, static_cast<size_t>(s.batch * 12));
  }
  std::atomic<bool> ok{true};
  std::mutex mutex;
  parallel_for(s.batch * s.out_height, usable_threads(threads), [&](int64_t i) {
    const int64_t sample = i / s.out_height;
    const Window rows(i % s.out_height, s.stride_height, s.pad_height, s.kernel_height, s.height);
    NybbleRangeArgs range{};
    NybblePoolArgs args{};
    args.rows = rows.end - rows.begin;
    args.column = s.channels;
    args.row = s.width * s.channels;
    args.channels = s.channels;
    args.pool = call.pool;
    args.dtype = dtype;
    args.range = call.y_range.address ? &range : nullptr;
    args.step = s.stride_width * s.channels;
    const auto window = [&](int64_t x) { return Window(x, s.stride_width, s.pad_width, s.kernel_width, s.width); };
    for (int64_t x = 0; x < s.out_width; x += args.count) {
      const Window columns = window(x);
      args.columns = columns.end - columns.begin;
      // As many windows as are whole, or this one.
      args.count = 1;
      if (args.columns == s.kernel_width)
        while (x + args.count < s.out_width &&
               window(x + args.count).end - window(x + args.count).begin == args.columns)
          args.count++;
      args.factor = 1.0f / static_cast<float>(args.rows * args.columns);
      const int64_t from = ((sample * s.height + rows.begin) * s.width + columns.begin) * s.channels;
      args.x = reinterpret_cast<const void*>(call.linear.x.address + static_cast<uintptr_t>(from * bytes));
      const int64_t to = (i * s.out_width + x) * s.channels;
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
