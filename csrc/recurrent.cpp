#include "recurrent.h"

#include <algorithm>
#include <cstring>

namespace nybble {

namespace {

// Rows of a chunk of steps: those whose products with the input are computed at once. Float kernels add in another
// order for few rows, so it depends on nothing.
constexpr int64_t kChunkRows = 256;
// Fewest multiply-adds of a step that threads share; below, a direction runs on one thread. On 2 cores of Zen 5, a step
// of an LSTM of 512 units takes 12.0 us on one thread and 6.8 on two; of 256 units, 3.3 and 4.0.
constexpr int64_t kSharedProducts = 1 << 19;

// Consecutive steps.
struct Steps {
  int64_t begin, end;
};

// The product with the state for a number of rows.
struct Product {
  LinearCall call;
  Cut cut;
};

void check(const RecurrentCall& call) {
  if (!call.rows->rows) refuse(std::string("rows=\"") + call.rows->name + "\": not row kernels");
  if (call.dtype == NYBBLE_S32) refuse("dtype: must be a float");
  if (call.directions.empty() || call.directions.size() > 2) refuse("directions: must be 1 or 2");
  const int64_t units = call.units(), columns = call.gates() * units, inputs = call.directions[0].input.shape.k;
  const int64_t directions = static_cast<int64_t>(call.directions.size());
  for (const RecurrentDirection& each : call.directions) {
    const bool input = call.multiplied()
                           ? !each.input.kernel
                           : each.input.kernel && each.input.shape.n == columns && each.input.shape.k == inputs;
    if (!input || each.hidden.shape.n != columns || each.hidden.shape.k != units)
      refuse("directions: the weights must be (" + std::to_string(columns) + ", inputs), or none, and (" +
             std::to_string(columns) + ", " + std::to_string(units) + "), alike for both");
  }
  if (call.sizes.empty()) refuse("sizes: must be at least one step");
  int64_t rows = 0;
  for (size_t i = 0; i < call.sizes.size(); i++) {
    const int64_t most = call.sizes[i ? i - 1 : 0], least = most ? 1 : 0;
    if (call.sizes[i] < least || call.sizes[i] > most)
      refuse("sizes[" + std::to_string(i) + "]=" + std::to_string(call.sizes[i]) + ": must be in [" +
             std::to_string(least) + ", the size of the step before]");
    if (__builtin_add_overflow(rows, call.sizes[i], &rows) || rows > int64_t{1} << 40) refuse("sizes: too many rows");
  }
  const int64_t wide = directions * units, first = call.sizes[0];
  if (call.multiplied())
    require("x", call.x, strided_extent(rows, call.stride, directions * columns), 4);
  else
    require("x", call.x, strided_extent(rows, call.stride, inputs), dtype_bytes(call.dtype));
  require("y", call.y, rows * wide, dtype_bytes(call.dtype));
  require("h", call.h, first * wide, dtype_bytes(call.dtype));
  if (!call.gru) require("c", call.c, first * wide, 4);
}

// A direction as it runs. Its states alternate between two buffers: a thread may still read the one before while
// another already writes.
class Lane {
 public:
  Lane(const RecurrentCall& call, size_t index, const std::vector<int64_t>& offsets, int threads)
      : call_(call), index_(index), offsets_(offsets), input_(call.directions[index].input) {
    input_.x_dtype = call.dtype;
    input_.y_dtype = NYBBLE_F32;
    input_.stride = call.stride;
    for (const int64_t rows : call.sizes) {
      if (rows == 0 || (!products_.empty() && products_.back().call.rows == rows)) continue;
      LinearCall one = call.directions[index].hidden;
      one.x_dtype = call.dtype;
      one.y_dtype = NYBBLE_F32;
      one.rows = rows;
      one.stride = units();
      Product product{resolved(one), {}};
      product.cut = cut_for(product_of(*product.call.kernel, product.call.shape, rows, threads), caches());
      product.cut.chunk_rows = rows;
      panel_bytes_ = std::max(panel_bytes_, chunk_bytes(product.call, rows));
      products_.push_back(product);
    }
  }

  bool backwards() const { return index_ == 1; }
  int64_t panel_bytes() const { return panel_bytes_; }
  int64_t scratch_bytes(int64_t chunk_rows) const {
    return 2 * state_bytes() + round_up((chunk_rows + rows()) * columns() * 4, 64);
  }
  const WeightShape& shape() const { return products_[0].call.shape; }

  void start(uint8_t* scratch, int64_t chunk_rows) {
    const uintptr_t h = call_.h.address + index_ * rows() * units() * dtype_bytes(call_.dtype);
    for (int i = 0; i < 2; i++) {
      state_[i] = scratch + i * state_bytes();
      std::memcpy(state_[i], reinterpret_cast<const void*>(h), rows() * units() * dtype_bytes(call_.dtype));
    }
    from_input_ = reinterpret_cast<float*>(scratch + 2 * state_bytes());
    from_state_ = from_input_ + chunk_rows * columns();
  }

  // The products with the inputs of some steps.
  void multiply_inputs(const Steps& steps, int threads) {
    steps_ = steps;
    if (call_.multiplied()) return;
    LinearCall call = input_;
    const int64_t row = offsets_[steps.begin], bytes = dtype_bytes(call_.dtype);
    call.rows = offsets_[steps.end] - row;
    call.x = {call_.x.address + row * call_.stride * bytes, call_.x.bytes - row * call_.stride * bytes};
    call.y = {reinterpret_cast<uintptr_t>(from_input_), static_cast<size_t>(call.rows * columns() * 4)};
    run_linear(call, threads);
  }

  int64_t count() const { return steps_.end - steps_.begin; }

  // Packs the state before the i-th step of this chunk.
  bool prepare(int64_t i, uint8_t* panel) const {
    const Product& product = product_of_step(i);
    const Chunk chunk = carve(product.call, 0, product.cut, panel);
    NybblePrepareArgs args = prepare_args(product.call, chunk);
    args.x = before(i);
    args.block_end = (chunk.rows + product.cut.block_rows - 1) / product.cut.block_rows;
    return product.call.prepare->prepare(&args) == NYBBLE_OK;
  }

  // The product with the packed state for some tiles.
  bool multiply(int64_t i, uint8_t* panel, int64_t tile_begin, int64_t tile_end) const {
    const Product& product = product_of_step(i);
    const Chunk chunk = carve(product.call, 0, product.cut, panel);
    LinearCall call = product.call;
    call.y.address = reinterpret_cast<uintptr_t>(from_state_);
    NybbleLinearArgs args = linear_args(call, chunk);
    args.block_end = (chunk.rows + product.cut.block_rows - 1) / product.cut.block_rows;
    args.tile_begin = tile_begin;
    args.tile_end = tile_end;
    return run_piece(call, product.cut, args);
  }

  // The cells of some units.
  bool finish(int64_t i, int64_t begin, int64_t end) const {
    const int64_t step = step_of(i), wide = static_cast<int64_t>(call_.directions.size()) * units();
    const NybbleMatrix cells{reinterpret_cast<float*>(call_.c.address) + index_ * rows() * units(), units()};
    const NybbleMatrix out{reinterpret_cast<void*>(call_.y.address), wide};
    const NybbleGatesArgs args{call_.dtype,
                               call_.sizes[step],
                               units(),
                               begin,
                               end,
                               inputs(step),
                               {from_state_, columns()},
                               call_.gru ? NybbleMatrix{} : cells,
                               {before(i), units()},
                               {state_[(done_ + i + 1) & 1], units()},
                               part_of(out, offsets_[step], static_cast<int64_t>(index_) * units(), call_.dtype)};
    const auto cell = call_.gru ? call_.rows->rows->gru : call_.rows->rows->lstm;
    return cell(&args) == NYBBLE_OK;
  }

  void end_chunk() { done_ += count(); }

  // Writes the last state of each sequence.
  void end() const {
    const int64_t bytes = units() * dtype_bytes(call_.dtype);
    uint8_t* h = reinterpret_cast<uint8_t*>(call_.h.address) + index_ * rows() * bytes;
    int64_t steps = static_cast<int64_t>(call_.sizes.size());
    for (int64_t row = 0; row < rows(); row++) {
      while (!backwards() && steps > 0 && call_.sizes[steps - 1] <= row) steps--;
      std::memcpy(h + row * bytes, state_[steps & 1] + row * bytes, bytes);
    }
  }

 private:
  int64_t rows() const { return call_.sizes[0]; }
  int64_t units() const { return call_.units(); }
  int64_t columns() const { return call_.gates() * units(); }
  int64_t state_bytes() const { return round_up(rows() * units() * dtype_bytes(call_.dtype), 64); }
  int64_t step_of(int64_t i) const { return backwards() ? steps_.end - 1 - i : steps_.begin + i; }
  NybbleMatrix inputs(int64_t step) const {
    if (!call_.multiplied()) return {from_input_ + (offsets_[step] - offsets_[steps_.begin]) * columns(), columns()};
    float* x = reinterpret_cast<float*>(call_.x.address);
    return {x + offsets_[step] * call_.stride + static_cast<int64_t>(index_) * columns(), call_.stride};
  }
  uint8_t* before(int64_t i) const { return state_[(done_ + i) & 1]; }
  const Product& product_of_step(int64_t i) const {
    const int64_t rows = call_.sizes[step_of(i)];
    return *std::partition_point(products_.begin(), products_.end(),
                                 [&](const Product& each) { return each.call.rows > rows; });
  }

  const RecurrentCall& call_;
  size_t index_;
  const std::vector<int64_t>& offsets_;
  LinearCall input_;
  std::vector<Product> products_;  // with fewer and fewer rows
  int64_t panel_bytes_ = 0, done_ = 0;
  Steps steps_{0, 0};
  uint8_t* state_[2] = {nullptr, nullptr};
  float *from_input_ = nullptr, *from_state_ = nullptr;
};

// Whole steps of at most kChunkRows rows together, or one.
std::vector<Steps> chunks_of(const std::vector<int64_t>& sizes, const std::vector<int64_t>& offsets) {
  std::vector<Steps> chunks;
  const int64_t steps = static_cast<int64_t>(sizes.size());
  for (int64_t begin = 0, end = 0; begin < steps; begin = end) {
    end = begin + 1;
    while (end < steps && offsets[end + 1] - offsets[begin] <= kChunkRows) end++;
    chunks.push_back({begin, end});
  }
  return chunks;
}

// A thread of the team that runs the steps of a chunk, with a panel of its own.
class Worker {
 public:
  Worker(std::vector<Lane>& lanes, int64_t slices, Team& team)
      : lanes_(lanes), slices_(slices), shape_(lanes[0].shape()), team_(team) {
    thread_local Scratch memory;
    int64_t bytes = 0;
    for (const Lane& lane : lanes) bytes = std::max(bytes, lane.panel_bytes());
    panel_ = memory.try_reserve(static_cast<size_t>(bytes));
    ok_ = panel_ != nullptr;
  }

  // False if a kernel refuses its arguments or no memory is left. One slice: a direction runs on one thread.
  bool run() {
    if (slices_ > 1) {
      run_sliced();
      return ok_;
    }
    team_.each(static_cast<int64_t>(lanes_.size()), [&](int64_t index) {
      const Lane& lane = lanes_[static_cast<size_t>(index)];
      for (int64_t i = 0; i < lane.count() && ok_; i++)
        ok_ = lane.prepare(i, panel_) && lane.multiply(i, panel_, 0, shape_.tiles()) && lane.finish(i, 0, shape_.k);
    });
    return ok_;
  }

 private:
  // Where the columns of 16 units are whole tiles of each gate, a thread finishes the units that it multiplied.
  // Otherwise all threads wait for the products of a step.
  void run_sliced() {
    const bool aligned = shape_.k % NYBBLE_TILE_N == 0 && shape_.strip() == 1 && shape_.form != Form::gather;
    const int64_t units = aligned ? NYBBLE_TILE_N : 1, strips = shape_.tiles() / shape_.strip();
    const int64_t tiles = shape_.k / NYBBLE_TILE_N, gates = shape_.n / shape_.k;
    int64_t steps = 0;
    for (const Lane& lane : lanes_) steps = std::max(steps, lane.count());
    for (int64_t i = 0; i < steps; i++) {
      if (!aligned)
        each_slice(i, [&](const Lane& lane, int64_t slice) {
          return lane.multiply(i, panel_, part(strips, slice) * shape_.strip(),
                               part(strips, slice + 1) * shape_.strip());
        });
      each_slice(i, [&](const Lane& lane, int64_t slice) {
        const int64_t begin = part(shape_.k / units, slice), end = part(shape_.k / units, slice + 1);
        for (int64_t gate = 0; gate < gates && aligned; gate++)
          if (!lane.multiply(i, panel_, gate * tiles + begin, gate * tiles + end)) return false;
        return lane.finish(i, begin * units, end * units);
      });
    }
  }

  int64_t part(int64_t of, int64_t slice) const { return of * slice / slices_; }

  // Runs fn for the slices of a step of every direction. The panel then has the state before the step.
  template <class Fn>
  void each_slice(int64_t i, const Fn& fn) {
    team_.each(static_cast<int64_t>(lanes_.size()) * slices_, [&](int64_t item) {
      const Lane& lane = lanes_[static_cast<size_t>(item / slices_)];
      if (i >= lane.count() || !ok_) return;
      const int64_t state = i * static_cast<int64_t>(lanes_.size()) + item / slices_;
      if (packed_ != state) ok_ = lane.prepare(i, panel_);
      packed_ = state;
      ok_ = ok_ && fn(lane, item % slices_);
    });
  }

  std::vector<Lane>& lanes_;
  int64_t slices_;
  const WeightShape& shape_;
  Team& team_;
  uint8_t* panel_;
  int64_t packed_ = -1;  // the step and direction whose state the panel has
  bool ok_;
};

// How many threads run the steps, and in how many slices each direction.
struct Split {
  int workers;
  int64_t slices;
};

Split split_of(const RecurrentCall& call, int threads) {
  const int64_t products = call.sizes[0] * call.gates() * call.units() * call.units();
  const int lanes = static_cast<int>(call.directions.size()), workers = usable_threads(threads);
  if (workers > lanes && products >= kSharedProducts) return {workers, (workers + lanes - 1) / lanes};
  const bool small = products <= kSerialProducts / static_cast<int64_t>(call.sizes.size());
  return {small ? 1 : std::min(workers, lanes), 1};
}

}  // namespace

void run_recurrent(const RecurrentCall& call, int threads) {
  check(call);
  if (call.sizes[0] == 0) return;
  std::vector<int64_t> offsets(1, 0);
  for (const int64_t rows : call.sizes) offsets.push_back(offsets.back() + rows);
  const std::vector<Steps> chunks = call.multiplied() ? std::vector<Steps>{{0, static_cast<int64_t>(call.sizes.size())}}
                                                      : chunks_of(call.sizes, offsets);
  int64_t chunk_rows = 0;
  for (const Steps& steps : chunks) chunk_rows = std::max(chunk_rows, offsets[steps.end] - offsets[steps.begin]);
  if (call.multiplied()) chunk_rows = 0;  // nothing to keep
  const Split split = split_of(call, threads);
  std::vector<Lane> lanes;
  for (size_t i = 0; i < call.directions.size(); i++) lanes.emplace_back(call, i, offsets, split.workers);
  thread_local Scratch memory;
  const int64_t bytes = lanes[0].scratch_bytes(chunk_rows);
  uint8_t* base = memory.reserve(static_cast<size_t>(bytes) * lanes.size());
  for (size_t i = 0; i < lanes.size(); i++) lanes[i].start(base + static_cast<int64_t>(i) * bytes, chunk_rows);
  std::atomic<bool> ok{true};
  for (size_t i = 0; i < chunks.size(); i++) {
    for (Lane& lane : lanes) lane.multiply_inputs(chunks[lane.backwards() ? chunks.size() - 1 - i : i], threads);
    run_team(split.workers, [&](Team& team) {
      Worker worker(lanes, split.slices, team);
      if (!worker.run()) ok.store(false, std::memory_order_relaxed);
    });
    for (Lane& lane : lanes) lane.end_chunk();
  }
  for (const Lane& lane : lanes) lane.end();
  if (!ok.load()) throw std::runtime_error("recurrent: a kernel rejected its arguments, or no memory was left");
}

}  // namespace nybble
