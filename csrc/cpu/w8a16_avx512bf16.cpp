// y = x (s8 codes)^T * scale + bias, bfloat16 activations; layout n16k4. Codes are exact in bfloat16, so only the
// float32 sums are rounded. Built on vdpbf16ps. For one or two rows, vpermw looks up each code's nibbles, which takes
// fewer instructions than converting codes but twice the products. 12 rows by 32 columns keep 24 accumulators in
// registers. Bound by the multiply, and by memory up to 16 rows.
// Reaches 91 % of the multiply's peak at 256 x 4096 x 4096 on 2 cores of Zen 5.
#include "tile_avx512bf16.h"
// clang-format off
#include "tile_bf16_codes.h"
#include "tile_last_bf16.h"
#include "tile_run.h"
// clang-format on

namespace {

struct Tile : TileDefaults {
  static constexpr int kLastRows = kRowsForLast;

  static constexpr bool kInOrder = false;
  static constexpr int vectors(int rows) { return fitting_vectors(rows + 2, 3); }

  // With few rows, decoding takes longer than multiplying.
  static constexpr bool few(int rows) { return rows <= 2; }

  // Accumulators per row: few rows need more to hide the latency of the multiply.
  static constexpr int parts(int rows) { return few(rows) ? 2 : 1; }

  template <int R, int V>
  using Acc = VF[R * parts(R)][V];

  // Table of the low nibbles of codes, unsigned.
  static inline VI low_nibbles() {
    return bf16_table([](int i) { return i % 16; });
  }

  // Table of the high nibbles, signed, times 16.
  static inline VI high_nibbles() {
    return bf16_table([](int i) { return (i % 16 ^ 8) * 16 - 128; });
  }

  template <int R, int V>
  NYBBLE_INLINE void multiply_few(VF (&acc)[R * parts(R)][V], const uint8_t* (&w)[V], const uint8_t* x, VI low,
                                  VI high) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      const VI codes = vi_load(w[v]);
      w[v] += kLine;
      const VI halves[4] = {vi_lookup16(low, codes), vi_lookup16(high, vi_shift_right<4>(codes)),
                            vi_lookup16(low, vi_shift_right<8>(codes)), vi_lookup16(high, vi_shift_right<12>(codes))};
#pragma GCC unroll 8
      for (int i = 0; i < 4 * R; i++) {
        int32_t two;
        memcpy(&two, x + 4 * (i / 2), 4);
        dot_bf16(acc[i / 4 * parts(R) + i % 2][v], halves[i % 4], vi_set1(two));
      }
    }
  }

  template <int R, int V>
  NYBBLE_INLINE void multiply(VF (&acc)[R][V], const uint8_t* (&w)[V], const uint8_t* x) {
    VI pairs[2][V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      const VI codes = vi_load(w[v]);
      pairs[0][v] = bf16_pair<0>(codes);
      pairs[1][v] = bf16_pair<1>(codes);
      w[v] += kLine;
    }
#pragma GCC unroll 32
    for (int i = 0; i < 2 * R; i++) {
      int32_t two;
      memcpy(&two, x + 4 * i, 4);
      const VI xs = vi_set1(two);
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) dot_bf16(acc[i / 2][v], pairs[i % 2][v], xs);
    }
  }

  template <int R>
  static void run_last(const NybbleLinearArgs* a, int64_t row, int64_t column) {
    const VI low = vi_pairs(1 << 24, 1 << 16), high = vi_pairs(1 << 8, 1);
    const uint8_t *w = codes_at(a, column), *x = panel_at<uint8_t>(a, row * 2);
    LastSums<R> sums;
    each_of_four(a->k_padded / 4, [&](int i) __attribute__((always_inline)) {
      const VI codes = word_at(w);
      const __m512i even = _mm512_castps_si512(vf_of_int(vi_byte_s<3>(vi_mul(codes, low))));
      const __m512i odd = _mm512_castps_si512(vf_of_int(vi_byte_s<3>(vi_mul(codes, high))));
      sums.add(i % 2, _mm512_or_si512(_mm512_srli_epi32(even, 16), odd), x);
      w += kLine;
      x += 8 * R;
    });
    VF acc[R][1];
    sums.rows(acc);
    finish_w8a16<R>(a, row, column, acc, 0);
  }

  template <int R, int V>
  NYBBLE_INLINE void run(const NybbleLinearArgs* a, const Place& at, const uint8_t* (&w)[V], VF (&acc)[R * parts(R)][V],
                         Prefetcher& prefetcher) {
    const uint8_t* x = panel_at<uint8_t>(a, at.row * 2) + at.begin * R * 2;
    const VI low = low_nibbles(), high = high_nibbles();
    each_line<4>((at.end - at.begin) / 4, w, prefetcher, false, [&]() __attribute__((always_inline)) {
      if constexpr (few(R))
        multiply_few<R, V>(acc, w, x, low, high);
      else
        multiply<R, V>(acc, w, x);
      x += 8 * R;
    });
  }

  template <int R, int V>
  NYBBLE_INLINE void finish(const NybbleLinearArgs* a, int64_t row, int64_t column, VF (&acc)[R * parts(R)][V]) {
    if constexpr (few(R))
#pragma GCC unroll 8
      for (int i = 0; i < R * V; i++)
        acc[i / V][i % V] = vf_add(acc[i / V * parts(R)][i % V], acc[i / V * parts(R) + 1][i % V]);
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) finish_w8a16<R>(a, row, column + v * W, acc, v);
  }
};

}  // namespace

extern "C" NybbleStatus nybble_w8a16_avx512bf16(const NybbleLinearArgs* args) {
  return run_tiles<Tile, block_rows::w8a16_avx512bf16>(args);
}
