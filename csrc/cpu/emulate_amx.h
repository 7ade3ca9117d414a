// The AMX instructions that tile_amx.h uses, emulated in plain C++ tile by tile, with the faults of the hardware: a
// program that breaks a rule of Intel's manual aborts with the rule. Tests the AMX sources on any CPU. Never part of a
// released wheel.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// Tile registers and their configuration, one set per thread; all zero: not configured. One for all source files, so
// that a test can see whether a kernel left tiles configured.
struct NybbleEmulatedTiles {
  uint16_t colsb[8];
  uint8_t rows[8];
  bool configured;
  uint8_t tile[8][16][64];
};
inline thread_local NybbleEmulatedTiles nybble_emulated_tiles;

namespace {
namespace emulated {

inline void rule(bool holds, const char* text) {
  if (holds) return;
  fprintf(stderr, "emulated AMX: %s\n", text);
  abort();
}

inline NybbleEmulatedTiles& configured_tiles(int t) {
  NybbleEmulatedTiles& all = nybble_emulated_tiles;
  rule(all.configured, "a tile is used before ldtilecfg");
  rule(all.rows[t] > 0, "a tile is used that the configuration leaves out");
  return all;
}

// The 64 bytes of ldtilecfg: palette, start row, 14 reserved, colsb of 16 tiles, rows of 16 tiles. Zeroes all tiles.
inline void ldtilecfg(const void* config) {
  uint8_t bytes[64];
  memcpy(bytes, config, 64);
  NybbleEmulatedTiles& all = nybble_emulated_tiles;
  memset(&all, 0, sizeof all);
  if (bytes[0] == 0) return;
  rule(bytes[0] == 1, "the palette must be 0 or 1");
  rule(bytes[1] == 0, "start_row is not supported here");
  for (int i = 2; i < 16; i++) rule(bytes[i] == 0, "reserved bytes must be 0");
  for (int t = 0; t < 16; t++) {
    uint16_t colsb;
    memcpy(&colsb, bytes + 16 + 2 * t, 2);
    const uint8_t rows = bytes[48 + t];
    rule(t < 8 || (colsb == 0 && rows == 0), "there are 8 tiles");
    rule(colsb <= 64 && rows <= 16, "a tile has at most 16 rows of 64 bytes");
    rule((colsb == 0) == (rows == 0), "rows and colsb must both be 0, or neither");
    if (t >= 8) continue;
    all.colsb[t] = colsb;
    all.rows[t] = rows;
  }
  all.configured = true;
}

// The configuration, as ldtilecfg takes it; palette 0: none.
inline void sttilecfg(void* config) {
  const NybbleEmulatedTiles& all = nybble_emulated_tiles;
  uint8_t bytes[64] = {all.configured};
  memcpy(bytes + 16, all.colsb, sizeof all.colsb);
  memcpy(bytes + 48, all.rows, sizeof all.rows);
  memcpy(config, bytes, sizeof bytes);
}

inline void tilerelease() { memset(&nybble_emulated_tiles, 0, sizeof nybble_emulated_tiles); }

inline void tilezero(int t) { memset(configured_tiles(t).tile[t], 0, sizeof nybble_emulated_tiles.tile[t]); }

inline void tileload(int t, const void* from, int64_t stride) {
  tilezero(t);
  NybbleEmulatedTiles& all = nybble_emulated_tiles;
  for (int r = 0; r < all.rows[t]; r++)
    memcpy(all.tile[t][r], static_cast<const uint8_t*>(from) + r * stride, all.colsb[t]);
}

inline void tilestore(int t, void* to, int64_t stride) {
  const NybbleEmulatedTiles& all = configured_tiles(t);
  for (int r = 0; r < all.rows[t]; r++) memcpy(static_cast<uint8_t*>(to) + r * stride, all.tile[t][r], all.colsb[t]);
}

// Checks the operands of acc += a . b, and returns the tiles.
inline NybbleEmulatedTiles& product(int acc, int a, int b) {
  NybbleEmulatedTiles& all = configured_tiles(acc);
  configured_tiles(a);
  configured_tiles(b);
  rule(acc != a && acc != b && a != b, "the three tiles of a product must differ");
  rule(all.colsb[acc] % 4 == 0 && all.colsb[a] % 4 == 0 && all.colsb[b] % 4 == 0, "colsb must be a multiple of 4");
  rule(all.rows[acc] == all.rows[a], "the sums have the rows of a");
  rule(all.colsb[acc] == all.colsb[b], "the sums have the columns of b");
  rule(all.colsb[a] == 4 * all.rows[b], "b has one row for every four bytes of a");
  return all;
}

// Bytes of type A of a times bytes of type B of b; wraps.
template <class A, class B>
inline void byte_products(int acc, int a, int b) {
  NybbleEmulatedTiles& all = product(acc, a, b);
  for (int m = 0; m < all.rows[acc]; m++) {
    uint32_t sums[16];
    memcpy(sums, all.tile[acc][m], 64);
    for (int k = 0; k < all.rows[b]; k++)
      for (int n = 0; n < all.colsb[acc] / 4; n++)
        for (int i = 0; i < 4; i++)
          sums[n] += static_cast<uint32_t>(static_cast<A>(all.tile[a][m][4 * k + i]) *
                                           static_cast<B>(all.tile[b][k][4 * n + i]));
    memcpy(all.tile[acc][m], sums, 64);
  }
}
inline void tdpbssd(int acc, int a, int b) { byte_products<int8_t, int8_t>(acc, a, b); }
inline void tdpbsud(int acc, int a, int b) { byte_products<int8_t, uint8_t>(acc, a, b); }
inline void tdpbusd(int acc, int a, int b) { byte_products<uint8_t, int8_t>(acc, a, b); }

inline float tile_flushed(float a) { return fabsf(a) < 0x1p-126f ? copysignf(0.0f, a) : a; }

inline float tile_bf16(const uint8_t* half) {
  uint16_t bits;
  memcpy(&bits, half, 2);
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float a;
  memcpy(&a, &wide, 4);
  return tile_flushed(a);
}

// Pairs of bfloat16: the even and the odd products of the tile are summed on their own, by fused steps, then added to
// each other and to the accumulator. Rounds to nearest even; subnormals count as 0.
inline void tdpbf16ps(int acc, int a, int b) {
  NybbleEmulatedTiles& all = product(acc, a, b);
  for (int m = 0; m < all.rows[acc]; m++) {
    float sums[16], part[16][2] = {};
    memcpy(sums, all.tile[acc][m], 64);
    for (int k = 0; k < all.rows[b]; k++)
      for (int n = 0; n < all.colsb[acc] / 4; n++)
        for (int i = 0; i < 2; i++)
          part[n][i] = tile_flushed(
              fmaf(tile_bf16(all.tile[a][m] + 4 * k + 2 * i), tile_bf16(all.tile[b][k] + 4 * n + 2 * i), part[n][i]));
    for (int n = 0; n < all.colsb[acc] / 4; n++)
      sums[n] = tile_flushed(tile_flushed(sums[n]) + tile_flushed(part[n][0] + part[n][1]));
    memcpy(all.tile[acc][m], sums, 64);
  }
}

}  // namespace emulated
}  // namespace
