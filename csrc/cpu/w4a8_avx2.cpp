// y = sum_g scale_g * (x codes . u4 codes - zero_point * act_sum) * act_scale + bias; layout n16k8.
// Built on vpmaddubsw with the nibble as the unsigned operand: a pair is at most 2 * 15 * 128 = 3840, so 8 pairs fit in
// 16 bits, and vpmaddwd widens only every eighth sum. Bound by vpmaddubsw + vpaddw: two instructions for 32 products.
#include "tile_avx2.h"
// clang-format off
#include "tile_run.h"
// clang-format on

namespace {

constexpr int64_t kWidenEvery = 32;  // number of k: four lines of two pairs

struct Tile : TileDefaults {
  template <int R, int V>
  using Acc = VF[R][1];

  static constexpr int vectors(int) { return 1; }

  // acc += the products of the next `ks` values of k, at most kWidenEvery.
  template <int R>
  static inline void multiply(VI* acc, const uint8_t*& w, const int8_t*& x, int64_t ks) {
    const VI low_mask = _mm256_set1_epi8(15);
    VI sum[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) sum[r] = _mm256_setzero_si256();
    for (int64_t k = 0; k < ks; k += 8, w += kLine, x += 8 * R) {
      const VI v = vi_load(w);
      const VI low = _mm256_and_si256(v, low_mask);
      const VI high = _mm256_and_si256(_mm256_srli_epi16(v, 4), low_mask);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        int32_t first, second;
        memcpy(&first, x + 4 * r, 4);
        memcpy(&second, x + 4 * (R + r), 4);
        dot_u8s8_16(sum[r], low, _mm256_set1_epi32(first));
        dot_u8s8_16(sum[r], high, _mm256_set1_epi32(second));
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) acc[r] = _mm256_add_epi32(acc[r], _mm256_madd_epi16(sum[r], _mm256_set1_epi16(1)));
  }

  template <int R, int V>
  NYBBLE_INLINE void run(const NybbleLinearArgs* a, const Place& at, const uint8_t* (&w)[V], VF (&sum)[R][1],
                         Prefetcher& prefetcher) {
    const int8_t* x = panel_at<int8_t>(a, at.row) + at.begin * R;
    for (int64_t g = at.begin / a->group; g * a->group < at.end; g++) {
      const GroupStart start(a, at.row, at.column, g);
      VI acc[R];
      for (int r = 0; r < R; r++) acc[r] = start.of_row(r);
      int64_t k = 0;
      for (; k + kWidenEvery <= a->group; k += kWidenEvery) {
        multiply<R>(acc, w[0], x, kWidenEvery);
        prefetcher.used(w, kWidenEvery / 8, false);
      }
      if (k < a->group) multiply<R>(acc, w[0], x, a->group - k);
      const VF scale = group_scale(a, at.column, g);
      for (int r = 0; r < R; r++) sum[r][0] = vf_fma(vf_of_int(acc[r]), scale, sum[r][0]);
    }
  }

  template <int R, int V>
  NYBBLE_INLINE void finish(const NybbleLinearArgs* a, int64_t row, int64_t column, const VF (&sum)[R][1]) {
    finish_w4a8<R, 1>(a, row, column, sum, 0);
  }
};

}  // namespace

extern "C" NybbleStatus nybble_w4a8_avx2(const NybbleLinearArgs* args) { return run_tiles<Tile, 8>(args); }
