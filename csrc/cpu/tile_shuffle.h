// The register tile of layout gather8 built on vpshufb, which looks up 16 bytes: eight lookups cover a window of 128.
// Include after a target's tile header, tile_gather.h and a definition of
//   struct Codes { explicit Codes(VI); void dot(VI& acc, VI x) const; };   acc += u8 x s8, four products per lane
#pragma once

#include "tile_gather.h"

namespace {

// Positions in a window as vpshufb indices: for each 16 bytes, an index where the position is there, else one that
// gives 0.
struct Positions {
  VI quarter[4];  // indices into each 16 bytes of a line
  VI second;      // top bit of each byte: whether the position is in the second line

  explicit Positions(VI positions) : second(_mm256_slli_epi16(positions, 1)) {
    const VI within = _mm256_and_si256(positions, _mm256_set1_epi8(63));
    // Saturating add: 0 to 15 become 0x70 to 0x7f, with the same low bits; all others get the top bit, which gives 0.
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
      quarter[i] = _mm256_adds_epu8(_mm256_xor_si256(within, _mm256_set1_epi8(static_cast<char>(16 * i))),
                                    _mm256_set1_epi8(0x70));
  }

  VI of_line(const uint8_t* x) const {
    const auto part = [&](int i) __attribute__((always_inline)) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + 16 * i));
      return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bytes), quarter[i]);
    };
    return _mm256_or_si256(_mm256_or_si256(part(0), part(1)), _mm256_or_si256(part(2), part(3)));
  }

  VI gather(const uint8_t* first, const uint8_t* second_line) const {
    return _mm256_blendv_epi8(of_line(first), of_line(second_line), second);
  }
};

struct GatherTile {
  // Multiplies eight of a step's 16 columns; `step` points to the first.
  template <int R>
  NYBBLE_INLINE void multiply(VI (&acc)[R][1], const uint8_t* step, const uint8_t* x) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++, step += 128) {
      const Positions positions(vi_load(step));
      const Codes codes(vi_load(step + 64));
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
        codes.dot(acc[r][0], positions.gather(x + r * NYBBLE_LINE_K, x + (R + r) * NYBBLE_LINE_K));
    }
  }

  template <int R>
  static void run(const NybbleLinearArgs* a, int64_t row, int64_t tile, int64_t end) {
    const uint8_t* x = panel_at<uint8_t>(a, row);
    for (int64_t column = tile * NYBBLE_TILE_N; column < end * NYBBLE_TILE_N; column += W) {
      const int64_t t = column / NYBBLE_TILE_N;
      const uint8_t* step = a->codes + static_cast<int64_t>(a->start[t]) * kStepBytes + column % NYBBLE_TILE_N * 4;
      VI acc[R][1];
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) acc[r][0] = vi_mul(vi_load(a->column_sum + column), vi_set1(-128));
      for (uint64_t i = a->start[t]; i < a->start[t + 1]; i++, step += kStepBytes) {
#pragma GCC unroll 4
        for (int64_t ahead = 0; ahead < kStepBytes; ahead += 64) __builtin_prefetch(step + kPrefetchDistance + ahead);
        multiply<R>(acc, step, x + a->window[i] * NYBBLE_LINE_K * R);
      }
      finish_gather<R, 1>(a, row, column, acc, 0);
    }
  }

 private:
  static constexpr int64_t kPrefetchDistance = 4096;
};

}  // namespace
