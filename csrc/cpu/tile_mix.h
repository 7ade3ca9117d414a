// Weighted sums of rows, such as the outputs of a token's experts: y[r] = sum over j of weight[r][j] * x[from[r][j]],
// in fp32, rounded once. A vector of y is in a register while its terms are added, so that y is written once. Bound by
// reading x. Include after a target's tile header.
#pragma once

#include "tile_rows.h"

namespace {

template <int kDtype>
inline NybbleStatus mix_rows(const NybbleMixArgs& a) {
  for (int64_t r = 0; r < a.rows; r++) {
    const int64_t* from = a.from + r * a.terms;
    const float* weight = a.weight + r * a.terms;
    uint8_t* y = row_at<kDtype>(a.y, r);
    each_vector(a.columns, [&](int, int64_t c, int64_t lanes) __attribute__((always_inline)) {
      VF sum = vf_set1(0.0f);
      for (int64_t j = 0; j < a.terms; j++) {
        if (from[j] < 0) continue;
        sum = vf_fma(vf_set1(weight[j]), load_at<kDtype>(row_at<kDtype>(a.x, from[j]), c, lanes), sum);
      }
      store_at<kDtype>(y, c, sum, lanes);
    });
  }
  return NYBBLE_OK;
}

inline NybbleStatus mix(const NybbleMixArgs* a) {
  switch (a->dtype) {
    case NYBBLE_F32:
      return mix_rows<NYBBLE_F32>(*a);
    case NYBBLE_BF16:
      return mix_rows<NYBBLE_BF16>(*a);
    case NYBBLE_F16:
      return mix_rows<NYBBLE_F16>(*a);
    default:
      return NYBBLE_UNSUPPORTED;
  }
}

}  // namespace
