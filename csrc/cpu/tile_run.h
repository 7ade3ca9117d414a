// The loops around the register tiles of dense layouts, and the epilogues. Include after a target's vector header.
//
// For each pass of columns, K block, row block and register tile: a Tile multiplies R rows by V * W columns, V at most
// vectors(R), along one K block. Sums pass from one K block to the next through memory, unchanged, so that cutting
// changes no bit. A Tile derives from TileDefaults and has
//   template <int R, int V> using Acc            its sums: an array, of any shape, of VI or VF
//   static constexpr int vectors(int rows)
//   start<R, V>(a, column, acc)                  before the first K block; the default is 0
//   run<R, V>(a, place, w, acc, prefetcher)      adds the products of a K block; w: V streams of weights, see Streams
//   finish<R, V>(a, row, column, acc)            after the last K block: the epilogue
// all but vectors NYBBLE_INLINE. Those that decode weights once per K block have a kDecodedLine and
//   decode(a, column, begin, end, to)            the lines of a tile of 16 columns along K from begin to end
#pragma once

#include "../abi.h"
#include "tile_inline.h"
#include "tile_planes.h"
#include "tile_scale.h"
#include "tile_table.h"

namespace {

// The largest number of column vectors, `per_vector` registers each, that fits beside `fixed` other registers.
constexpr int fitting_vectors(int per_vector, int fixed) {
  for (int vectors = 4; vectors > 1; vectors /= 2)
    if (vectors * per_vector + fixed <= kRegisters) return vectors;
  return 1;
}

// The same for decoded weights. They serve many rows, of which few remain for the last block: one number is enough.
constexpr int decoded_vectors(int per_vector, int fixed) {
  const int vectors = fitting_vectors(per_vector, fixed);
  return kRegisters > 16 && vectors > 2 ? 2 : vectors;
}

// Bytes of codes of one column.
inline int64_t column_bytes(const NybbleLinearArgs* a) { return a->k_padded * a->code_bits / 8; }

// The address of the codes of W columns: tiles of 16 columns, lines of 64 bytes with a few k each.
inline const uint8_t* codes_at(const NybbleLinearArgs* a, int64_t column) {
  const int64_t tile = column / NYBBLE_TILE_N;
  return a->codes + tile * NYBBLE_TILE_N * column_bytes(a) + column % NYBBLE_TILE_N * 4;
}

// Calls each(register) for the registers of an array of any shape.
template <class Each>
NYBBLE_INLINE void each_register(VI& one, const Each& each) {
  each(one);
}
template <class Each>
NYBBLE_INLINE void each_register(VF& one, const Each& each) {
  each(one);
}
template <class T, size_t N, class Each>
NYBBLE_INLINE void each_register(T (&array)[N], const Each& each) {
#pragma GCC unroll 32
  for (size_t i = 0; i < N; i++) each_register(array[i], each);
}

NYBBLE_INLINE void zero_register(VI& one) { one = vi_set1(0); }
NYBBLE_INLINE void zero_register(VF& one) { one = vf_set1(0.0f); }
NYBBLE_INLINE void load_register(VI& to, const uint8_t* from) { to = vi_load(from); }
NYBBLE_INLINE void load_register(VF& to, const uint8_t* from) { to = vf_load(reinterpret_cast<const float*>(from)); }
NYBBLE_INLINE void store_register(uint8_t* to, const VI& from) { vi_store(to, from); }
NYBBLE_INLINE void store_register(uint8_t* to, const VF& from) { vf_store(reinterpret_cast<float*>(to), from); }

struct TileDefaults {
  // Fewest rows for which run_last<R>(a, row, column) serves a last tile of one column, for all of K: see tile_last.h.
  static constexpr int kLastRows = 1 << 30;
  static constexpr int64_t kDecodedLine = 0;  // bytes of a decoded line, for a Tile that reads decoded weights
  // Whether a->in_order makes a row faster: with few sums, it must not wait for the latency of the multiply.
  static constexpr bool kInOrder = true;

  template <int R, int V, class Acc>
  NYBBLE_INLINE void start(const NybbleLinearArgs*, int64_t, Acc& acc) {
    each_register(acc, [](auto& one) __attribute__((always_inline)) { zero_register(one); });
  }

  // Saves and loads the sums between K blocks.
  template <class Acc>
  NYBBLE_INLINE void save(uint8_t* slot, Acc& acc) {
    each_register(acc, [&](auto& one) __attribute__((always_inline)) {
      store_register(slot, one);
      slot += sizeof one;
    });
  }
  template <class Acc>
  NYBBLE_INLINE void load(const uint8_t* slot, Acc& acc) {
    each_register(acc, [&](auto& one) __attribute__((always_inline)) {
      load_register(one, slot);
      slot += sizeof one;
    });
  }
};

// Weights along K from begin to end, tile after tile: `bytes` of each, each `stride` after the one before.
struct Streams {
  const uint8_t* codes;
  int64_t bytes, stride, tiles;

  // The packed weights of columns [from, to).
  Streams(const NybbleLinearArgs* a, int64_t from, int64_t to, int64_t begin, int64_t end)
      : codes(codes_at(a, from) + begin * a->code_bits * (NYBBLE_TILE_N / 8)),
        bytes((end - begin) * a->code_bits * (NYBBLE_TILE_N / 8)),
        stride(NYBBLE_TILE_N * column_bytes(a)),
        tiles((to - from) / NYBBLE_TILE_N) {}
  Streams(const uint8_t* at, int64_t size) : codes(at), bytes(size), stride(size), tiles(1) {}

  // The stream of W columns, from the `column`-th of the pass on. Each 64 bytes of a line, packed or decoded, have 4
  // bytes of each of 16 columns; where lines lie side by side, tile_mmla.h goes on from here.
  const uint8_t* at(int64_t column) const {
    return codes + column / NYBBLE_TILE_N * stride + column % NYBBLE_TILE_N * 4;
  }
};

// Prefetches codes, so that memory and multiplier work in parallel. If several row blocks are multiplied with the
// current weights, each prefetches its share of the next ones. A row block whose weights were not prefetched (the
// only one or the first) prefetches a short distance ahead in its own streams, unless its work per line is so light
// that the CPU's own prefetcher does better, see caches.h.
class Prefetcher {
 public:
  Prefetcher(const Streams& next, int64_t blocks)
      : next_(next.codes), run_end_(next.codes + next.bytes), bytes_(next.bytes), stride_(next.stride) {
    left_ = blocks > 1 && bytes_ > 0 ? next.tiles : 0;
    if (stride_ == bytes_) {
      run_end_ += (left_ - 1) * stride_;
      left_ = left_ > 0;
    }
    while (blocks >> (shift_ + 1)) shift_++;
  }

  // Sets whether the weights of the next row block have been prefetched.
  void columns_fetched(bool yes) { fetched_ = yes; }

  // Sets where the first stream of the current tile ends, and how far from there that of the next tile begins: a stream
  // that ends soon prefetches the one that takes its place.
  void streams_end(const uint8_t* end, int64_t jump) {
    end_ = end;
    jump_ = jump;
  }

  // Called after each few lines that every stream has used.
  template <int V>
  void used(const uint8_t* const (&streams)[V], int64_t lines, bool light) {
    if (!fetched_ && !light) {
      constexpr int64_t tiles = V * W > NYBBLE_TILE_N ? V * W / NYBBLE_TILE_N : 1, distance = kPrefetchBytes / tiles;
      const int64_t ahead = distance + (streams[0] + distance >= end_ ? jump_ : 0);
      for (int64_t i = 0; i < lines; i++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) __builtin_prefetch(streams[v] + ahead + i * kLine);
    }
    if (left_ == 0) return;
    for (int64_t i = (lines * V + (int64_t{1} << shift_) - 1) >> shift_; i > 0 && left_ > 0; i--) {
      __builtin_prefetch(next_);
      next_ += kLine;
      if (next_ < run_end_) continue;
      left_--;
      next_ += stride_ - bytes_;
      run_end_ += stride_;
    }
  }

 private:
  // Bytes that are under way, of all tiles: on Zen 5, twice as many cost 5 to 10 % from memory, and half as many up to
  // 15 % at 8 rows.
  static constexpr int64_t kPrefetchBytes = 4096;
  const uint8_t *next_, *run_end_, *end_ = nullptr;
  int64_t bytes_, stride_, left_, jump_ = 0;
  int shift_ = 0;
  bool fetched_ = false;
};

// So many lines of each stream.
template <int n>
struct Lines {
  static constexpr int count = n;
};

// Calls step(Lines<n>), which advances the streams by n lines, until all `lines` are done: kAtOnce at a time, then one.
// Prefetches after every kStep lines.
template <int64_t kStep, int kAtOnce, int V, class Fetch, class Step>
NYBBLE_INLINE void each_lines(int64_t lines, const uint8_t* (&streams)[V], Fetch& prefetcher, bool light,
                              const Step& step) {
  for (; lines >= kStep; lines -= kStep) {
    for (int64_t i = 0; i < kStep; i += kAtOnce) step(Lines<kAtOnce>{});
    prefetcher.used(streams, kStep, light);
  }
  for (; lines > 0; lines--) step(Lines<1>{});
}

// The same with step(), a line at a time.
template <int64_t kStep, int V, class Fetch, class Step>
NYBBLE_INLINE void each_line(int64_t lines, const uint8_t* (&streams)[V], Fetch& prefetcher, bool light,
                             const Step& step) {
  each_lines<kStep, 1>(lines, streams, prefetcher, light, [&](auto) __attribute__((always_inline)) { step(); });
}

// What a register tile multiplies: rows from row, columns from column, K from begin to end.
struct Place {
  int64_t row, column, begin, end;
};

// The columns [from, to) of a pass along K from begin to end, and the byte of a->partial from which the sums of a row
// block are kept, if all of K is not multiplied at a time.
struct KBlock {
  int64_t from, to, begin, end;
  Streams weights;
  int64_t slot;
};

// Bytes of the sums of W columns and the rows of a block.
template <class Tile, int R>
constexpr int64_t slot_bytes() {
  if constexpr (R > 0) {
    constexpr int V = Tile::vectors(R);
    constexpr int64_t here = sizeof(typename Tile::template Acc<R, V>) / V, fewer = slot_bytes<Tile, R - 1>();
    return here > fewer ? here : fewer;
  }
  return 0;
}

template <class Tile, int kRows, int R, int V>
inline void run_tile(const NybbleLinearArgs* a, const KBlock& k, int64_t row, int64_t column, Prefetcher& prefetcher) {
  const int64_t slot = k.slot + (column - k.from) / W * slot_bytes<Tile, kRows>();
  const uint8_t* w[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; v++) w[v] = k.weights.at(column - k.from + v * W);
  prefetcher.streams_end(w[0] + k.weights.bytes, V * W / NYBBLE_TILE_N * k.weights.stride - k.weights.bytes);
  typename Tile::template Acc<R, V> acc;
  if (k.begin == 0)
    Tile::template start<R, V>(a, column, acc);
  else
    Tile::load(static_cast<const uint8_t*>(a->partial) + slot, acc);
  Tile::template run<R, V>(a, Place{row, column, k.begin, k.end}, w, acc, prefetcher);
  if (k.end == a->k_padded)
    Tile::template finish<R, V>(a, row, column, acc);
  else
    Tile::save(static_cast<uint8_t*>(a->partial) + slot, acc);
}

// The widest tile that fits, then the remaining columns with half as many vectors.
template <class Tile, int kRows, int R, int V>
inline void run_columns(const NybbleLinearArgs* a, const KBlock& k, int64_t row, int64_t column, int64_t end,
                        Prefetcher& prefetcher) {
  for (; column + V * W <= end; column += V * W) run_tile<Tile, kRows, R, V>(a, k, row, column, prefetcher);
  if constexpr (V > 1) run_columns<Tile, kRows, R, V / 2>(a, k, row, column, end, prefetcher);
}

// All columns of a pass. A single row that is bound by memory takes a tile at a time: weights are then read in the
// order of addresses, and one stream is faster than several: on Zen 5, by 17 % with w4a8 and 15 % with w4a16. A last
// tile of one column is left to run_last, which may add floats in another order: wherever the pass begins, so that the
// way columns are cut changes no bit.
template <class Tile, int kRows, int R>
inline void run_pass(const NybbleLinearArgs* a, const KBlock& k, int64_t row, Prefetcher& prefetcher) {
  int64_t end = k.to;
  if constexpr (R >= Tile::kLastRows)
    if (a->n - (end - NYBBLE_TILE_N) == 1) {
      end -= NYBBLE_TILE_N;
      if (k.end == a->k_padded) Tile::template run_last<R>(a, row, end);
    }
  constexpr int V = Tile::vectors(R), one_tile = NYBBLE_TILE_N / W;
  if constexpr (R == 1 && Tile::kInOrder && V > one_tile)
    if (a->in_order) return run_columns<Tile, kRows, R, one_tile>(a, k, row, k.from, end, prefetcher);
  run_columns<Tile, kRows, R, V>(a, k, row, k.from, end, prefetcher);
}

template <class Tile, int kRows, int R>
inline void run_rows(const NybbleLinearArgs* a, const KBlock& k, int64_t rows, int64_t row, Prefetcher& prefetcher) {
  if constexpr (R > 0) {
    if (rows == R)
      run_pass<Tile, kRows, R>(a, k, row, prefetcher);
    else
      run_rows<Tile, kRows, R - 1>(a, k, rows, row, prefetcher);
  }
}

// Decodes the weights of a K block of a pass, tile after tile.
template <class Tile>
inline Streams decode_tiles(const NybbleLinearArgs* a, const KBlock& k) {
  uint8_t* to = static_cast<uint8_t*>(a->decoded);
  Streams decoded(to, k.weights.bytes / kLine * Tile::kDecodedLine);
  for (int64_t column = k.from; column < k.to; column += NYBBLE_TILE_N, to += decoded.stride)
    Tile::decode(a, column, k.begin, k.end, to);
  return decoded;
}

// The weights after those of `k`: the next K block, or the first of the next pass.
inline Streams weights_after(const NybbleLinearArgs* a, const KBlock& k, int64_t end) {
  const auto least = [](int64_t x, int64_t y) { return x < y ? x : y; };
  if (k.end < a->k_padded) return Streams(a, k.from, k.to, k.end, least(k.end + a->k_block, a->k_padded));
  return Streams(a, k.to, least(k.to + a->pass, end), 0, least(a->k_block, a->k_padded));
}

// All row blocks of a K block of a pass.
template <class Tile, int kRows>
inline void run_k_block(const NybbleLinearArgs* a, KBlock k, int64_t end) {
  const int64_t blocks = a->block_end - a->block_begin;
  const bool first = k.from == a->tile_begin * NYBBLE_TILE_N && k.begin == 0;
  Prefetcher prefetcher(weights_after(a, k, end), blocks);
  if constexpr (Tile::kDecodedLine > 0) k.weights = decode_tiles<Tile>(a, k);
  for (int64_t block = a->block_begin; block < a->block_end; block++) {
    prefetcher.columns_fetched(Tile::kDecodedLine > 0 || (blocks > 1 && (block > a->block_begin || !first)));
    const int64_t row = block * a->block_rows, rows = a->rows - row < a->block_rows ? a->rows - row : a->block_rows;
    run_rows<Tile, kRows, kRows>(a, k, rows, row, prefetcher);
    k.slot += (k.to - k.from) / W * slot_bytes<Tile, kRows>();
  }
}

// Columns of the widest pass, and K of the longest block.
inline int64_t most_columns(const NybbleLinearArgs* a) {
  const int64_t all = (a->tile_end - a->tile_begin) * NYBBLE_TILE_N;
  return a->pass < all ? a->pass : all;
}
inline int64_t most_k(const NybbleLinearArgs* a) { return a->k_block < a->k_padded ? a->k_block : a->k_padded; }

// Whether the scratch memory holds the sums of a pass, if K is cut: `bytes` for each row block.
inline bool holds_sums(const NybbleLinearArgs* a, int64_t bytes) {
  return a->k_block >= a->k_padded || a->partial_bytes >= (a->block_end - a->block_begin) * bytes;
}

// Whether it holds decoded weights: `bytes` for each tile of 16 columns.
inline bool holds_decoded(const NybbleLinearArgs* a, int64_t bytes) {
  return a->decoded_bytes >= most_columns(a) / NYBBLE_TILE_N * bytes;
}

// Calls run(k) for each K block of each pass.
template <class Run>
inline void each_k_block(const NybbleLinearArgs* a, const Run& run) {
  const int64_t end = a->tile_end * NYBBLE_TILE_N, ks = a->k_padded;
  for (int64_t from = a->tile_begin * NYBBLE_TILE_N; from < end; from += a->pass) {
    const int64_t to = from + a->pass < end ? from + a->pass : end;
    for (int64_t k = 0; k < ks; k += a->k_block) {
      const int64_t k_end = k + a->k_block < ks ? k + a->k_block : ks;
      run(KBlock{from, to, k, k_end, Streams(a, from, to, k, k_end), 0});
    }
  }
}

template <class Tile, int kRows>
inline NybbleStatus run_tiles(const NybbleLinearArgs* a) {
  constexpr int64_t slot = slot_bytes<Tile, kRows>();
  static_assert(slot <= NYBBLE_PARTIAL_BYTES * kRows * W);
  if (a->block_rows > kRows || !holds_sums(a, most_columns(a) / W * slot)) return NYBBLE_UNSUPPORTED;
  if (Tile::kDecodedLine > 0 && !holds_decoded(a, most_k(a) * a->code_bits * 2 / kLine * Tile::kDecodedLine))
    return NYBBLE_UNSUPPORTED;
  each_k_block(a, [&](const KBlock& k) { run_k_block<Tile, kRows>(a, k, a->tile_end * NYBBLE_TILE_N); });
  return NYBBLE_OK;
}

// Index of (column, group) in an array [tiles][groups][16].
inline int64_t group_at(const NybbleLinearArgs* a, int64_t column, int64_t g) {
  return (column / NYBBLE_TILE_N * a->groups + g) * NYBBLE_TILE_N + column % NYBBLE_TILE_N;
}

template <class T>
inline const T* panel_at(const NybbleLinearArgs* a, int64_t row) {
  return static_cast<const T*>(a->panel) + row * a->k_padded;
}

inline VF bias_at(const NybbleLinearArgs* a, int64_t column) {
  const int64_t count = a->n - column;
  if (!a->bias || count <= 0) return vf_set1(0.0f);
  const int64_t bytes = a->bias_dtype == NYBBLE_F32 ? 4 : 2;
  return vf_load_as(static_cast<const uint8_t*>(a->bias) + column * bytes, a->bias_dtype, count);
}

// The stores that are rare: float16, or fewer than W columns. Not inlined, since that took half of a kernel's code.
__attribute__((noinline)) inline void store_few(uint8_t* y, int64_t stride, int dtype, const VF* rows, int count,
                                                int64_t columns) {
  for (int r = 0; r < count; r++, y += stride) vf_store_as(y, dtype, rows[r], columns);
}

// Stores of_row(r) as rows [row, row + R) of W columns of y; skips columns from n on. Loops over rows are unrolled, to
// keep the accumulators in registers.
template <int R, class OfRow>
NYBBLE_INLINE void store_rows(const NybbleLinearArgs* a, int64_t row, int64_t column, const OfRow& of_row) {
  const int64_t count = a->n - column, bytes = a->y_dtype == NYBBLE_F32 ? 4 : 2, stride = a->n * bytes;
  uint8_t* y = static_cast<uint8_t*>(a->y) + (row * a->n + column) * bytes;
  if (count <= 0) return;
  VF rows[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) rows[r] = of_row(r);
  if (count >= W && a->y_dtype == NYBBLE_F32) {
#pragma GCC unroll 16
    for (int r = 0; r < R; r++, y += stride) vf_store(reinterpret_cast<float*>(y), rows[r]);
  } else if (count >= W && a->y_dtype == NYBBLE_BF16) {
#pragma GCC unroll 16
    for (int r = 0; r < R; r++, y += stride) vf_store_as(y, NYBBLE_BF16, rows[r], W);
  } else {
    VF kept[R];  // `rows` stays in registers
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) kept[r] = rows[r];
    store_few(y, stride, a->y_dtype, kept, R, count);
  }
}

// y = (acc - act_zero * column_sum) * (act_scale * scale) + bias, in this order; for int32 y, the accumulators.
template <int R, int V>
NYBBLE_INLINE void finish_w8a8(const NybbleLinearArgs* a, int64_t row, int64_t column, const VI (&acc)[R][V], int v) {
  if (a->y_dtype == NYBBLE_S32) {
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
      if (a->n > column)
        vi_store_as_s32(static_cast<int32_t*>(a->y) + (row + r) * a->n + column, acc[r][v], a->n - column);
    return;
  }
  const VF scale = vf_load(static_cast<const float*>(a->scale) + column), bias = bias_at(a, column);
  const VI sum = vi_load(a->column_sum + column);
  store_rows<R>(a, row, column, [&](int r) __attribute__((always_inline)) {
    const VI centred = vi_sub(acc[r][v], vi_mul(vi_set1(a->act_zero[row + r]), sum));
    return vf_fma(vf_of_int(centred), vf_mul(vf_set1(a->act_scale[row + r]), scale), bias);
  });
}

}  // namespace

#include "tile_groups.h"
