// The cells of recurrent layers, for units [begin, end) of each row. With z = x + h, the sums of both products, and
// sigma(z) = 1 / (1 + exp(-z)):
//   LSTM, gates i f g o:  cell = sigma(f) cell + sigma(i) tanh(g);  state = sigma(o) tanh(cell)
//   GRU, gates r z n:     n = tanh(x_n + sigma(r) h_n);             state = n + sigma(z) (before - n)
// In fp32; the state is rounded once. See tile_math.h for the functions. Bound by the divisions and polynomials.
// Include after a target's tile header.
#pragma once

#include "tile_math.h"
#include "tile_rows.h"

namespace {

inline VF vf_sigmoid(VF z) { return vf_gated(vf_set1(1.0f), z); }
inline VF vf_tanh(VF x) { return vf_act<NYBBLE_ACT_TANH>(x); }

// sigma(z) tanh(x) with one division. tanh is 1 in fp32 from 10 on, so that the product of both divisors is finite
// wherever the result is not 0.
inline VF vf_gated_tanh(VF z, VF x) {
  const VF one = vf_set1(1.0f), bounded = vf_min(vf_set1(10.0f), vf_max(vf_set1(-10.0f), x));
  const VF power = vf_exp(vf_mul(bounded, vf_set1(-2.0f)));
  return vf_div(vf_sub(one, power), vf_mul(vf_add(one, power), vf_add(one, vf_exp(vf_neg(z)))));
}

// The sums of a gate.
struct Gates {
  const float *x, *h;
  int64_t units;
  VF of_x(int gate, int64_t u, int64_t lanes) const { return load_at<NYBBLE_F32>(x, gate * units + u, lanes); }
  VF of_h(int gate, int64_t u, int64_t lanes) const { return load_at<NYBBLE_F32>(h, gate * units + u, lanes); }
  VF sum(int gate, int64_t u, int64_t lanes) const { return vf_add(of_x(gate, u, lanes), of_h(gate, u, lanes)); }
};

// Calls cell(row, gates, unit, lanes) -> the new state, for all vectors of units, and writes what it gives.
template <int kDtype, class Cell>
inline NybbleStatus each_unit(const NybbleGatesArgs& a, const Cell& cell) {
  for (int64_t r = 0; r < a.rows; r++) {
    const Gates gates{reinterpret_cast<const float*>(row_at<NYBBLE_F32>(a.x, r)),
                      reinterpret_cast<const float*>(row_at<NYBBLE_F32>(a.h, r)), a.units};
    uint8_t *state = row_at<kDtype>(a.state, r), *y = row_at<kDtype>(a.y, r);
    const auto step = [&](int64_t u, int64_t lanes) __attribute__((always_inline)) {
      const VF next = cell(r, gates, u, lanes);
      store_at<kDtype>(state, u, next, lanes);
      store_at<kDtype>(y, u, next, lanes);
    };
    int64_t u = a.begin;
    for (; u + W <= a.end; u += W) step(u, int64_t{W});
    if (u < a.end) step(u, a.end - u);
  }
  return NYBBLE_OK;
}

template <int kDtype>
inline NybbleStatus lstm_rows(const NybbleGatesArgs& a) {
  return each_unit<kDtype>(
      a, [&](int64_t r, const Gates& gates, int64_t u, int64_t lanes) __attribute__((always_inline)) {
        uint8_t* cell = row_at<NYBBLE_F32>(a.cell, r);
        const VF added = vf_gated_tanh(gates.sum(0, u, lanes), gates.sum(2, u, lanes));
        const VF next = vf_add(vf_gated(load_at<NYBBLE_F32>(cell, u, lanes), gates.sum(1, u, lanes)), added);
        store_at<NYBBLE_F32>(cell, u, next, lanes);
        return vf_gated_tanh(gates.sum(3, u, lanes), next);
      });
}

template <int kDtype>
inline NybbleStatus gru_rows(const NybbleGatesArgs& a) {
  return each_unit<kDtype>(a,
                           [&](int64_t r, const Gates& gates, int64_t u, int64_t lanes) __attribute__((always_inline)) {
                             const VF hidden = vf_gated(gates.of_h(2, u, lanes), gates.sum(0, u, lanes));
                             const VF next = vf_tanh(vf_add(gates.of_x(2, u, lanes), hidden));
                             const VF before = load_at<kDtype>(row_at<kDtype>(a.before, r), u, lanes);
                             return vf_add(next, vf_gated(vf_sub(before, next), gates.sum(1, u, lanes)));
                           });
}

inline NybbleStatus lstm(const NybbleGatesArgs* a) {
  switch (a->dtype) {
    case NYBBLE_F32:
      return lstm_rows<NYBBLE_F32>(*a);
    case NYBBLE_BF16:
      return lstm_rows<NYBBLE_BF16>(*a);
    case NYBBLE_F16:
      return lstm_rows<NYBBLE_F16>(*a);
    default:
      return NYBBLE_UNSUPPORTED;
  }
}

inline NybbleStatus gru(const NybbleGatesArgs* a) {
  switch (a->dtype) {
    case NYBBLE_F32:
      return gru_rows<NYBBLE_F32>(*a);
    case NYBBLE_BF16:
      return gru_rows<NYBBLE_BF16>(*a);
    case NYBBLE_F16:
      return gru_rows<NYBBLE_F16>(*a);
    default:
      return NYBBLE_UNSUPPORTED;
  }
}

}  // namespace
