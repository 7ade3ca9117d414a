// A chain: steps between matrices with one row for each token, run in one call. Matrices are named by slots; the first
// are given at each run, the others live in memory of the calling thread.
#pragma once

#include <mutex>
#include <optional>

#include "chain_steps.h"

namespace nybble {

struct External {
  Span span;
  int64_t stride;  // of rows, in elements
};

// Consecutive steps.
struct Segment {
  size_t begin, end;
  int64_t chunk;  // rows that one thread carries through all of them; 0: the threads share each step
};

class Chain {
 public:
  // widths: the columns of each slot. rows, attention: the names of kernels.
  Chain(NybbleDtype dtype, std::vector<int64_t> widths, int externals, const std::string& rows,
        const std::string& attention);

  // All throw std::invalid_argument, naming the argument, where slots and sizes do not fit.
  void add_norm(const Norm& norm, int x, int y, int residual, int sum);
  void add_linears(const Norm& norm, std::vector<LinearsWeight> weights, std::vector<LinearsStep::Of> of, int x,
                   int residual, int sum, int normed);
  void add_activate(int act, int x, int y, int other);
  // head_dim 0: the columns of y, by heads.
  void add_rotate(RotateStep step);
  void add_attention(AttentionStep step);

  void run(int64_t batch, int64_t length, const std::vector<External>& externals,
           const std::vector<std::optional<Table>>& tables, int threads) const;

 private:
  struct Schedule;

  void add(std::unique_ptr<Step> step);
  int64_t width(const char* argument, int slot) const;
  void same_width(const char* argument, int slot, int64_t columns) const;
  void check_sizes(const Frame& frame, const std::vector<External>& externals) const;
  void check_steps(const Frame& frame) const;
  bool run_chunk(const Schedule& schedule, const Segment& segment, const Frame& whole, int64_t index) const;
  std::shared_ptr<const Schedule> schedule(int64_t batch, int64_t length, int threads) const;

  NybbleDtype dtype_;
  std::vector<int64_t> widths_;
  int externals_;
  const KernelEntry *rows_, *attention_;
  std::vector<std::unique_ptr<Step>> steps_;
  std::vector<bool> written_;  // by slot
  mutable std::mutex mutex_;
  mutable std::vector<std::shared_ptr<const Schedule>> schedules_;
};

}  // namespace nybble
