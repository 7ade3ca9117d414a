// The tile registers of AMX, 8 of up to 16 rows x 64 bytes, and register tiles of up to 32 rows x 32 columns built on
// them: 2 x 2 accumulators, two tiles of activations, two of weights. Each step of 64 bytes of k is four tile loads and
// four multiplies. The vector functions are tile_avx512bf16.h's. NYBBLE_EMULATE_AMX compiles the same source in plain
// C++, to test it on a machine without AMX.
#pragma once

#include "tile_avx512bf16.h"
#ifdef NYBBLE_EMULATE_AMX
#include "emulate_amx.h"
#endif
// clang-format off
#include "tile_run.h"
// clang-format on

namespace {

constexpr int64_t kTileRows = 16;
constexpr int64_t kMostRows = 2 * kTileRows;

// The operand of ldtilecfg. Rows and bytes of a row of each tile; 0: unused.
struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t colsb[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int64_t tile_rows, int64_t bytes) {
    rows[tile] = static_cast<uint8_t>(tile_rows);
    colsb[tile] = static_cast<uint16_t>(tile_rows ? bytes : 0);
  }
};
static_assert(sizeof(TileConfig) == 64, "as the hardware reads it");

// The instructions. Inline asm, because tile numbers must be constants, which templates give, and because GCC 12's
// macros for loads do not tell the compiler that they read memory.
#ifdef NYBBLE_EMULATE_AMX
inline void tile_configure(const TileConfig& config) { emulated::ldtilecfg(&config); }
inline void tile_read_config(TileConfig& config) { emulated::sttilecfg(&config); }
inline void tile_release() { emulated::tilerelease(); }
template <int t>
inline void tile_zero() {
  emulated::tilezero(t);
}
template <int t>
inline void tile_load(const void* from, int64_t stride) {
  emulated::tileload(t, from, stride);
}
template <int t>
inline void tile_store(void* to, int64_t stride) {
  emulated::tilestore(t, to, stride);
}
template <int acc, int a, int b>
inline void tile_dot_s8() {
  emulated::tdpbssd(acc, a, b);
}
template <int acc, int a, int b>
inline void tile_dot_s8u8() {
  emulated::tdpbsud(acc, a, b);
}
template <int acc, int a, int b>
inline void tile_dot_bf16() {
  emulated::tdpbf16ps(acc, a, b);
}
#else
inline void tile_configure(const TileConfig& config) { __asm__ volatile("ldtilecfg %0" : : "m"(config)); }
inline void tile_read_config(TileConfig& config) { __asm__ volatile("sttilecfg %0" : "=m"(config)); }
inline void tile_release() { __asm__ volatile("tilerelease"); }
template <int t>
NYBBLE_INLINE void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(t));
}
template <int t>
NYBBLE_INLINE void tile_load(const void* from, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(t) : "memory");
}
template <int t>
NYBBLE_INLINE void tile_store(void* to, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(t) : "memory");
}
template <int acc, int a, int b>
NYBBLE_INLINE void tile_dot_s8() {
  __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(acc), "i"(a), "i"(b));
}
template <int acc, int a, int b>
NYBBLE_INLINE void tile_dot_s8u8() {
  __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(acc), "i"(a), "i"(b));
}
template <int acc, int a, int b>
NYBBLE_INLINE void tile_dot_bf16() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(acc), "i"(a), "i"(b));
}
#endif

// Gives this thread the configuration back that it had: a library that loads its own once, as llama.cpp does, must find
// it again after our call. Without one, tiles are released.
class TileConfigKept {
 public:
  TileConfigKept() { tile_read_config(before_); }
  ~TileConfigKept() { before_.palette ? tile_configure(before_) : tile_release(); }
  TileConfigKept(const TileConfigKept&) = delete;
  TileConfigKept& operator=(const TileConfigKept&) = delete;

 private:
  TileConfig before_;
};

// The configuration of this thread while a kernel runs. Tile registers hold nothing between kernel calls, so neither
// threads nor forked children inherit or leave any: each call configures its own, and leaves what it found. Linux
// grants the use of tiles to the process (cpu_features.cpp): all its threads, older and newer ones, and its forked
// children have it.
class TileScope {
 public:
  // Tiles for `rows` rows and steps of `bytes` bytes of k; kStrip: at most 16 rows, which all tiles of rows have.
  // Loaded only if it changes, which clears all tiles.
  template <bool kStrip = false>
  void set(int64_t rows, int64_t bytes) {
    if (rows == rows_ && bytes == bytes_) return;
    rows_ = rows;
    bytes_ = bytes;
    TileConfig config;
    for (int r = 0; r < 2; r++) {
      const int64_t left = kStrip ? rows : rows - r * kTileRows, some = left < 0           ? 0
                                                                        : left < kTileRows ? left
                                                                                           : kTileRows;
      config.set(2 * r, some, 64);
      config.set(2 * r + 1, some, 64);
      config.set(4 + r, some, bytes);
      config.set(6 + r, bytes / 4, 64);
    }
    tile_configure(config);
  }

 private:
  TileConfigKept kept_;
  int64_t rows_ = 0, bytes_ = 0;
};

// What differs between the element types: sums and their vectors, and the multiply.
struct CodesOp {
  using Sum = int32_t;
  using Vector = VI;
  static constexpr int64_t kBytes = 1;
  template <int acc, int a, int b>
  NYBBLE_INLINE void dot() {
    tile_dot_s8<acc, a, b>();
  }
  static Vector load(const Sum* p) { return vi_load(p); }
  static VF to_float(Vector sum) { return vf_of_int(sum); }
};
// The same with unsigned weights.
struct UnsignedOp : CodesOp {
  template <int acc, int a, int b>
  NYBBLE_INLINE void dot() {
    tile_dot_s8u8<acc, a, b>();
  }
};
struct Bf16Op {
  using Sum = float;
  using Vector = VF;
  static constexpr int64_t kBytes = 2;
  template <int acc, int a, int b>
  NYBBLE_INLINE void dot() {
    tile_dot_bf16<acc, a, b>();
  }
  static Vector load(const Sum* p) { return vf_load(p); }
  static VF to_float(Vector sum) { return sum; }
};

// The operands of a register tile: addresses of the next step, and the bytes between steps.
struct TileOperands {
  const uint8_t *x, *w[2];
  int64_t x_step, w_step;
};

// Accumulator 2 r + c sums rows from 16 r on and columns from 16 c on, for r < T and c < V.
template <int T, int V>
NYBBLE_INLINE void zero_tiles() {
  tile_zero<0>();
  if constexpr (V > 1) tile_zero<1>();
  if constexpr (T > 1) tile_zero<2>();
  if constexpr (T > 1 && V > 1) tile_zero<3>();
}

// Advances the operands. A function of its own, on copies of them: inlined, its few pointers would not always get
// registers, and each step would read some from the stack.
template <class Op, int T, int V>
__attribute__((noinline)) static void multiply_tiles(TileOperands& o, int64_t steps) {
  const uint8_t *x = o.x, *w0 = o.w[0], *w1 = o.w[1];
  const int64_t x_step = o.x_step, w_step = o.w_step;
  for (; steps > 0; steps--) {
    tile_load<6>(w0, 64);
    tile_load<4>(x, 64);
    Op::template dot<0, 4, 6>();
    if constexpr (V > 1) {
      tile_load<7>(w1, 64);
      Op::template dot<1, 4, 7>();
    }
    if constexpr (T > 1) {
      tile_load<5>(x + kTileRows * 64, 64);
      Op::template dot<2, 5, 6>();
      if constexpr (V > 1) Op::template dot<3, 5, 7>();
    }
    x += x_step;
    w0 += w_step;
    if constexpr (V > 1) w1 += w_step;
  }
  o = {x, {w0, w1}, x_step, w_step};
}

// The sums of a register tile in memory.
template <class Op>
struct TileSums {
  alignas(64) typename Op::Sum at[kMostRows][2 * W];
};

// Rows and columns that the register tile does not have are left alone.
template <class Op, int T, int V>
NYBBLE_INLINE void store_tiles(TileSums<Op>& sums) {
  constexpr int64_t stride = sizeof sums.at[0];
  tile_store<0>(sums.at[0], stride);
  if constexpr (V > 1) tile_store<1>(sums.at[0] + W, stride);
  if constexpr (T > 1) tile_store<2>(sums.at[kTileRows], stride);
  if constexpr (T > 1 && V > 1) tile_store<3>(sums.at[kTileRows] + W, stride);
}

template <class Op, int T, int V>
NYBBLE_INLINE void load_tiles(const TileSums<Op>& sums) {
  constexpr int64_t stride = sizeof sums.at[0];
  tile_load<0>(sums.at[0], stride);
  if constexpr (V > 1) tile_load<1>(sums.at[0] + W, stride);
  if constexpr (T > 1) tile_load<2>(sums.at[kTileRows], stride);
  if constexpr (T > 1 && V > 1) tile_load<3>(sums.at[kTileRows] + W, stride);
}

}  // namespace
