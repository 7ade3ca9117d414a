#include "chain_steps.h"

#include <algorithm>

namespace nybble {

namespace {

NybbleMatrix from_row(const Frame& frame, int slot, const Rows& rows) {
  return part_of(frame.slot(slot), rows.begin, 0, frame.dtype);
}

// The stride of a table's dimension; 0 where it repeats.
int64_t stride_of(const Table& table, int dimension) {
  return table.sizes[dimension] == 1 ? 0 : table.strides[dimension];
}

int64_t table_bytes(int dtype) { return dtype == kBool ? 1 : dtype_bytes(dtype); }

void check_angles(const char* name, const Frame& frame, int index, int64_t head_dim) {
  const Table& table = frame.table(name, index);
  const int64_t batch = table.sizes[0], heads = table.sizes[1], length = table.sizes[2], rotated = table.sizes[3];
  if (table.dtype > NYBBLE_F16) refuse(std::string(name) + ": must be float32, bfloat16 or float16");
  if ((batch != 1 && batch != frame.batch) || heads != 1 || (length != 1 && length != frame.length))
    refuse(std::string(name) + ": has size (" + std::to_string(batch) + ", " + std::to_string(heads) + ", " +
           std::to_string(length) + ", ...), must be (batch=" + std::to_string(frame.batch) +
           " or 1, 1, length=" + std::to_string(frame.length) + " or 1, ...)");
  if (rotated < 2 || rotated % 2 || rotated > head_dim)
    refuse(std::string(name) + ": turns " + std::to_string(rotated) + " elements of a head of " +
           std::to_string(head_dim) + ", must be an even number of them");
  if (table.strides[3] != 1) refuse(std::string(name) + ": must be contiguous along its last dimension");
}

}  // namespace

void check_table(const char* name, const Table& table) {
  int64_t last = 0;
  for (int i = 0; i < 4; i++) {
    const int64_t size = table.sizes[i], stride = table.strides[i];
    if (size < 1 || size > int64_t{1} << 32 || stride < 0 || stride > int64_t{1} << 40 ||
        (size > 1 && stride > (int64_t{1} << 44) / (size - 1)))
      refuse(std::string(name) + ": sizes must be in [1, 2^32], and strides in [0, 2^40]");
    last += (size - 1) * stride;
  }
  require(name, table.span, last + 1, table_bytes(table.dtype));
}

const Table& Frame::table(const char* argument, int index) const {
  if (index < 0 || static_cast<size_t>(index) >= tables->size() || !(*tables)[static_cast<size_t>(index)])
    refuse(std::string(argument) + "=" + std::to_string(index) + ": this run has no such table");
  return *(*tables)[static_cast<size_t>(index)];
}

std::unique_ptr<LinearsPlan> Step::plan(int64_t, int) const { return nullptr; }

bool NormStep::run(const Frame& frame, const Rows& rows) const {
  const NybbleNormArgs args{norm.kind,
                            frame.dtype,
                            rows.count,
                            columns,
                            from_row(frame, x, rows),
                            from_row(frame, residual, rows),
                            from_row(frame, sum, rows),
                            from_row(frame, y, rows),
                            norm.scale()};
  return each_rows(rows.team, kernel->rows->norm, args);
}

// What its own weights write before is not read from elsewhere.
std::vector<int> LinearsStep::reads() const {
  std::vector<int> slots{x, residual};
  for (const Of& each : of)
    for (const int slot : {each.other, each.residual})
      if (std::none_of(of.begin(), of.end(), [&](const Of& one) { return one.y == slot; }) && slot != sum &&
          slot != normed)
        slots.push_back(slot);
  return slots;
}

std::vector<int> LinearsStep::writes() const {
  std::vector<int> slots{sum, normed};
  for (const Of& each : of) slots.push_back(each.y);
  return slots;
}

int64_t LinearsStep::products() const {
  int64_t sum = 0;
  for (const LinearsWeight& weight : call.weights) sum += weight.call.shape.n * weight.call.shape.k;
  return sum;
}

void LinearsStep::check(const Frame& frame) const {
  for (size_t i = 0; i < of.size(); i++) {
    const int64_t n = call.weights[i].call.shape.n, stride = frame.slot(of[i].y).stride;
    if (stride != n && frame.batch * frame.length > 1)
      refuse("y=" + std::to_string(of[i].y) + ": has a row stride of " + std::to_string(stride) +
             ", linear layers write rows without gaps, of " + std::to_string(n));
  }
}

std::unique_ptr<LinearsPlan> LinearsStep::plan(int64_t rows, int threads) const {
  return std::make_unique<LinearsPlan>(call, rows, threads);
}

bool LinearsStep::run(const Frame& frame, const Rows& rows) const {
  LinearsAt at;
  at.x = from_row(frame, x, rows);
  at.residual = from_row(frame, residual, rows);
  at.sum = from_row(frame, sum, rows);
  at.normed = from_row(frame, normed, rows);
  for (size_t i = 0; i < of.size(); i++)
    at.of[i] = {from_row(frame, of[i].y, rows), from_row(frame, of[i].other, rows),
                from_row(frame, of[i].residual, rows)};
  return rows.plan->run(at, rows.team, rows.scratch);
}

bool ActivateStep::run(const Frame& frame, const Rows& rows) const {
  const NybbleActivateArgs args{act,
                                frame.dtype,
                                rows.count,
                                columns,
                                from_row(frame, x, rows),
                                from_row(frame, other, rows),
                                {},
                                from_row(frame, y, rows),
                                0,
                                0};
  return each_rows(rows.team, kernel->rows->activate, args);
}

void RotateStep::check(const Frame& frame) const {
  check_angles("cos", frame, cos, head_dim);
  check_angles("sin", frame, sin, head_dim);
  if (frame.table("cos", cos).sizes[3] != frame.table("sin", sin).sizes[3]) refuse("sin: must turn as much as cos");
}

bool RotateStep::run(const Frame& frame, const Rows& rows) const {
  const Table &c = frame.table("cos", cos), &s = frame.table("sin", sin);
  NybbleRotateArgs args{};
  args.dtype = frame.dtype;
  args.cos_dtype = c.dtype;
  args.sin_dtype = s.dtype;
  args.interleaved = interleaved;
  args.rows = rows.count;
  args.heads = heads;
  args.head_dim = head_dim;
  args.rotated = c.sizes[3];
  args.x = part_of(from_row(frame, x, rows), 0, offset, frame.dtype);
  args.y = x == y ? args.x : from_row(frame, y, rows);
  args.cos = reinterpret_cast<const void*>(c.span.address);
  args.sin = reinterpret_cast<const void*>(s.span.address);
  args.cos_sequence = stride_of(c, 0);
  args.cos_token = stride_of(c, 2);
  args.sin_sequence = stride_of(s, 0);
  args.sin_token = stride_of(s, 2);
  args.row0 = rows.begin;
  args.length = frame.length;
  args.scale = norm.scale();
  return each_rows(rows.team, kernel->rows->rotate, args);
}

void AttentionStep::check(const Frame& frame) const {
  if (cached) {
    const Table &keys = frame.table("k", k), &values = frame.table("v", v);
    const int dtype = codes(frame) ? NYBBLE_S8 : frame.dtype;
    std::vector<std::tuple<const char*, const Table*, int64_t, int>> held{{"k", &keys, head_dim, dtype},
                                                                          {"v", &values, value_dim, dtype}};
    if (codes(frame)) {
      held.emplace_back("k_scale", &frame.table("k_scale", k_scale), 1, NYBBLE_F32);
      held.emplace_back("v_scale", &frame.table("v_scale", v_scale), 1, NYBBLE_F32);
    }
    for (const auto& [name, table, dim, kind] : held) {
      const int64_t* sizes = table->sizes;
      if (table->dtype != kind)
        refuse(std::string(name) + ": has dtype code " + std::to_string(table->dtype) + ", must be " +
               std::to_string(kind) + (codes(frame) ? ", with scales" : ", that of the chain"));
      if ((sizes[0] != 1 && sizes[0] != frame.batch) || sizes[1] != kv_heads || sizes[3] != dim ||
          (dim > 1 && table->strides[3] != 1) || sizes[2] != keys.sizes[2])
        refuse(std::string(name) + ": has size (" + std::to_string(sizes[0]) + ", " + std::to_string(sizes[1]) + ", " +
               std::to_string(sizes[2]) + ", " + std::to_string(sizes[3]) +
               "), must be (batch=" + std::to_string(frame.batch) + ", kv_heads=" + std::to_string(kv_heads) +
               ", keys, " + std::to_string(dim) + "), contiguous along its last dimension");
    }
  }
  if (mask < 0) return;
  const Table& held = frame.table("mask", mask);
  const int64_t right[4] = {frame.batch, heads, frame.length, cached ? frame.table("k", k).sizes[2] : frame.length};
  for (int i = 0; i < 4; i++)
    if (held.sizes[i] != 1 && held.sizes[i] != right[i])
      refuse("mask: size " + std::to_string(held.sizes[i]) + " in dimension " + std::to_string(i) + ", must be " +
             std::to_string(right[i]) + " or 1");
}

AttentionCall AttentionStep::call(const Frame& frame, int64_t begin, int64_t count) const {
  const int64_t bytes = dtype_bytes(frame.dtype), first = begin / frame.length;
  AttentionCall to{};
  to.kernel = kernel;
  to.kernel8 = kernel8;
  to.dtype = frame.dtype;
  to.batch = count / frame.length;
  to.heads = heads;
  to.kv_heads = kv_heads;
  to.queries = to.keys = frame.length;
  to.head_dim = head_dim;
  to.value_dim = value_dim;
  const auto columns = [&](int slot, int64_t offset, int64_t dim, int64_t many, Span& span, Strides3& at) {
    const NybbleMatrix from = part_of(frame.slot(slot), begin, offset, frame.dtype);
    span = {reinterpret_cast<uintptr_t>(from.at),
            static_cast<size_t>(((count - 1) * from.stride + many * dim) * bytes)};
    at = {frame.length * from.stride, dim, from.stride};
  };
  const auto cache = [&](int index, Span& span, Strides3& at) {
    const Table& from = frame.table("k, v", index);
    const size_t skipped = static_cast<size_t>(first * stride_of(from, 0) * table_bytes(from.dtype));
    span = {from.span.address + skipped, from.span.bytes - skipped};
    at = {stride_of(from, 0), stride_of(from, 1), stride_of(from, 2)};
    to.keys = from.sizes[2];
  };
  columns(q, q_offset, head_dim, heads, to.q, to.q_at);
  columns(y, 0, value_dim, heads, to.y, to.y_at);
  if (cached) {
    cache(k, to.k, to.k_at);
    cache(v, to.v, to.v_at);
    if (codes(frame)) {
      cache(k_scale, to.k_scale, to.k_scale_at);
      cache(v_scale, to.v_scale, to.v_scale_at);
    }
  } else {
    columns(k, k_offset, head_dim, kv_heads, to.k, to.k_at);
    columns(v, v_offset, value_dim, kv_heads, to.v, to.v_at);
  }
  if (mask >= 0) {
    const Table& from = frame.table("mask", mask);
    constexpr int kinds[] = {NYBBLE_MASK_F32,  NYBBLE_MASK_BF16, NYBBLE_MASK_F16,
                             NYBBLE_MASK_NONE, NYBBLE_MASK_NONE, NYBBLE_MASK_BOOL};
    const size_t skipped = static_cast<size_t>(first * stride_of(from, 0) * table_bytes(from.dtype));
    to.mask = {from.span.address + skipped, from.span.bytes - skipped};
    to.mask_kind = kinds[from.dtype];
    to.mask_batch = stride_of(from, 0);
    to.mask_head = stride_of(from, 1);
    to.mask_query = stride_of(from, 2);
    to.mask_key = stride_of(from, 3);
  }
  to.scale = scale;
  to.causal = causal;
  to.window = window;
  return to;
}

bool AttentionStep::run(const Frame& frame, const Rows& rows) const {
  bool ok = true;
  const auto pieces = [&](const AttentionPlan& plan) {
    if (plan.packs()) rows.team.each(plan.packs(), [&](int64_t head) { ok = plan.pack(head) && ok; });
    rows.team.each(plan.pieces(), [&](int64_t piece) { ok = plan.run(piece) && ok; });
    if (plan.merges()) rows.team.each(plan.merges(), [&](int64_t at) { ok = plan.merge(at) && ok; });
  };
  try {
    if (rows.attention)
      pieces(*rows.attention);
    else
      pieces(AttentionPlan(call(frame, rows.begin, rows.count)));
  } catch (const std::exception&) {  // no memory: nothing may be thrown out of a parallel region
    return false;
  }
  return ok;
}

}  // namespace nybble
