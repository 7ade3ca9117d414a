// Which scores of a row are the smallest, and weights without those.
#pragma once

#include <cstdint>

namespace nybble {

// chosen[i][j] is 1 for the counts[i] smallest magnitudes of row i of scores [n][k] (of equal ones, the first), else 0.
// NaN counts as the largest.
void choose_smallest(const float* scores, const int64_t* counts, int64_t n, int64_t k, uint8_t* chosen, int threads);

// to[i] = keep[i] ? from[i] : 0, for elements of `size` bytes, 2 or 4. keep: 0 or 1.
void keep_only(const void* from, const uint8_t* keep, int64_t count, int64_t size, void* to, int threads);

}  // namespace nybble
