// Scales, minimums and zero points of groups along K, and the epilogue of their sums. Part of tile_run.h.
#pragma once

namespace {

// Whether scales have two levels: a kernel file defines NYBBLE_LEVELS before its first include.
#ifdef NYBBLE_LEVELS
constexpr bool kLevels = true;
#else
constexpr bool kLevels = false;
#endif

// Index of (column, group) in the arrays of scales and minimums: a block of groups shares one where they have levels.
inline int64_t scale_at(const NybbleLinearArgs* a, int64_t column, int64_t g) {
  if constexpr (!kLevels) return group_at(a, column, g);
  const int64_t blocks = nybble_scale_blocks(a->groups), block = g / NYBBLE_BLOCK_GROUPS;
  return (column / NYBBLE_TILE_N * blocks + block) * NYBBLE_TILE_N + column % NYBBLE_TILE_N;
}

// The numbers by which a group of W columns from `column` on multiplies its block's scale (kMinimum: its minimum).
template <bool kMinimum>
inline const uint8_t* level_at(const NybbleLinearArgs* a, int64_t column, int64_t g) {
  const int64_t place = (column / NYBBLE_TILE_N * a->groups + g) * 2 + kMinimum;
  return a->levels + place * NYBBLE_TILE_N + column % NYBBLE_TILE_N;
}

// The scales of W columns in one group. Hardware prefetching is too slow, since they are read a line now
// and a line then: the software prefetch gains 5 % at one row with small groups and 8 % with large ones, on Zen 5. It
// fetches those of the group that is kScalesAhead tiles further, in small groups the next ones.
constexpr int64_t kLevelsAhead = 1024;  // bytes
inline VF group_scale(const NybbleLinearArgs* a, int64_t column, int64_t g) {
  if constexpr (kLevels) {
    const uint8_t* level = level_at<false>(a, column, g);
    __builtin_prefetch(level + kLevelsAhead);
    return vf_mul(vf_of_int(vi_load_u8(level)),
                  vf_load_as(scale_place(a->scale, NYBBLE_F16, scale_at(a, column, g)), NYBBLE_F16, W));
  }
  constexpr int64_t kScalesAhead = 4;
  const int64_t place = group_at(a, column, g);
  const int64_t ahead = a->group <= 32 ? 256 : kScalesAhead * NYBBLE_TILE_N * a->groups;
  __builtin_prefetch(scale_place(a->scale, a->scale_dtype, place + ahead));
  return vf_load_as(scale_place(a->scale, a->scale_dtype, place), a->scale_dtype, W);
}

// Likewise, their minimum.
inline VF group_minimum(const NybbleLinearArgs* a, int64_t column, int64_t g) {
  if constexpr (kLevels)
    return vf_mul(vf_neg(vf_of_int(vi_load_u8(level_at<true>(a, column, g)))),
                  vf_load_as(scale_place(a->minimum, NYBBLE_F16, scale_at(a, column, g)), NYBBLE_F16, W));
  return vf_load_as(scale_place(a->minimum, a->scale_dtype, group_at(a, column, g)), a->scale_dtype, W);
}

// Adds to the sums of R rows and W columns the product of a group's minimum with the sum of the row's codes in the
// group. sum_of(r): the sum, to be changed.
template <int R, class SumOf>
NYBBLE_INLINE void add_minimum(const NybbleLinearArgs* a, int64_t row, int64_t g, VF minimum, const SumOf& sum_of) {
  const int32_t* sums = a->act_sum + row * a->groups + g;
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) sum_of(r) = vf_fma(vf_of_int(vi_set1(sums[r * a->groups])), minimum, sum_of(r));
}

// What the sum of the activation codes of a group is multiplied by, before the products with weights that have a
// minimum are added: they are counted from 0, but those of 8 bits are packed plus 128.
inline int32_t start_beside_minimum(const NybbleLinearArgs* a) { return a->code_bits == 8 ? -128 : 0; }

// Initial accumulators of a group, which subtract the weight zero point: -zero_point * (sum of activation codes).
struct GroupStart {
  const int32_t* sums;
  int64_t groups;
  bool symmetric;
  VI zero;

  GroupStart(const NybbleLinearArgs* a, int64_t row, int64_t column, int64_t g)
      : sums(a->act_sum + row * a->groups + g),
        groups(a->groups),
        symmetric(!a->zero_point && !a->minimum),
        zero(a->zero_point ? vi_load_u8(a->zero_point + group_at(a, column, g)) : vi_set1(start_beside_minimum(a))) {}

  VI of_row(int r) const {
    if constexpr (kLevels) return vi_set1(0);  // codes are counted from 0, and their minimum is added apart
    const VI sum = vi_set1(sums[r * groups]);
    return symmetric ? sum : vi_mul(zero, sum);
  }
};

// y = (sum - act_zero * weight_sum) * act_scale + bias. The correction for the activation zero point spans all groups.
template <int R, int V>
NYBBLE_INLINE void finish_w4a8(const NybbleLinearArgs* a, int64_t row, int64_t column, const VF (&sum)[R][V], int v) {
  const VF weight_sum = vf_load(a->weight_sum + column), bias = bias_at(a, column);
  store_rows<R>(a, row, column, [&](int r) __attribute__((always_inline)) {
    const VF zero = vf_set1(-static_cast<float>(a->act_zero[row + r]));
    return vf_fma(vf_fma(zero, weight_sum, sum[r][v]), vf_set1(a->act_scale[row + r]), bias);
  });
}

}  // namespace
