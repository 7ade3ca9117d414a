// y = (x codes . w codes) * act_scale * scale + bias; layout gather8, activations as code + 128 in lines of 64 k.
// Built on vpermi2b, which gathers the activations of 64 nonzero weights from a window of 128, and vpdpbusd: together 1
// cycle per 64 weights and row on Zen 5. Bound by these two, and by memory at few rows.
#include "tile_avx512vbmi.h"
// clang-format off
#include "tile_gather.h"
// clang-format on

namespace {

constexpr int64_t kPrefetchDistance = 4096;

struct Tile {
  template <int R>
  NYBBLE_INLINE void multiply(VI (&acc)[R][1], const uint8_t* step, const uint8_t* x) {
    const VI places0 = vi_load(step), codes0 = vi_load(step + 64), places1 = vi_load(step + 128),
             codes1 = vi_load(step + 192);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++, x += NYBBLE_LINE_K) {
      VI low = vi_load(x), high = vi_load(x + R * NYBBLE_LINE_K);
      vi_keep(low);
      vi_keep(high);
      dot_u8s8(acc[r][0], vi_gather128(places0, low, high), codes0);
      dot_u8s8(acc[r][0], vi_gather128(places1, low, high), codes1);
    }
  }

  template <int R>
  static void run(const NybbleLinearArgs* a, int64_t row, int64_t tile, int64_t end) {
    constexpr int64_t line_bytes = R * NYBBLE_LINE_K;
    alignas(64) int32_t sums[kPassTiles][R][W];
    uint64_t next[kPassTiles];
    const uint8_t* x = panel_at<uint8_t>(a, row);
    const int64_t lines = a->k_padded / NYBBLE_LINE_K;
    // With many steps per line of activations, reloading it is cheap, and the steps are better read as one stream.
    const bool streams = static_cast<int64_t>(a->start[end] - a->start[tile]) * 2 >= lines * 3 * (end - tile);
    // A K block's activations stay in the L1 cache while all tiles of a pass use them: reloading them for each tile
    // would cost as much as multiplying.
    const int64_t chunk = streams ? lines : a->k_block / NYBBLE_LINE_K;
    for (int64_t line = 0; line < lines; line += chunk)
      for (int64_t t = tile; t < end; t++) {
        VI acc[R][1];
        if (line == 0) next[t - tile] = a->start[t];
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
          acc[r][0] = line ? vi_load(sums[t - tile][r]) : vi_mul(vi_load(a->column_sum + t * W), vi_set1(-128));
        // With several chunks, the next tile's steps do not follow this tile's in memory: prefetch them here.
        if (chunk < lines && t + 1 < end)
          for (int64_t ahead = 0; ahead < kPrefetchDistance / 2; ahead += 64)
            __builtin_prefetch(a->codes + (line ? next[t + 1 - tile] : a->start[t + 1]) * kStepBytes + ahead);
        uint64_t i = next[t - tile];
        const uint64_t last = a->start[t + 1];
        const uint8_t* step = a->codes + i * kStepBytes;
        for (; i < last && a->window[i] < line + chunk; i++, step += kStepBytes) {
          __builtin_prefetch(a->window + i + 64);
#pragma GCC unroll 4
          for (int64_t ahead = 0; ahead < kStepBytes; ahead += 64) __builtin_prefetch(step + kPrefetchDistance + ahead);
          multiply<R>(acc, step, x + a->window[i] * line_bytes);
        }
        next[t - tile] = i;
        if (line + chunk >= lines) {
          finish_gather<R, 1>(a, row, t * W, acc, 0);
          continue;
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) vi_store(sums[t - tile][r], acc[r][0]);
      }
  }
};

}  // namespace

extern "C" NybbleStatus nybble_spw8a8_avx512vbmi_gather(const NybbleLinearArgs* args) {
  return run_gather<Tile, block_rows::spw8a8_avx512vbmi_gather>(args);
}
