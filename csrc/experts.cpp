#include "experts.h"

#include <cmath>

namespace nybble {

namespace {

// Pairs of a token and an expert that are computed at a time: they bound the memory, and most experts of a layer still
// get enough rows.
constexpr int64_t kMostPairs = 4096;
// An expert whose share of the pairs is so many times the share of a thread's work is cut for all threads.
constexpr int64_t kSharesOfThread = 4;

// An expert that got tokens.
struct Part {
  int64_t begin, rows;  // its pairs, in the order of experts
  LinearCall up, down;
  Chunk up_chunk, down_chunk;
  size_t rounded;  // of Batch::rounded
};

// Activations of all tokens of a batch, as rows: the panel of each row by itself.
struct Rounded {
  LinearCall call;
  Chunk chunk;
};

struct Item {
  size_t part;
  int64_t piece;
};

// Copies a row of units into its place in a block of so many rows.
template <size_t kUnit>
void interleave(const uint8_t* from, int64_t units, int64_t rows, uint8_t* to) {
  for (int64_t i = 0; i < units; i++) std::memcpy(to + static_cast<size_t>(i * rows) * kUnit, from + i * kUnit, kUnit);
}

// Elements of consecutive k that stay together in a panel, in bytes.
int64_t unit_of(int panel) {
  if (panel >= NYBBLE_PANEL_U8_LINES) return NYBBLE_LINE_K;
  return panel == NYBBLE_PANEL_S8_PAIRS ? 8 : 4 * nybble_panel_element(panel);
}

void place(const uint8_t* from, int64_t bytes, int64_t unit, int64_t rows, uint8_t* to) {
  switch (unit) {
    case 4:
      return interleave<4>(from, bytes / 4, rows, to);
    case 8:
      return interleave<8>(from, bytes / 8, rows, to);
    case 16:
      return interleave<16>(from, bytes / 16, rows, to);
    default:
      return interleave<NYBBLE_LINE_K>(from, bytes / NYBBLE_LINE_K, rows, to);
  }
}

// Gates and ups that come in turns -> gates, then ups.
template <class T>
void part_pairs(const T* from, int64_t pairs, T* to) {
  for (int64_t i = 0; i < pairs; i++) {
    to[i] = from[2 * i];
    to[pairs + i] = from[2 * i + 1];
  }
}

int64_t blocks_of(const Chunk& chunk) { return (chunk.rows + chunk.cut.block_rows - 1) / chunk.cut.block_rows; }

LinearCall call_of(const ExpertsSide& side, size_t expert, int64_t rows, NybbleDtype dtype) {
  const KernelsFrom* from = &side.kernels[0];
  for (const KernelsFrom& each : side.kernels)
    if (each.least <= rows) from = &each;
  LinearCall call = from->call;
  call.packed = side.packed[expert];
  call.bias = side.bias[expert].span;
  call.bias_dtype = side.bias[expert].dtype;
  call.x_dtype = call.y_dtype = dtype;
  call.rows = rows;
  return resolved(call);
}

// Some tokens with their experts.
class Batch {
 public:
  Batch(const ExpertsCall& call, const ExpertsAt& at, int64_t begin, int64_t end, int threads);
  bool run();

 private:
  void sort();
  Cut cut(const LinearCall& call) const;
  void add(size_t expert, int64_t begin, int64_t rows);
  int64_t layout(uint8_t* base);
  void prepare_rows(const Rounded& rounded, int64_t begin, int64_t end);
  void gather(const Part& part, int64_t block);
  void multiply(const LinearCall& call, const Chunk& chunk, int64_t piece);
  void activate(const Part& part, int64_t block);
  uint8_t* gate_of(const Part& part, int64_t row, int64_t rows, NybbleActivateArgs& args);
  void mix(Team& team);
  void fail() { ok_.store(false, std::memory_order_relaxed); }

  const ExpertsCall& call_;
  const ExpertsAt& at_;
  const int64_t begin_, tokens_;
  const int64_t bytes_;  // of an element
  int workers_;
  int64_t pairs_ = 0;                      // those with an expert
  std::vector<int64_t> token_, position_;  // token of each pair in the order of experts; position there of each pair
  std::vector<Part> parts_;
  std::vector<Rounded> rounded_;
  std::vector<Item> gathered_, ups_, activated_, downs_;
  uint8_t *gates_ = nullptr, *outs_ = nullptr;
  std::atomic<bool> ok_{true};
};

Batch::Batch(const ExpertsCall& call, const ExpertsAt& at, int64_t begin, int64_t end, int threads)
    : call_(call), at_(at), begin_(begin), tokens_(end - begin), bytes_(dtype_bytes(call.dtype)), workers_(1) {
  const WeightShape &up = call.up.shape(), &down = call.down.shape();
  const int64_t products = up.n * up.k + down.n * down.k;
  if (products > kSerialProducts / std::max<int64_t>(1, tokens_ * at.top_k)) workers_ = usable_threads(threads);
  sort();
}

// Counts the tokens of each expert, and lists its pairs in the order of tokens.
void Batch::sort() {
  const size_t experts = call_.up.packed.size(), pairs = static_cast<size_t>(tokens_ * at_.top_k);
  const int64_t* index = reinterpret_cast<const int64_t*>(at_.index.address) + begin_ * at_.top_k;
  std::vector<int64_t> next(experts + 1);
  for (size_t i = 0; i < pairs; i++) next[static_cast<size_t>(index[i])]++;
  pairs_ = static_cast<int64_t>(pairs) - next[experts];
  int64_t begin = 0;
  for (size_t expert = 0; expert < experts; expert++) {
    const int64_t rows = next[expert];
    if (rows) add(expert, begin, rows);
    next[expert] = begin;
    begin += rows;
  }
  token_.resize(static_cast<size_t>(pairs_));
  position_.resize(pairs);
  for (size_t i = 0; i < pairs; i++) {
    const size_t expert = static_cast<size_t>(index[i]);
    position_[i] = expert == experts ? -1 : next[expert]++;
    if (expert != experts) token_[static_cast<size_t>(position_[i])] = static_cast<int64_t>(i) / at_.top_k;
  }
}

Cut Batch::cut(const LinearCall& call) const {
  const int threads = call.rows * kSharesOfThread * workers_ > pairs_ ? workers_ : 1;
  Cut cut = cut_for(product_of(*call.kernel, call.shape, call.rows, threads), caches());
  cut.chunk_rows = call.rows;
  return cut;
}

void Batch::add(size_t expert, int64_t begin, int64_t rows) {
  Part part{};
  part.begin = begin;
  part.rows = rows;
  part.up = call_of(call_.up, expert, rows, call_.dtype);
  part.down = call_of(call_.down, expert, rows, call_.dtype);
  part.up_chunk.cut = cut(part.up);
  part.down_chunk.cut = cut(part.down);
  for (; part.rounded < rounded_.size(); part.rounded++)
    if (rounded_[part.rounded].call.kernel->panel == part.up.kernel->panel) break;
  if (part.rounded == rounded_.size()) {
    Rounded rounded{part.up, {}};
    rounded.call.rows = tokens_;
    rounded.call.x = at_.x;
    rounded.call.stride = at_.stride;
    rounded.chunk.cut.block_rows = 1;
    rounded.chunk.cut.chunk_rows = tokens_;
    rounded_.push_back(rounded);
  }
  parts_.push_back(part);
}

// Gives each buffer its place from `base` on; returns the bytes of all.
int64_t Batch::layout(uint8_t* base) {
  int64_t at = 0;
  const auto take = [&](int64_t bytes) {
    uint8_t* here = base + at;
    at += round_up(bytes, 64);
    return here;
  };
  const auto chunk_at = [&](const LinearCall& call, Chunk& chunk) {
    const Cut cut = chunk.cut;
    chunk = carve(call, 0, cut, take(chunk_bytes(call, cut.chunk_rows)));
  };
  for (Rounded& each : rounded_) {
    chunk_at(each.call, each.chunk);
    each.chunk.row = begin_;
  }
  gates_ = take(pairs_ * call_.up.shape().n * bytes_);
  outs_ = take(pairs_ * call_.down.shape().n * bytes_);
  for (Part& part : parts_) {
    const Chunk& rows = rounded_[part.rounded].chunk;
    if (part.rows == 1) {  // the row is the block
      const int64_t token = token_[static_cast<size_t>(part.begin)];
      const Cut cut = part.up_chunk.cut;
      part.up_chunk = rows;
      part.up_chunk.rows = 1;
      part.up_chunk.cut = cut;
      part.up_chunk.panel += token * nybble_panel_row(part.up.kernel->panel, part.up.shape.k_padded());
      part.up_chunk.act_scale += token;
      part.up_chunk.act_zero += token;
      part.up_chunk.act_sum += token * part.up.shape.groups();
    } else {
      chunk_at(part.up, part.up_chunk);
    }
    chunk_at(part.down, part.down_chunk);
    part.up_chunk.row = part.down_chunk.row = part.begin;
    part.up.y.address = reinterpret_cast<uintptr_t>(gates_);
    part.down.y.address = reinterpret_cast<uintptr_t>(outs_);
  }
  return at;
}

void Batch::prepare_rows(const Rounded& rounded, int64_t begin, int64_t end) {
  NybblePrepareArgs args = prepare_args(rounded.call, rounded.chunk);
  args.block_begin = begin;
  args.block_end = end;
  if (rounded.call.prepare->prepare(&args) != NYBBLE_OK) fail();
}

// Copies the rounded rows of a block of an expert to where its kernel reads them.
void Batch::gather(const Part& part, int64_t block) {
  const Chunk &rows = rounded_[part.rounded].chunk, &to = part.up_chunk;
  const int format = part.up.kernel->panel;
  const int64_t row_bytes = nybble_panel_row(format, part.up.shape.k_padded()), unit = unit_of(format);
  const int64_t groups = part.up.shape.groups(), begin = block * to.cut.block_rows;
  const int64_t end = std::min(begin + to.cut.block_rows, part.rows), count = end - begin;
  const int64_t rest = row_bytes % unit, whole = row_bytes - rest;  // of pairs, a word may be left
  uint8_t* panel = to.panel + begin * row_bytes;
  for (int64_t row = begin; row < end; row++) {
    const int64_t token = token_[static_cast<size_t>(part.begin + row)];
    const uint8_t* from = rows.panel + token * row_bytes;
    place(from, whole, unit, count, panel + (row - begin) * unit);
    std::memcpy(panel + whole * count + (row - begin) * rest, from + whole, static_cast<size_t>(rest));
    if (!part.up.kernel->int_activations()) continue;
    to.act_scale[row] = rows.act_scale[token];
    to.act_zero[row] = rows.act_zero[token];
    if (part.up.shape.by_group())
      std::memcpy(to.act_sum + row * groups, rows.act_sum + token * groups, static_cast<size_t>(groups) * 4);
  }
}

void Batch::multiply(const LinearCall& call, const Chunk& chunk, int64_t piece) {
  if (!run_piece(call, chunk.cut, piece_args(call, chunk, linear_args(call, chunk), piece))) fail();
}

// Where the gates of some rows of an expert are, and the ups after them, as columns; returns null if no memory is left.
// Interleaved ones are parted into memory of the thread, which follows that of the activations.
uint8_t* Batch::gate_of(const Part& part, int64_t row, int64_t rows, NybbleActivateArgs& args) {
  const int64_t width = call_.up.shape().n, columns = args.columns;
  const bool parts = call_.gate.gated && call_.gate.interleaved;
  thread_local Scratch scratch;
  uint8_t* y = scratch.try_reserve(static_cast<size_t>(rows * (columns + (parts ? width : 0)) * bytes_));
  if (!y) return nullptr;
  uint8_t* gates = gates_ + (part.begin + row) * width * bytes_;
  if (parts) {
    uint8_t* to = y + rows * columns * bytes_;
    for (int64_t r = 0; r < rows; r++) {
      uint8_t *from = gates + r * width * bytes_, *here = to + r * width * bytes_;
      if (bytes_ == 4)
        part_pairs(reinterpret_cast<const uint32_t*>(from), columns, reinterpret_cast<uint32_t*>(here));
      else
        part_pairs(reinterpret_cast<const uint16_t*>(from), columns, reinterpret_cast<uint16_t*>(here));
    }
    gates = to;
  }
  args.x = {gates, width};
  if (call_.gate.gated) args.other = {gates + columns * bytes_, width};
  args.y = {y, columns};
  return y;
}

// Rounds a block of act(gate) * up for the second product.
void Batch::activate(const Part& part, int64_t block) {
  const Chunk& chunk = part.down_chunk;
  const int64_t columns = call_.down.shape().k, row = block * chunk.cut.block_rows;
  const int64_t rows = std::min(chunk.cut.block_rows, part.rows - row);
  const Gate& gate = call_.gate;
  NybbleActivateArgs args{gate.act, call_.dtype, rows, columns, {}, {}, {}, {}, gate.limit, gate.other_offset};
  const uint8_t* y = gate_of(part, row, rows, args);
  if (!y || call_.rows->rows->activate(&args) != NYBBLE_OK) return fail();
  NybblePrepareArgs prepare = prepare_args(part.down, chunk);
  // Offset such that the block's rows are where it looks for them.
  prepare.x =
      reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(y) - static_cast<uintptr_t>(row * columns * bytes_));
  prepare.ldx = columns;
  prepare.block_begin = block;
  prepare.block_end = block + 1;
  if (part.down.prepare->prepare(&prepare) != NYBBLE_OK) fail();
}

void Batch::mix(Team& team) {
  const int64_t columns = call_.down.shape().n;
  const float* weight = reinterpret_cast<const float*>(at_.weight.address) + begin_ * at_.top_k;
  uint8_t* y = reinterpret_cast<uint8_t*>(at_.y.address) + begin_ * columns * bytes_;
  const NybbleMixArgs args{call_.dtype,      tokens_, columns,          at_.top_k,
                           position_.data(), weight,  {outs_, columns}, {y, columns}};
  if (!each_rows(team, call_.rows->rows->mix, args)) fail();
}

bool Batch::run() {
  thread_local Scratch scratch;
  uint8_t* base = scratch.try_reserve(static_cast<size_t>(layout(nullptr)));
  if (!base) return false;
  layout(base);
  for (size_t i = 0; i < parts_.size(); i++) {
    const auto list = [i](std::vector<Item>& items, int64_t count) {
      for (int64_t piece = 0; piece < count; piece++) items.push_back({i, piece});
    };
    const Part& part = parts_[i];
    const Cut &up = part.up_chunk.cut, &down = part.down_chunk.cut;
    if (part.rows > 1) list(gathered_, blocks_of(part.up_chunk));
    list(ups_, up.tile_parts * up.block_parts);
    list(activated_, blocks_of(part.down_chunk));
    list(downs_, down.tile_parts * down.block_parts);
  }
  constexpr int64_t kRows = 8;
  const int64_t pieces = (tokens_ + kRows - 1) / kRows;
  run_team(workers_, [&](Team& team) {
    const auto each = [&](const std::vector<Item>& items, auto fn) {
      team.each(static_cast<int64_t>(items.size()), [&](int64_t i) {
        const Item& item = items[static_cast<size_t>(i)];
        fn(parts_[item.part], item.piece);
      });
    };
    for (const Rounded& rounded : rounded_)
      team.each(pieces, [&](int64_t i) { prepare_rows(rounded, i * kRows, std::min((i + 1) * kRows, tokens_)); });
    each(gathered_, [&](const Part& part, int64_t block) { gather(part, block); });
    each(ups_, [&](const Part& part, int64_t piece) { multiply(part.up, part.up_chunk, piece); });
    each(activated_, [&](const Part& part, int64_t block) { activate(part, block); });
    each(downs_, [&](const Part& part, int64_t piece) { multiply(part.down, part.down_chunk, piece); });
    mix(team);
  });
  return ok_.load();
}

void check_side(const char* name, const ExpertsSide& side, size_t experts) {
  if (side.kernels.empty() || side.kernels[0].least > 1) refuse(std::string(name) + ": has no kernels for one row");
  if (side.packed.size() != experts || side.bias.size() != experts)
    refuse(std::string(name) + ": has " + std::to_string(side.packed.size()) + " weights and " +
           std::to_string(side.bias.size()) + " biases, must have one for each of " + std::to_string(experts) +
           " experts");
  for (const KernelsFrom& each : side.kernels) {
    if (each.call.static_activations) refuse(std::string(name) + ": static activations are not supported");
    if (each.call.shape.ordered) refuse(std::string(name) + ": columns in an order of their own are not supported");
  }
}

}  // namespace

Experts::Experts(ExpertsCall call) : call_(std::move(call)) {
  const size_t experts = call_.up.packed.size();
  if (experts == 0) refuse("up: must have at least one weight");
  if (!call_.rows->rows) refuse(std::string("rows=\"") + call_.rows->name + "\": not the row kernels");
  check_side("up", call_.up, experts);
  check_side("down", call_.down, experts);
  const int64_t wanted = call_.down.shape().k * (call_.gate.gated ? 2 : 1);
  if (call_.up.shape().n != wanted)
    refuse("up: has " + std::to_string(call_.up.shape().n) + " outputs, must have " + std::to_string(wanted) +
           " for the inputs of down");
  if (!(call_.gate.limit >= 0) || !std::isfinite(call_.gate.other_offset))
    refuse("limit, other_offset: must be finite, and limit not negative");
  for (size_t i = 0; i < experts; i++) {
    call_of(call_.up, i, 1, call_.dtype);
    call_of(call_.down, i, 1, call_.dtype);
  }
}

void Experts::run(const ExpertsAt& at, int threads) const {
  const int64_t experts = static_cast<int64_t>(call_.up.packed.size()), bytes = dtype_bytes(call_.dtype);
  int64_t pairs, outputs;
  if (at.tokens < 0 || at.top_k < 0 || __builtin_mul_overflow(at.tokens, at.top_k, &pairs) ||
      __builtin_mul_overflow(at.tokens, call_.down.shape().n, &outputs))
    refuse("tokens, top_k: size out of range");
  require("x", at.x, strided_extent(at.tokens, at.stride, call_.up.shape().k), bytes);
  require("index", at.index, pairs, 8);
  require("weight", at.weight, pairs, 4);
  require("y", at.y, outputs, bytes);
  const int64_t* index = reinterpret_cast<const int64_t*>(at.index.address);
  for (int64_t i = 0; i < pairs; i++)
    if (index[i] < 0 || index[i] > experts)
      refuse("index: has the expert " + std::to_string(index[i]) + ", must be in [0, " + std::to_string(experts) +
             "], the last of which stands for none");
  const int64_t most = std::max<int64_t>(1, kMostPairs / std::max<int64_t>(1, at.top_k));
  const int64_t batches = (at.tokens + most - 1) / most;
  for (int64_t i = 0; i < batches; i++) {
    Batch batch(call_, at, at.tokens * i / batches, at.tokens * (i + 1) / batches, threads);
    if (!batch.run()) throw std::runtime_error("experts: a kernel rejected its arguments, or no memory was left");
  }
}

}  // namespace nybble
