// y = sum_g scale_g * (x codes . u4 codes - zero_point * act_sum) * act_scale + bias; layout n16k8.
// Built on vpdpbusd with the nibble as the unsigned operand, so the activations need no offset. 12 rows by 16 columns.
// Bound by the multiply, and by memory at few rows.
#include "tile_avx512vnni.h"
// clang-format off
#include "tile_run.h"
// clang-format on

namespace {

template <int kVectors>
struct Tile {
  // Two accumulators a row cover the latency of the multiply where rows are few.
  static constexpr int splits(int rows) { return rows <= 4 ? 2 : 1; }

  template <int R>
  static void run(const NybbleLinearArgs* a, int64_t row, int64_t column) {
    const uint8_t* w = codes_at(a, column, 8);
    const int8_t* x = panel_at<int8_t>(a, row);
    const VI low_mask = _mm512_set1_epi8(15);
    VF sum[R];
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) sum[r] = vf_set1(0.0f);
    for (int64_t g = 0; g < a->groups; g++) {
      VI acc[R][splits(R)];
#pragma GCC unroll 12
      for (int r = 0; r < R; r++)
        for (VI& s : acc[r]) s = vi_set1(0);
      for (int64_t k = 0; k < a->group; k += 8, w += 64, x += 8 * R) {
        const VI v = vi_load(w);
        const VI low = _mm512_and_si512(v, low_mask);
        const VI high = _mm512_and_si512(_mm512_srli_epi16(v, 4), low_mask);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
          int32_t first, second;
          memcpy(&first, x + 4 * r, 4);
          memcpy(&second, x + 4 * (R + r), 4);
          dot_u8s8(acc[r][0], low, vi_set1(first));
          dot_u8s8(acc[r][splits(R) - 1], high, vi_set1(second));
        }
      }
      const VF scale = group_scale(a, column, g);
      const VI zero = group_zero(a, column, g);
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) {
        const VI total = splits(R) == 2 ? vi_add(acc[r][0], acc[r][splits(R) - 1]) : acc[r][0];
        sum[r] = finish_group(a, row + r, g, scale, zero, total, sum[r]);
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) finish_w4a8(a, row + r, column, sum[r]);
  }
};

}  // namespace

extern "C" NybbleStatus nybble_w4a8_avx512vnni(const NybbleLinearArgs* args) { return run_tiles<Tile, 1, 12>(args); }
