// Register tiles of AMX for small groups along K, whose scaling takes longer than their multiplies: strips of 16 rows
// and 16 columns. The totals of a strip stay in vector registers. The sums of four groups are in flight, and four more
// are multiplied while they are scaled: a multiply by itself would be waited for. Part of tile_amx_run.h.
#pragma once

#include "tile_amx.h"
#include "tile_codes.h"

namespace {

constexpr int64_t kStripGroup = 32;  // the largest group of weights that are decoded and run in strips

// A strip: rows [row, row + rows) of the row block at `block`, and W columns.
struct StripPlace {
  int64_t block, block_rows, row, rows, column;
};

// R: the rows, rounded up to a multiple of 4.
template <class Family, int R>
class Strip {
 public:
  using Op = typename Family::Op;

  Strip(const NybbleLinearArgs* a, const KBlock& k, const StripPlace& at)
      : a_(a),
        at_(at),
        step_(Family::step(a)),
        end_(k.end / a->group),
        row_bytes_((a->k_padded * Op::kBytes + NYBBLE_LINE_K - 1) / NYBBLE_LINE_K * NYBBLE_LINE_K) {}

  // Adds the products of groups from g on to the totals, rows of W floats `stride` floats apart.
  void run(int64_t g, bool first, float* totals, int64_t stride) {
    VF total[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) total[r] = first ? vf_set1(0.0f) : vf_load(totals + r * stride);
    GroupNumbers<1> numbers(a_, at_.column);
    multiply(g);
    for (; g < end_; g += kFlight) {
      if (g + kFlight < end_) multiply(g + kFlight);
      for (int64_t i = g; i < g + kFlight && i < end_; i++) add(i, numbers, total);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) vf_store(totals + r * stride, total[r]);
  }

 private:
  static constexpr int kFlight = 4;

  typename Op::Sum (&sums_of(int64_t g)) [R][W] { return sums_[g % (2 * kFlight)]; }

  // The products of the groups from g on, as many as are in flight.
  void multiply(int64_t g) {
    const int64_t end = g + kFlight < end_ ? g + kFlight : end_;
    Family::decode(a_, at_.column, g * a_->group, end * a_->group, decoded_);
    dot<0>(g);
    dot<1>(g + 1);
    dot<2>(g + 2);
    dot<3>(g + 3);
    store<0>(g);
    store<1>(g + 1);
    store<2>(g + 2);
    store<3>(g + 3);
  }

  // A group is one step.
  template <int i>
  void dot(int64_t g) {
    if (g >= end_) return;
    const int64_t byte = g * a_->group * Op::kBytes;
    const uint8_t* x = static_cast<const uint8_t*>(a_->panel) + at_.block * row_bytes_ +
                       byte / NYBBLE_LINE_K * at_.block_rows * NYBBLE_LINE_K + byte % NYBBLE_LINE_K +
                       (at_.row - at_.block) * NYBBLE_LINE_K;
    tile_zero<i>();
    tile_load<6 + i % 2>(decoded_ + i * step_ * NYBBLE_TILE_N * Op::kBytes, 64);
    tile_load<4 + i % 2>(x, 64);
    Op::template dot<i, 4 + i % 2, 6 + i % 2>();
  }
  template <int i>
  void store(int64_t g) {
    if (g < end_) tile_store<i>(sums_of(g), sizeof sums_[0][0]);
  }

  __attribute__((always_inline)) void add(int64_t g, GroupNumbers<1>& numbers, VF (&total)[R]) {
    const auto& sums = sums_of(g);
    const int64_t last = at_.rows - 1;
    numbers.enter(g);
    const VF scale = numbers.scale(0), minimum = a_->minimum ? numbers.minimum(0) : vf_set1(0.0f);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) total[r] = vf_fma(Op::to_float(Op::load(sums[r])), scale, total[r]);
    if (!a_->minimum) return;
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const int64_t row = at_.row + (r < last ? r : last);
      total[r] = vf_fma(vf_of_int(vi_set1(a_->act_sum[row * a_->groups + g])), minimum, total[r]);
    }
  }

  const NybbleLinearArgs* a_;
  StripPlace at_;
  int64_t step_, end_, row_bytes_;
  // Weights are decoded as they are used, into the L1 cache: from the L2 cache they would take as long to read.
  alignas(64) uint8_t decoded_[kFlight * NYBBLE_LINE_K * NYBBLE_TILE_N * Op::kBytes];
  alignas(64) typename Op::Sum sums_[2 * kFlight][R][W] = {};  // rows that are not there stay 0
};

}  // namespace
