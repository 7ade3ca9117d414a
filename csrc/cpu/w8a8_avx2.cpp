// y = (x codes . w codes) * act_scale * scale + bias; layout n16k4, activations as 16-bit codes.
// Built on vpmaddwd over sign-extended codes: exact for every input, where vpmaddubsw would saturate (255 * 127 * 2).
// A register holds 4 columns as two partial sums each, so that one 16-byte load of weights feeds one multiply.
// Bound by vpmaddwd + vpaddd: 16 products for two instructions.
#include "tile_avx2.h"
// clang-format off
#include "tile_run.h"
// clang-format on

namespace {

inline VI widen(const uint8_t* p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

struct Tile {
  static constexpr int vectors(int) { return 1; }

  template <int R, int V>
  static void run(const NybbleLinearArgs* a, int64_t row, int64_t column, Ahead& ahead) {
    const uint8_t* w[1] = {codes_at(a, column)};
    const int16_t* x = panel_at<int16_t>(a, row);
    VI low[R], high[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) low[r] = high[r] = _mm256_setzero_si256();
    for (int64_t k = 0; k < a->k_padded; k += 4, w[0] += kLine, x += 4 * R) {
      if (k % 32 == 0) ahead.used(w, 8);
      const VI w0 = widen(w[0]), w1 = widen(w[0] + 16);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        int64_t four;
        memcpy(&four, x + 4 * r, 8);
        const VI xs = _mm256_set1_epi64x(four);
        dot_s16(low[r], w0, xs);
        dot_s16(high[r], w1, xs);
      }
    }
    const Columns8 columns{a, column};
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const VI pairs = _mm256_hadd_epi32(low[r], high[r]);  // columns 0 1 4 5 | 2 3 6 7
      columns.finish(row + r, _mm256_permute4x64_epi64(pairs, _MM_SHUFFLE(3, 1, 2, 0)));
    }
  }
};

}  // namespace

extern "C" NybbleStatus nybble_w8a8_avx2(const NybbleLinearArgs* args) { return run_tiles<Tile, 6>(args); }
