#include "attention.h"

#include <algorithm>
#include <atomic>

#include "parallel.h"

namespace nybble {

namespace {

// Columns of a piece, see NybbleAttentionArgs: many, since its keys may be converted once for all, in tiles that fit in
// the level-2 cache.
constexpr int64_t kPieceColumns = 256;
// With few columns the keys are split, into parts of no less than so many, for so many pieces.
constexpr int64_t kPartKeys = 512, kPartPieces = 64;
// Below this many multiply-adds a call runs on one thread.
constexpr int64_t kSerialProducts = 1 << 19;
// With fewer keys or columns the kernel of 8 bits takes as much time or more: it packs keys and values first.
constexpr int64_t kInt8Keys = 96, kInt8Columns = 96;
// Sizes are below this, so that products of a size and a stride fit in 64 bits.
constexpr int64_t kMostTokens = INT32_MAX, kMostStride = int64_t{1} << 40;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t mask_bytes(int kind) { return kind == NYBBLE_MASK_BOOL ? 1 : kind == NYBBLE_MASK_F32 ? 4 : 2; }

void in_range(const char* name, int64_t value, int64_t least, int64_t most) {
  if (value < least || value > most)
    refuse(std::string(name) + "=" + std::to_string(value) + ": must be in [" + std::to_string(least) + ", " +
           std::to_string(most) + "]");
}

// Throws unless a span holds elements of sizes[i] and strides[i], the last dimension `width` wide.
void require_strided(const char* name, const Span& span, const int64_t (&sizes)[3], const int64_t (&strides)[3],
                     int64_t width, int64_t bytes) {
  int64_t extent = width;
  for (int i = 0; i < 3; i++) {
    if (strides[i] < 0 || strides[i] > kMostStride) refuse(std::string(name) + ": stride out of range");
    if (sizes[i] == 0) return;
    int64_t step;
    if (__builtin_mul_overflow(sizes[i] - 1, strides[i], &step) || __builtin_add_overflow(extent, step, &extent))
      refuse(std::string(name) + ": size out of range");
  }
  require(name, span, extent, bytes);
}

void require_heads(const char* name, const Span& span, const Strides3& at, const int64_t (&sizes)[3], int64_t width,
                   NybbleDtype dtype) {
  require_strided(name, span, sizes, {at.batch, at.head, at.token}, width, dtype_bytes(dtype));
}

NybbleDtype kv_dtype(const AttentionCall& call) { return call.k_scale.address ? NYBBLE_S8 : call.dtype; }

void require_kernel(const char* argument, const KernelEntry& kernel, const char* op) {
  if (!kernel.attention || std::string(kernel.op) != op)
    refuse(std::string(argument) + "=\"" + kernel.name + "\": not a kernel of " + op);
}

void check(const AttentionCall& call) {
  require_kernel("kernel", *call.kernel, "attention");
  if (call.kernel8) require_kernel("kernel8", *call.kernel8, "attention8");
  if (call.dtype > NYBBLE_F16) refuse("dtype: must be a float");
  for (const auto& [name, value] : {std::pair{"batch", call.batch}, {"queries", call.queries}, {"keys", call.keys}})
    in_range(name, value, 0, kMostTokens);
  for (const auto& [name, value] : {std::pair{"heads", call.heads}, {"kv_heads", call.kv_heads}})
    in_range(name, value, 1, kMostTokens);
  in_range("head_dim", call.head_dim, 1, 1 << 16);
  in_range("value_dim", call.value_dim, 1, 1 << 16);
  in_range("mask_kind", call.mask_kind, NYBBLE_MASK_NONE, NYBBLE_MASK_F16);
  in_range("window", call.window, 0, kMostTokens);
  if (call.window && !call.causal) refuse("window=" + std::to_string(call.window) + ": needs causal");
  if (call.heads % call.kv_heads)
    refuse("heads=" + std::to_string(call.heads) + ": must be a multiple of kv_heads=" + std::to_string(call.kv_heads));
  const int64_t many[3] = {call.batch, call.heads, call.queries}, few[3] = {call.batch, call.kv_heads, call.keys};
  require_heads("q", call.q, call.q_at, many, call.head_dim, call.dtype);
  require_heads("k", call.k, call.k_at, few, call.head_dim, kv_dtype(call));
  require_heads("v", call.v, call.v_at, few, call.value_dim, kv_dtype(call));
  if (call.k_scale.address || call.v_scale.address) {
    require_heads("k_scale", call.k_scale, call.k_scale_at, few, 1, NYBBLE_F32);
    require_heads("v_scale", call.v_scale, call.v_scale_at, few, 1, NYBBLE_F32);
  }
  require_heads("y", call.y, call.y_at, many, call.value_dim, call.dtype);
  if (call.mask_kind) {
    in_range("mask: key stride", call.mask_key, 0, kMostStride);
    const int64_t width = call.keys ? (call.keys - 1) * call.mask_key + 1 : 0;
    require_strided("mask", call.mask, many, {call.mask_batch, call.mask_head, call.mask_query}, width,
                    mask_bytes(call.mask_kind));
  }
  if (call.slopes.address) require("slopes", call.slopes, call.heads, 4);
}

// How the columns of one head of keys are cut: pieces of whole heads, or equal pieces of a head.
struct Pieces {
  int64_t group, queries, heads, parts;
  explicit Pieces(const AttentionCall& call) : group(call.heads / call.kv_heads), queries(call.queries) {
    heads = std::min(group, std::max<int64_t>(1, kPieceColumns / queries));
    parts = heads > 1 ? 1 : divide_up(queries, kPieceColumns);
  }
  int64_t count() const { return divide_up(group, heads) * parts; }
  int64_t most_columns() const {
    return std::max(heads * queries, divide_up(queries, parts) + NYBBLE_ATTENTION_COLUMNS);
  }
  void place(int64_t piece, NybbleAttentionArgs& args) const {
    const int64_t head = piece / parts * heads, part = piece % parts;
    args.column_begin = head * queries + cut(part);
    args.column_end = parts == 1 ? std::min(head + heads, group) * queries : head * queries + cut(part + 1);
  }
  int64_t cut(int64_t part) const {
    return part == parts ? queries : round_up(queries * part / parts, NYBBLE_ATTENTION_COLUMNS);
  }
};

bool takes_int8(const AttentionCall& call) {
  return call.keys >= kInt8Keys && call.heads / call.kv_heads * call.queries >= kInt8Columns;
}

const uint8_t* moved(const Span& span, int64_t elements, int64_t bytes) {
  return span.address ? reinterpret_cast<const uint8_t*>(span.address) + elements * bytes : nullptr;
}

// The arguments for a sequence and a head of keys.
NybbleAttentionArgs arguments(const AttentionCall& call, int64_t batch, int64_t kv_head) {
  const int64_t group = call.heads / call.kv_heads, head = kv_head * group;
  const auto at = [&](const Span& span, const Strides3& strides, int64_t h, NybbleDtype dtype) {
    return moved(span, batch * strides.batch + h * strides.head, dtype_bytes(dtype));
  };
  NybbleAttentionArgs args{};
  args.q = at(call.q, call.q_at, head, call.dtype);
  args.k = at(call.k, call.k_at, kv_head, kv_dtype(call));
  args.v = at(call.v, call.v_at, kv_head, kv_dtype(call));
  args.k_scale = reinterpret_cast<const float*>(at(call.k_scale, call.k_scale_at, kv_head, NYBBLE_F32));
  args.v_scale = reinterpret_cast<const float*>(at(call.v_scale, call.v_scale_at, kv_head, NYBBLE_F32));
  args.k_scale_token = call.k_scale_at.token;
  args.v_scale_token = call.v_scale_at.token;
  args.y = const_cast<uint8_t*>(at(call.y, call.y_at, head, call.dtype));
  args.dtype = call.dtype;
  args.mask_kind = call.mask_kind;
  args.heads = group;
  args.queries = call.queries;
  args.keys = args.key_end = call.keys;
  args.head_dim = call.head_dim;
  args.value_dim = call.value_dim;
  args.q_head = call.q_at.head;
  args.q_token = call.q_at.token;
  args.k_token = call.k_at.token;
  args.v_token = call.v_at.token;
  args.y_head = call.y_at.head;
  args.y_token = call.y_at.token;
  args.mask = moved(call.mask, batch * call.mask_batch + head * call.mask_head, mask_bytes(call.mask_kind));
  args.mask_head = call.mask_head;
  args.mask_query = call.mask_query;
  args.mask_key = call.mask_key;
  args.slopes = reinterpret_cast<const float*>(moved(call.slopes, head, 4));
  args.scale = call.scale;
  args.causal = call.causal;
  args.window = call.window;
  return args;
}

// Runs the kernel on one piece; false if it refuses, or without memory.
bool run_piece(const KernelEntry& kernel, NybbleAttentionArgs args) {
  thread_local Scratch scratch;
  args.scratch_bytes = nybble_attention_scratch(args.column_end - args.column_begin, args.head_dim, args.value_dim);
  args.scratch = scratch.try_reserve(static_cast<size_t>(args.scratch_bytes));
  return args.scratch && kernel.attention(&args) == NYBBLE_OK;
}

bool pack_head(const KernelEntry& kernel, NybbleAttentionArgs args) {
  args.pack = 1;
  args.column_begin = args.column_end = 0;
  return run_piece(kernel, args);
}

size_t packed_bytes(const AttentionCall& call) {
  return static_cast<size_t>(nybble_attention8_packed(call.keys, call.head_dim, call.value_dim));
}

}  // namespace

AttentionPlan::AttentionPlan(const AttentionCall& call) : call_(call) {
  check(call);
  if (call.batch == 0 || call.queries == 0) return;
  const int64_t heads = call.batch * call.kv_heads, count = Pieces(call).count();
  pieces_ = heads * count;
  int8_ = call.kernel8 && takes_int8(call);
  if (int8_ && count > 1) {
    packs_ = heads;
    packed_.reserve(packed_bytes(call) * static_cast<size_t>(heads));
  }
  if (call.heads / call.kv_heads * call.queries > NYBBLE_ATTENTION_FEW) return;
  parts_ = std::max<int64_t>(1, std::min(call.keys / kPartKeys, divide_up(kPartPieces, heads)));
  if (parts_ == 1) return;
  merges_ = heads;
  pieces_ = heads * parts_;
  partial_.reserve(static_cast<size_t>(pieces_ * nybble_attention_partial(call.value_dim)));
}

double AttentionPlan::products() const {
  return static_cast<double>(call_.batch) * static_cast<double>(call_.heads * call_.queries) *
         static_cast<double>(call_.keys) * static_cast<double>(call_.head_dim + call_.value_dim);
}

void* AttentionPlan::partial(int64_t head) const {
  return partial_.data() + head * parts_ * nybble_attention_partial(call_.value_dim);
}

bool AttentionPlan::pack(int64_t head) const {
  NybbleAttentionArgs args = arguments(call_, head / call_.kv_heads, head % call_.kv_heads);
  args.packed = packed_.data() + static_cast<size_t>(head) * packed_bytes(call_);
  return pack_head(*call_.kernel8, args);
}

bool AttentionPlan::run_int8(int64_t head, NybbleAttentionArgs args) const {
  if (packs_) {
    args.packed = packed_.data() + static_cast<size_t>(head) * packed_bytes(call_);
    return run_piece(*call_.kernel8, args);
  }
  thread_local Scratch packed;
  args.packed = packed.try_reserve(packed_bytes(call_));
  return args.packed && pack_head(*call_.kernel8, args) && run_piece(*call_.kernel8, args);
}

bool AttentionPlan::run(int64_t number) const {
  const Pieces pieces(call_);
  if (parts_ > 1) {
    const int64_t head = number / parts_, part = number % parts_;
    NybbleAttentionArgs args = arguments(call_, head / call_.kv_heads, head % call_.kv_heads);
    args.column_end = args.heads * args.queries;
    args.key_begin = args.keys * part / parts_;
    args.key_end = args.keys * (part + 1) / parts_;
    args.partial = static_cast<uint8_t*>(partial(head)) + part * nybble_attention_partial(call_.value_dim);
    return run_piece(*call_.kernel, args);
  }
  // The last queries see the most keys under `causal`: they come first, so that no thread ends with a large piece.
  const int64_t count = pieces.count(), head = number / count;
  NybbleAttentionArgs args = arguments(call_, head / call_.kv_heads, head % call_.kv_heads);
  pieces.place(count - 1 - number % count, args);
  return int8_ ? run_int8(head, args) : run_piece(*call_.kernel, args);
}

bool AttentionPlan::merge(int64_t head) const {
  NybbleAttentionArgs args = arguments(call_, head / call_.kv_heads, head % call_.kv_heads);
  args.column_end = args.heads * args.queries;
  args.partial = partial(head);
  args.parts = parts_;
  return call_.kernel->attention(&args) == NYBBLE_OK;
}

void run_attention(const AttentionCall& call, int threads) {
  const AttentionPlan plan(call);
  const int workers = plan.products() < kSerialProducts ? 1 : usable_threads(threads);
  std::atomic<bool> ok{true};
  parallel_for(plan.packs(), workers, [&](int64_t head) {
    if (!plan.pack(head)) ok.store(false, std::memory_order_relaxed);
  });
  parallel_for(plan.pieces(), workers, [&](int64_t piece) {
    if (!plan.run(piece)) ok.store(false, std::memory_order_relaxed);
  });
  parallel_for(plan.merges(), workers, [&](int64_t at) {
    if (!plan.merge(at)) ok.store(false, std::memory_order_relaxed);
  });
  if (!ok.load()) throw std::runtime_error(std::string(call.kernel->name) + ": refused, or ran out of memory");
}

}  // namespace nybble
