// The driver of attention: splits it over threads by its shape alone, calls the kernels.
#pragma once

#include "memory.h"
#include "table.h"

namespace nybble {

struct Strides3 {
  int64_t batch, head, token;  // in elements; the last dimension has stride 1
};

struct AttentionCall {
  const KernelEntry* kernel;
  const KernelEntry* kernel8;  // null, or the kernel whose products are of 8 bits: it serves what takes it less time
  NybbleDtype dtype;           // of q, y, and of k and v unless they have scales
  int64_t batch, heads, kv_heads, queries, keys, head_dim, value_dim;
  Span q, k, v, y;
  Strides3 q_at, k_at, v_at, y_at;  // y usually (batch, queries, heads, value_dim), i.e. token stride heads * value_dim
  Span k_scale, v_scale;            // f32 (batch, kv_heads, keys): k and v are int8 codes in units of these; optional
  Strides3 k_scale_at, v_scale_at;
  Span mask;
  int mask_kind;                                        // NybbleMask
  int64_t mask_batch, mask_head, mask_query, mask_key;  // strides in elements, 0 broadcasts
  Span slopes;                                          // ALiBi, see NybbleAttentionArgs; optional
  float scale;
  bool causal;     // query i sees the keys up to i + keys - queries
  int64_t window;  // 0: none; else, with causal, a query sees only the last so many keys
};

// A call cut into pieces, by its shape alone. pack, run and merge may be called from any thread, each number once, run
// when all is packed and merge when every piece has run; they are false if a kernel refuses its arguments or no memory
// is left.
class AttentionPlan {
 public:
  // Throws std::invalid_argument for a span that is too small or a number out of range, and std::bad_alloc.
  explicit AttentionPlan(const AttentionCall& call);
  int64_t packs() const { return packs_; }
  bool pack(int64_t head) const;
  int64_t pieces() const { return pieces_; }
  bool run(int64_t piece) const;
  int64_t merges() const { return merges_; }
  bool merge(int64_t head) const;
  double products() const;  // multiply-adds

 private:
  bool run_int8(int64_t head, NybbleAttentionArgs args) const;
  void* partial(int64_t head) const;

  AttentionCall call_;
  bool int8_ = false;  // whether kernel8 serves it
  int64_t parts_ = 1;  // that the keys are split into
  int64_t packs_ = 0, pieces_ = 0, merges_ = 0;
  Scratch partial_;  // [merges][parts]
  Scratch packed_;   // [packs]; without packs, each piece packs its own
};

// Bits do not depend on the number of threads. A query that sees no key gives 0.
// Throws std::invalid_argument for a span that is too small or a number out of range, and std::bad_alloc.
void run_attention(const AttentionCall& call, int threads);

}  // namespace nybble
