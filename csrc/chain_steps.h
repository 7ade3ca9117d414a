// The steps of a chain: what each reads and writes, and how it runs on some of the rows.
#pragma once

#include <memory>
#include <optional>

#include "attention.h"
#include "linears.h"

namespace nybble {

// The dtype of a mask of bytes.
constexpr int kBool = 5;

// A tensor of four dimensions; the last is contiguous, a size of 1 or a stride of 0 repeats.
struct Table {
  Span span;
  int dtype = 0;
  int64_t sizes[4]{}, strides[4]{};  // in elements
};

// Throws std::invalid_argument where its sizes and strides leave its memory.
void check_table(const char* name, const Table& table);

// What a run has: matrices by slot, indexed by the row of the whole run, and tables.
struct Frame {
  NybbleDtype dtype;
  int64_t batch, length;
  std::vector<NybbleMatrix> slots;
  const std::vector<std::optional<Table>>* tables;
  // Throws std::invalid_argument if there is none.
  const Table& table(const char* argument, int index) const;
  bool has_table(int index) const {
    return static_cast<size_t>(index) < tables->size() && (*tables)[static_cast<size_t>(index)];
  }
  NybbleMatrix slot(int index) const { return index < 0 ? NybbleMatrix{} : slots[static_cast<size_t>(index)]; }
};

// Some rows, and the threads that share them.
struct Rows {
  int64_t begin, count;
  Team& team;
  const LinearsPlan* plan;         // of a step with linear layers
  uint8_t* scratch;                // of the plan
  const AttentionPlan* attention;  // of a step with attention whose pieces the threads share; null: one thread
};

class Step {
 public:
  virtual ~Step() = default;
  virtual const char* name() const = 0;
  virtual std::vector<int> reads() const = 0;
  virtual std::vector<int> writes() const = 0;
  // Throws std::invalid_argument where what the run has does not fit.
  virtual void check(const Frame&) const {}
  // Whether it needs whole sequences.
  virtual bool attends() const { return false; }
  // Multiply-adds of a row with weights.
  virtual int64_t products() const { return 0; }
  // Whether rows can be divided anyhow without changing a bit of the result.
  virtual bool divides() const { return true; }
  virtual std::unique_ptr<LinearsPlan> plan(int64_t rows, int threads) const;
  // False if a kernel refuses its arguments, or no memory is left.
  virtual bool run(const Frame& frame, const Rows& rows) const = 0;
};

// Slots, by what a step does with them; -1: none.
struct NormStep : Step {
  const KernelEntry* kernel = nullptr;
  int64_t columns = 0;
  int x = -1, y = -1, residual = -1, sum = -1;
  Norm norm;
  const char* name() const override { return "norm"; }
  std::vector<int> reads() const override { return {x, residual}; }
  std::vector<int> writes() const override { return {y, sum}; }
  bool run(const Frame& frame, const Rows& rows) const override;
};

struct LinearsStep : Step {
  struct Of {
    int y, other, residual;
  };
  LinearsCall call;
  int x = -1, residual = -1, sum = -1, normed = -1;
  std::vector<Of> of;
  const char* name() const override { return "linears"; }
  std::vector<int> reads() const override;
  std::vector<int> writes() const override;
  int64_t products() const override;
  bool divides() const override { return call.exact(); }
  void check(const Frame& frame) const override;
  std::unique_ptr<LinearsPlan> plan(int64_t rows, int threads) const override;
  bool run(const Frame& frame, const Rows& rows) const override;
};

struct ActivateStep : Step {
  const KernelEntry* kernel = nullptr;
  int64_t columns = 0;
  int x = -1, y = -1, other = -1, act = 0;
  const char* name() const override { return "activate"; }
  std::vector<int> reads() const override { return {x, other}; }
  std::vector<int> writes() const override { return {y}; }
  bool run(const Frame& frame, const Rows& rows) const override;
};

struct RotateStep : Step {
  const KernelEntry* kernel = nullptr;
  int64_t heads = 0, head_dim = 0, offset = 0;
  int x = -1, y = -1, cos = -1, sin = -1;
  bool interleaved = false;
  Norm norm;
  const char* name() const override { return "rotate"; }
  std::vector<int> reads() const override { return {x}; }
  std::vector<int> writes() const override { return {y}; }
  void check(const Frame& frame) const override;
  bool run(const Frame& frame, const Rows& rows) const override;
};

// k and v are slots, or if `cached` tables (batch, kv_heads, keys, head_dim). Rows of y are the heads side by side.
// k_scale and v_scale: tables (batch, kv_heads, keys, 1), or -1. A run that has them has int8 codes as k and v.
struct AttentionStep : Step {
  const KernelEntry *kernel = nullptr, *kernel8 = nullptr;                    // see AttentionCall
  int q = -1, k = -1, v = -1, y = -1, mask = -1, k_scale = -1, v_scale = -1;  // mask: a table, or -1
  int64_t heads = 0, kv_heads = 0, head_dim = 0, value_dim = 0;
  int64_t q_offset = 0, k_offset = 0, v_offset = 0, window = 0;
  float scale = 1.0f;
  bool causal = false, cached = false;
  const char* name() const override { return "attention"; }
  std::vector<int> reads() const override { return cached ? std::vector<int>{q} : std::vector<int>{q, k, v}; }
  std::vector<int> writes() const override { return {y}; }
  bool attends() const override { return true; }
  void check(const Frame& frame) const override;
  bool run(const Frame& frame, const Rows& rows) const override;
  // Whether k and v are int8 codes in this run.
  bool codes(const Frame& frame) const { return cached && k_scale >= 0 && frame.has_table(k_scale); }
  // For the sequences of some rows.
  AttentionCall call(const Frame& frame, int64_t begin, int64_t count) const;
};

}  // namespace nybble
