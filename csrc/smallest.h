// Which scores of a row are the smallest.
#pragma once

#include <cstdint>

namespace nybble {

// chosen[i][j] is 1 for the counts[i] smallest magnitudes of row i of scores [n][k] (of equal ones, the first), else 0.
// NaN counts as the largest.
void choose_smallest(const float* scores, const int64_t* counts, int64_t n, int64_t k, uint8_t* chosen, int threads);

}  // namespace nybble
