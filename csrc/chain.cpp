#include "chain.h"

#include <algorithm>
#include <atomic>
#include <optional>

namespace nybble {

namespace {

// Rows that a thread carries through a run of steps: with them, what passes between the steps stays in its L2 cache.
// Fewer would read the weights too often.
constexpr int64_t kChunkRows = 96, kLeastChunkRows = 16, kMostChunkRows = 384;
// Row counts of which the schedule is kept.
constexpr size_t kSchedules = 16;

// The slots' places in memory: those that are never in use together may overlap.
class Places {
 public:
  // Bytes that are free from step `first` to step `last`.
  int64_t take(int64_t bytes, size_t first, size_t last) {
    int64_t at = 0;
    for (bool moved = true; moved;) {
      moved = false;
      for (const Taken& other : taken_) {
        if (other.first > last || other.last < first || other.at >= at + bytes || other.at + other.bytes <= at)
          continue;
        at = other.at + other.bytes;
        moved = true;
      }
    }
    taken_.push_back({at, bytes, first, last});
    total = std::max(total, at + bytes);
    return at;
  }
  int64_t total = 0;

 private:
  struct Taken {
    int64_t at, bytes;
    size_t first, last;
  };
  std::vector<Taken> taken_;
};

[[noreturn]] void refuse_at(size_t step, const std::string& name, const std::string& what) {
  refuse("step " + std::to_string(step) + " (" + name + "): " + what);
}

}  // namespace

// How a number of rows runs.
struct Chain::Schedule {
  struct Plans {
    std::unique_ptr<LinearsPlan> all, chunk, last;  // for the segment's chunks, and its last one
  };
  int64_t batch, length;
  int asked, workers;
  std::vector<Segment> segments;
  std::vector<Plans> plans;      // by step
  std::vector<int64_t> offsets;  // by slot
  std::vector<char> local;       // by slot: whether it is in memory of each chunk
  int64_t arena = 0, chunk_arena = 0, scratch = 0, chunk_scratch = 0;

  Schedule(const Chain& chain, int64_t batch, int64_t length, int asked);
  void make_segments(const Chain& chain);
  int64_t chunk_of(int64_t unit) const;
  void make_plans(const Chain& chain);
  void place_slots(const Chain& chain);
  int64_t rows() const { return batch * length; }
};

Chain::Schedule::Schedule(const Chain& chain, int64_t batch, int64_t length, int asked)
    : batch(batch), length(length), asked(asked) {
  int64_t products = 1;
  for (const auto& step : chain.steps_) products += step->products();
  workers = products <= kSerialProducts / rows() ? 1 : usable_threads(asked);
  make_segments(chain);
  make_plans(chain);
  place_slots(chain);
}

// Chunks of whole sequences pass through all steps, if there are enough. Otherwise the threads share each attention,
// and the steps between have chunks of any rows, if there are enough.
void Chain::Schedule::make_segments(const Chain& chain) {
  const auto& steps = chain.steps_;
  const bool divides = std::all_of(steps.begin(), steps.end(), [](const auto& step) { return step->divides(); });
  const bool attends = std::any_of(steps.begin(), steps.end(), [](const auto& step) { return step->attends(); });
  const int64_t chunk = divides ? chunk_of(attends ? length : 1) : 0;
  if (chunk || !attends) {
    segments.push_back({0, steps.size(), chunk});
    return;
  }
  const int64_t rows = divides ? chunk_of(1) : 0;
  for (size_t i = 0; i < steps.size(); i++) {
    const bool alone = steps[i]->attends();
    if (alone || i == 0 || segments.back().end != i || steps[i - 1]->attends())
      segments.push_back({i, i, alone ? 0 : rows});
    segments.back().end = i + 1;
  }
}

// Rows of a chunk of whole units, such that the threads have equally many; 0 if there are too few.
int64_t Chain::Schedule::chunk_of(int64_t unit) const {
  const int64_t units = rows() / unit, each = std::max<int64_t>(1, kChunkRows / unit);
  const int64_t chunks = round_up((units + each - 1) / each, workers);
  const int64_t chunk = (units + chunks - 1) / chunks * unit;
  return units >= workers && chunk >= kLeastChunkRows && chunk <= kMostChunkRows ? chunk : 0;
}

void Chain::Schedule::make_plans(const Chain& chain) {
  const auto add = [&](std::unique_ptr<LinearsPlan>& to, const Step& step, int64_t rows, int threads, int64_t& bytes) {
    to = step.plan(rows, threads);
    if (to) bytes = std::max(bytes, to->scratch_bytes());
  };
  plans.resize(chain.steps_.size());
  for (const Segment& segment : segments)
    for (size_t i = segment.begin; i < segment.end; i++) {
      const Step& step = *chain.steps_[i];
      if (!segment.chunk) {
        add(plans[i].all, step, rows(), workers, scratch);
        continue;
      }
      add(plans[i].chunk, step, segment.chunk, 1, chunk_scratch);
      if (const int64_t rest = rows() % segment.chunk) add(plans[i].last, step, rest, 1, chunk_scratch);
    }
}

// A slot that only one segment of chunks uses needs memory for a chunk of each thread only.
void Chain::Schedule::place_slots(const Chain& chain) {
  const size_t slots = chain.widths_.size();
  constexpr size_t never = SIZE_MAX;
  std::vector<size_t> first(slots, never), last(slots, 0), segment_of(slots, never);
  local.assign(slots, 1);
  offsets.assign(slots, 0);
  for (size_t s = 0; s < segments.size(); s++)
    for (size_t i = segments[s].begin; i < segments[s].end; i++) {
      std::vector<int> used = chain.steps_[i]->reads(), written = chain.steps_[i]->writes();
      used.insert(used.end(), written.begin(), written.end());
      for (const int slot : used) {
        if (slot < chain.externals_) continue;
        const size_t at = static_cast<size_t>(slot);
        if (first[at] == never) first[at] = i, segment_of[at] = s;
        last[at] = i;
        if (!segments[s].chunk || segment_of[at] != s) local[at] = 0;
      }
    }
  Places all, chunk;
  int64_t chunk_rows = 0;
  for (const Segment& segment : segments) chunk_rows = std::max(chunk_rows, segment.chunk);
  for (size_t at = static_cast<size_t>(chain.externals_); at < slots; at++) {
    if (first[at] == never) continue;
    const int64_t count = local[at] ? chunk_rows : rows();
    const int64_t bytes = round_up(count * chain.widths_[at] * dtype_bytes(chain.dtype_), 64);
    offsets[at] = (local[at] ? chunk : all).take(bytes, first[at], last[at]);
  }
  arena = all.total;
  chunk_arena = chunk.total;
}

Chain::Chain(NybbleDtype dtype, std::vector<int64_t> widths, int externals, const std::string& rows,
             const std::string& attention)
    : dtype_(dtype),
      widths_(std::move(widths)),
      externals_(externals),
      rows_(&find_kernel(rows)),
      attention_(&find_kernel(attention)) {
  if (dtype == NYBBLE_S32) refuse("dtype: must be a float");
  if (externals < 1 || externals > static_cast<int>(widths_.size()) || widths_.size() > 1024)
    refuse("externals=" + std::to_string(externals) + ": must be 1 to the number of slots, at most 1024");
  for (size_t i = 0; i < widths_.size(); i++)
    if (widths_[i] < 1 || widths_[i] > 1 << 28)
      refuse("widths[" + std::to_string(i) + "]=" + std::to_string(widths_[i]) + ": must be in [1, 2^28]");
  if (!rows_->rows) refuse("rows=\"" + rows + "\": not row kernels");
  if (!attention_->attention) refuse("attention=\"" + attention + "\": not an attention kernel");
  written_.assign(widths_.size(), false);
}

int64_t Chain::width(const char* argument, int slot) const {
  if (slot < 0 || slot >= static_cast<int>(widths_.size()))
    refuse(std::string(argument) + "=" + std::to_string(slot) + ": must be a slot, 0 to " +
           std::to_string(widths_.size() - 1));
  return widths_[static_cast<size_t>(slot)];
}

void Chain::same_width(const char* argument, int slot, int64_t columns) const {
  if (slot != -1 && width(argument, slot) != columns)
    refuse(std::string(argument) + "=" + std::to_string(slot) + ": the slot has " +
           std::to_string(widths_[static_cast<size_t>(slot)]) + " columns, must have " + std::to_string(columns));
}

void Chain::add(std::unique_ptr<Step> step) {
  for (const int slot : step->reads())
    if (slot >= externals_ && !written_[static_cast<size_t>(slot)])
      refuse_at(steps_.size(), step->name(), "reads slot " + std::to_string(slot) + ", which no step before it writes");
  for (const int slot : step->writes())
    if (slot >= 0) written_[static_cast<size_t>(slot)] = true;
  steps_.push_back(std::move(step));
  const std::lock_guard<std::mutex> lock(mutex_);
  schedules_.clear();
}

void Chain::add_norm(const Norm& norm, int x, int y, int residual, int sum) {
  const int64_t columns = width("x", x);
  check_norm(norm, columns);
  width("y", y);
  same_width("y", y, columns);
  same_width("residual", residual, columns);
  same_width("sum", sum, columns);
  if (sum == y) refuse("sum=" + std::to_string(sum) + ": must not be y");
  auto step = std::make_unique<NormStep>();
  step->kernel = rows_;
  step->columns = columns;
  step->x = x, step->y = y, step->residual = residual, step->sum = sum;
  step->norm = norm;
  add(std::move(step));
}

void Chain::add_linears(const Norm& norm, std::vector<LinearsWeight> weights, std::vector<LinearsStep::Of> of, int x,
                        int residual, int sum, int normed) {
  auto step = std::make_unique<LinearsStep>();
  step->call = {rows_, dtype_, norm, std::move(weights)};
  check_linears(step->call);
  const int64_t columns = width("x", x);
  for (const auto& [name, slot] : {std::pair("x", x), {"residual", residual}, {"sum", sum}, {"normed", normed}})
    same_width(name, slot, step->call.k());
  if (columns != step->call.k()) refuse("x: must have the inputs of the weights");
  if (normed != -1 && (normed == sum || normed == residual)) refuse("normed: must not be sum or residual");
  for (size_t i = 0; i < of.size(); i++) {
    const LinearsStep::Of& each = of[i];
    const int64_t n = step->call.weights[i].call.shape.n;
    width("y", each.y);
    for (const auto& [name, slot] : {std::pair("y", each.y), {"other", each.other}, {"residual", each.residual}})
      same_width(name, slot, n);
    bool twice = each.y == x || each.y == residual || each.y == sum || each.y == normed;
    for (size_t j = 0; j < of.size(); j++) {
      if (i != j) twice = twice || each.y == of[j].y;
      if (each.y != of[j].other && each.y != of[j].residual) continue;
      twice = twice || j <= i;
      step->call.weights[j].after.push_back(i);
    }
    if (twice) refuse("y=" + std::to_string(each.y) + ": only later weights of the step may use this slot");
  }
  step->x = x, step->residual = residual, step->sum = sum, step->normed = normed;
  step->of = std::move(of);
  add(std::move(step));
}

void Chain::add_activate(int act, int x, int y, int other) {
  const int64_t columns = width("x", x);
  width("y", y);
  same_width("y", y, columns);
  same_width("other", other, columns);
  auto step = std::make_unique<ActivateStep>();
  step->kernel = rows_;
  step->columns = columns;
  step->x = x, step->y = y, step->other = other, step->act = act;
  add(std::move(step));
}

void Chain::add_rotate(RotateStep asked) {
  auto step = std::make_unique<RotateStep>(std::move(asked));
  step->kernel = rows_;
  if (step->heads > 0 && step->head_dim == 0) step->head_dim = width("y", step->y) / step->heads;
  if (step->heads < 1 || step->head_dim < 2 || step->head_dim > 1 << 16 || step->heads > 1 << 16)
    refuse("heads, head_dim: must be at least 1 and 2, at most 2^16");
  const int64_t columns = step->heads * step->head_dim, x = width("x", step->x), y = width("y", step->y);
  if (step->offset < 0 || step->offset > x - columns)
    refuse("offset=" + std::to_string(step->offset) + ": heads * head_dim columns from there must be within x");
  if (step->x != step->y && y != columns)
    refuse("y=" + std::to_string(step->y) + ": must be x, or have heads * head_dim=" + std::to_string(columns) +
           " columns");
  if (step->cos < 0 || step->sin < 0) refuse("cos, sin: must be indexes of tables");
  check_norm(step->norm, step->head_dim);
  add(std::move(step));
}

void Chain::add_attention(AttentionStep asked) {
  auto step = std::make_unique<AttentionStep>(std::move(asked));
  step->kernel = attention_;
  for (const auto& [name, value] :
       {std::pair("heads", step->heads), {"kv_heads", step->kv_heads}, {"head_dim", step->head_dim}})
    if (value < 1 || value > 1 << 16)
      refuse(std::string(name) + "=" + std::to_string(value) + ": must be in [1, 2^16]");
  if (step->heads % step->kv_heads)
    refuse("heads=" + std::to_string(step->heads) +
           ": must be a multiple of kv_heads=" + std::to_string(step->kv_heads));
  if (step->window < 0 || (step->window && !step->causal))
    refuse("window=" + std::to_string(step->window) + ": must not be negative, and needs causal");
  step->value_dim = width("y", step->y) / step->heads;
  same_width("y", step->y, step->heads * step->value_dim);
  const auto within = [&](const char* name, int slot, int64_t offset, int64_t columns) {
    if (offset < 0 || offset > width(name, slot) - columns)
      refuse(std::string(name) + "_offset=" + std::to_string(offset) + ": " + std::to_string(columns) +
             " columns from there must be within the slot's " + std::to_string(width(name, slot)));
    if (slot == step->y) refuse("y=" + std::to_string(slot) + ": must not be another slot of the step");
  };
  within("q", step->q, step->q_offset, step->heads * step->head_dim);
  if (step->cached) {
    if (step->k < 0 || step->v < 0) refuse("k, v: must be indexes of tables");
  } else {
    within("k", step->k, step->k_offset, step->kv_heads * step->head_dim);
    within("v", step->v, step->v_offset, step->kv_heads * step->value_dim);
  }
  add(std::move(step));
}

// What a run was given, against the widths.
void Chain::check_sizes(const Frame& frame, const std::vector<External>& externals) const {
  if (frame.batch < 0 || frame.length < 0 || (frame.length && frame.batch > (int64_t{1} << 32) / frame.length))
    refuse("batch, length: must not be negative, and their product at most 2^32");
  if (externals.size() != static_cast<size_t>(externals_))
    refuse("external: has " + std::to_string(externals.size()) + " matrices, must have " + std::to_string(externals_));
  const int64_t rows = frame.batch * frame.length;
  for (size_t i = 0; i < externals.size() && rows > 0; i++) {
    const External& each = externals[i];
    const std::string name = "external[" + std::to_string(i) + "]";
    if (rows > 1 && (each.stride < widths_[i] || each.stride > 1 << 28))
      refuse(name + ": stride=" + std::to_string(each.stride) + ", must be in [" + std::to_string(widths_[i]) +
             ", 2^28]");
    require(name.c_str(), each.span, (rows > 1 ? (rows - 1) * each.stride : 0) + widths_[i], dtype_bytes(dtype_));
  }
  for (size_t i = 0; i < frame.tables->size(); i++)
    if (const std::optional<Table>& table = (*frame.tables)[i])
      check_table(("tables[" + std::to_string(i) + "]").c_str(), *table);
}

void Chain::check_steps(const Frame& frame) const {
  for (size_t i = 0; i < steps_.size(); i++) {
    try {
      steps_[i]->check(frame);
    } catch (const std::invalid_argument& error) {
      refuse_at(i, steps_[i]->name(), error.what());
    }
  }
}

std::shared_ptr<const Chain::Schedule> Chain::schedule(int64_t batch, int64_t length, int threads) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& kept : schedules_)
    if (kept->batch == batch && kept->length == length && kept->asked == threads) return kept;
  if (schedules_.size() == kSchedules) schedules_.erase(schedules_.begin());
  return schedules_.emplace_back(std::make_shared<const Schedule>(*this, batch, length, threads));
}

// Carries some rows through the steps of a segment.
bool Chain::run_chunk(const Schedule& schedule, const Segment& segment, const Frame& whole, int64_t index) const {
  thread_local Scratch memory;
  const int64_t begin = index * segment.chunk, count = std::min(segment.chunk, schedule.rows() - begin);
  const int64_t arena = round_up(schedule.chunk_arena, 64);
  uint8_t* base = memory.try_reserve(static_cast<size_t>(arena + schedule.chunk_scratch));
  if (!base) return false;
  Frame frame = whole;
  for (size_t at = static_cast<size_t>(externals_); at < widths_.size(); at++)
    if (schedule.local[at]) {  // offset such that the chunk's rows are where the steps look for them
      const int64_t shift = schedule.offsets[at] - begin * widths_[at] * dtype_bytes(dtype_);
      frame.slots[at] = {reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(base) + static_cast<uintptr_t>(shift)),
                         widths_[at]};
    }
  Team::Shared alone;
  Team team(alone, 1);
  bool ok = true;
  for (size_t i = segment.begin; i < segment.end && ok; i++) {
    const Schedule::Plans& plans = schedule.plans[i];
    const LinearsPlan* plan = count == segment.chunk ? plans.chunk.get() : plans.last.get();
    ok = steps_[i]->run(frame, {begin, count, team, plan, base + arena, nullptr});
  }
  return ok;
}

void Chain::run(int64_t batch, int64_t length, const std::vector<External>& externals,
                const std::vector<std::optional<Table>>& tables, int threads) const {
  Frame frame{dtype_, batch, length, std::vector<NybbleMatrix>(widths_.size()), &tables};
  check_sizes(frame, externals);
  for (size_t at = 0; at < widths_.size(); at++) {
    frame.slots[at] = {nullptr, widths_[at]};
    if (at >= externals.size()) continue;
    frame.slots[at].at = reinterpret_cast<void*>(externals[at].span.address);
    if (batch * length > 1) frame.slots[at].stride = externals[at].stride;
  }
  check_steps(frame);
  if (batch == 0 || length == 0 || steps_.empty()) return;
  const std::shared_ptr<const Schedule> schedule = this->schedule(batch, length, threads);
  thread_local Scratch memory;
  const int64_t arena = round_up(schedule->arena, 64);
  uint8_t* base = memory.reserve(static_cast<size_t>(arena + schedule->scratch));
  for (size_t at = externals.size(); at < widths_.size(); at++) frame.slots[at].at = base + schedule->offsets[at];
  // Of the steps whose pieces the threads share.
  std::vector<std::optional<AttentionPlan>> attention(steps_.size());
  for (const Segment& segment : schedule->segments)
    for (size_t i = segment.begin; i < segment.end && !segment.chunk; i++)
      if (const auto* step = dynamic_cast<const AttentionStep*>(steps_[i].get()))
        attention[i].emplace(step->call(frame, 0, schedule->rows()));
  std::atomic<bool> ok{true};
  run_team(usable_threads(schedule->workers), [&](Team& team) {
    for (const Segment& segment : schedule->segments) {
      if (segment.chunk) {
        team.each((schedule->rows() + segment.chunk - 1) / segment.chunk, [&](int64_t i) {
          if (!run_chunk(*schedule, segment, frame, i)) ok.store(false, std::memory_order_relaxed);
        });
        continue;
      }
      for (size_t i = segment.begin; i < segment.end; i++)
        if (!steps_[i]->run(frame, {0, schedule->rows(), team, schedule->plans[i].all.get(), base + arena,
                                    attention[i] ? &*attention[i] : nullptr}))
          ok.store(false, std::memory_order_relaxed);
    }
  });
  if (!ok.load()) throw std::runtime_error("chain: a kernel rejected its arguments, or no memory was left");
}

}  // namespace nybble
