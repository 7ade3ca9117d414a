// The register tile of layout gather8 built on tbl, which looks up 64 bytes, a line of activations; tbx fills in those
// of the window's other line. Include after a header that defines kParts, dot_each and total_s8.
#pragma once

#include "tile_gather.h"

namespace {

// The two lines of a row that a step looks up in.
struct Window {
  uint8x16x4_t first, second;

  Window(const uint8_t* x, const uint8_t* next) : first(line(x)), second(line(next)) {}

  static uint8x16x4_t line(const uint8_t* x) {
    return {{vld1q_u8(x), vld1q_u8(x + 16), vld1q_u8(x + 32), vld1q_u8(x + 48)}};
  }

  // Activations as signed codes. A position of one line is outside of the table of the other.
  NYBBLE_INLINE VI at(const Window& window, uint8x16_t positions) {
    const uint8x16_t found = vqtbl4q_u8(window.first, positions);
    const uint8x16_t both = vqtbx4q_u8(found, window.second, veorq_u8(positions, vdupq_n_u8(64)));
    return vreinterpretq_s32_u8(veorq_u8(both, vdupq_n_u8(128)));
  }
};

struct GatherTile {
  static constexpr int kVectors = NYBBLE_TILE_N / W;

  template <int R>
  NYBBLE_INLINE void multiply(VI (&acc)[R][kVectors][kParts], const uint8_t* step, const uint8_t* x) {
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const Window window(x + r * NYBBLE_LINE_K, x + (R + r) * NYBBLE_LINE_K);
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; v++) {
          const uint8_t* place = step + half * 128 + v * 16;
          dot_each(acc[r][v], vi_load(place + 64), Window::at(window, vld1q_u8(place)));
        }
    }
  }

  template <int R>
  static void run(const NybbleLinearArgs* a, int64_t row, int64_t tile, int64_t end) {
    const uint8_t* x = panel_at<uint8_t>(a, row);
    for (; tile < end; tile++) {
      const uint8_t* step = a->codes + static_cast<int64_t>(a->start[tile]) * kStepBytes;
      VI acc[R][kVectors][kParts];
      each_register(acc, [](auto& one) __attribute__((always_inline)) { zero_register(one); });
      for (uint64_t i = a->start[tile]; i < a->start[tile + 1]; i++, step += kStepBytes) {
#pragma GCC unroll 4
        for (int64_t ahead = 0; ahead < kStepBytes; ahead += 64) __builtin_prefetch(step + kPrefetchDistance + ahead);
        multiply<R>(acc, step, x + a->window[i] * NYBBLE_LINE_K * R);
      }
      VI sums[R][kVectors];
#pragma GCC unroll 4
      for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; v++) sums[r][v] = total_s8(acc[r][v]);
      for (int v = 0; v < kVectors; v++) finish_gather<R, kVectors>(a, row, tile * NYBBLE_TILE_N + v * W, sums, v);
    }
  }

 private:
  static constexpr int64_t kPrefetchDistance = 4096;
};

}  // namespace
