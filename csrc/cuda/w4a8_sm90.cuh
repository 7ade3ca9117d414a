// See w4a8_sm90.cu. A block has consumer warpgroups, each for 64 outputs and the same 128 tokens, and a producer
// warpgroup whose first thread issues the copies. The two blocks of a cluster have tiles with the same tokens: each
// copies half of the activations to both. int32 sums are in two halves of the tokens: while one half is converted to
// float, the other is multiplied, which keeps the tensor cores busy.
#pragma once

#include "finish.cuh"
#include "ring.cuh"

namespace nybble {
namespace cuda {

// Steps: steps of 32 inputs that share a scale: 1, 2 or 4. Whole: one scale for all inputs. Symmetric: all zero points
// are 8.
template <int Warpgroups, int Steps, bool Whole, bool Symmetric>
struct W4A8 {
  static constexpr int kTokens = 128, kOutputs = Warpgroups * kTile, kK = kRowBytes;  // size of a tile
  static constexpr int kWarpgroups = Warpgroups, kSteps = Steps;
  static constexpr int kUnit = Steps * kStepBytes, kUnits = kK / kUnit;  // inputs per unit, units per stage
  static constexpr bool kWhole = Whole, kSymmetric = Symmetric;
  static constexpr int kThreads = (Warpgroups + 1) * kWarpgroup;
  static constexpr int kFew = 56, kMany = 224;  // registers per thread: a scheduler has 504 for its three warps
  static constexpr int kX = kTokens * kRowBytes, kTileBytes = kTile * kTile / 2, kW = 2 * kTileBytes;
  static constexpr int kStage = kX + Warpgroups * kW;
  using Stages = Ring<Warpgroups == 2 ? 7 : 9, kStage>;
  static constexpr int kShare = kTokens / kPair;  // tokens that a block copies
  static constexpr int kHalf = kTokens / 2;       // tokens of one wgmma
  static constexpr int kOut = kHalf * kTile * 4;  // bytes of half a warpgroup's outputs
  static constexpr int kShared = Stages::kBytes + Warpgroups * kOut;
};

// The tiles of a product: tall x wide pairs.
struct W4A8Tiles {
  int64_t tall, wide, count;
  int stages, units;  // per tile
};
template <class T>
NYBBLE_HD W4A8Tiles w4a8_tiles(const NybbleCudaProduct& p) {
  const int64_t tall = (p.m + T::kTokens - 1) / T::kTokens,
                wide = (p.n + T::kOutputs * kPair - 1) / (T::kOutputs * kPair);
  // An even number, because units are processed in pairs; in a unit beyond K the activations are 0.
  const int units = static_cast<int>((p.k_padded + 2 * T::kUnit - 1) / (2 * T::kUnit)) * 2;
  return {tall, wide, tall * wide, (units + T::kUnits - 1) / T::kUnits, units};
}

template <class T>
__device__ __forceinline__ OutputTile w4a8_tile(const W4A8Tiles& tiles, const Turn& turn, int64_t i) {
  const OutputTile at = output_tile(i, tiles.tall, tiles.wide);
  return {at.row, at.column * kPair + turn.block};
}

// A warpgroup's tile of weights. Beyond the last tile it repeats the last, and its outputs are not stored.
template <class T>
__device__ __forceinline__ int64_t w4a8_weights(const NybbleCudaProduct& p, int64_t column, int warpgroup) {
  const int64_t tile = column * T::kWarpgroups + warpgroup, last = p.n_padded / kTile - 1;
  return tile < last ? tile : last;
}

template <class T>
__device__ __forceinline__ void w4a8_copy(const NybbleCudaProduct& p, const typename T::Stages& ring,
                                          const W4A8Tiles& tiles, const Turn& turn, const TensorMap* x) {
  const int64_t blocks = p.k_padded / kTile;
  Slot slot{0, 0};
  for (int64_t tile = turn.first; tile < tiles.count; tile += turn.step) {
    const OutputTile at = w4a8_tile<T>(tiles, turn, tile);
    for (int i = 0; i < tiles.stages; i++) {
      const int64_t left = (blocks - 2 * i) * T::kTileBytes;
      const int bytes = left < T::kW ? left < 0 ? 0 : static_cast<int>(left) : T::kW;
      Barrier* full = ring.fill(slot, T::kX + T::kWarpgroups * bytes);
      unsigned char* stage = ring.stage(slot);
      const int first = turn.block * T::kShare, row = static_cast<int>(at.row * T::kTokens) + first;
      copy_box_to(kBothBlocks, stage + first * kRowBytes, x, full, i * T::kK, row);
#pragma unroll
      for (int w = 0; w < T::kWarpgroups; w++) {
        const uint8_t* codes = p.codes + (w4a8_weights<T>(p, at.column, w) * blocks + 2 * i) * T::kTileBytes;
        if (bytes) copy_bytes(stage + T::kX + w * T::kW, codes, bytes, full);
      }
      ring.advance(slot);
    }
  }
}

// Scales and zero points of a lane's two adjacent rows for one group.
struct W4A8Group {
  uint32_t scales, zeros;
};

// Scales and zero points of a lane's rows along K.
template <class T>
struct W4A8Rows {
  const uint16_t* scale;
  const uint8_t* zero;
  int64_t n_padded;
  int groups;

  // The values for a unit; scale 0 beyond the last group.
  __device__ __forceinline__ W4A8Group group(int unit) const {
    W4A8Group found{0, 0x0808};
    if (!T::kWhole && unit >= groups) return found;
    const int64_t at = T::kWhole ? 0 : unit * n_padded;
    found.scales = *reinterpret_cast<const uint32_t*>(scale + at);
    if (!T::kSymmetric && zero) found.zeros = *reinterpret_cast<const uint16_t*>(zero + at);
    return found;
  }
};
template <class T>
__device__ __forceinline__ W4A8Rows<T> w4a8_rows(const NybbleCudaProduct& p, int64_t column, int warp, int lane) {
  const int64_t row = w4a8_weights<T>(p, column, warp / kWarps) * kTile + 8 * group_of_lane(lane) + 2 * (warp % kWarps);
  const int groups = T::kWhole ? 1 : static_cast<int>(p.k_padded / T::kUnit);
  return {p.scale + row, p.zero_point ? p.zero_point + row : nullptr, p.n_padded, groups};
}

// Unpacks two words of a lane's codes to wgmma's left operand: 16 (n - 8), or n - z.
template <class T>
__device__ __forceinline__ void w4a8_unpack(uint32_t first, uint32_t second, const uint32_t (&plus)[2], uint32_t* a) {
  const uint32_t words[2] = {first, second};
#pragma unroll
  for (int i = 0; i < 2; i++) {
    if (T::kSymmetric) {
      a[2 * i] = and_xor(words[i] << 4, 0xF0F0F0F0u, 0x80808080u);
      a[2 * i + 1] = and_xor(words[i], 0xF0F0F0F0u, 0x80808080u);
    } else {
      a[2 * i] = ((words[i] & 0x0F0F0F0Fu) + plus[0]) ^ 0x80808080u;
      a[2 * i + 1] = ((words[i] >> 4 & 0x0F0F0F0Fu) + plus[1]) ^ 0x80808080u;
    }
  }
}

// Loads the left operands of unit i of a stage. Odd: whether i is odd, needed at compile time for units of one step.
template <class T, bool Odd>
__device__ __forceinline__ void w4a8_load(const unsigned char* stage, int i, int warp, int lane, uint32_t zeros,
                                          uint32_t (&a)[4 * T::kSteps]) {
  const auto* codes = reinterpret_cast<const Vector*>(stage + T::kX + warp / kWarps * T::kW);
  // 128 - z in each byte: adding n causes no carry into the next byte.
  const uint32_t plus[2] = {0x80808080u - (zeros & 255) * 0x01010101u, 0x80808080u - (zeros >> 8 & 255) * 0x01010101u};
#pragma unroll
  for (int s = 0; s < T::kSteps; s++) {
    const int block = (i * T::kSteps + s) / 2, half = T::kSteps == 1 ? Odd : s % 2;
    const Vector v = load_shared(codes + (block * 4 + warp % kWarps) * kLanes + lane);
    w4a8_unpack<T>(v.w[2 * half], v.w[2 * half + 1], plus, a + 4 * s);
  }
}

struct W4A8Stage {
  unsigned char* memory;
  int index;
};

// Issues the wgmma of a unit for half of the tokens. fresh: overwrite c instead of adding to it.
template <class T>
__device__ __forceinline__ void w4a8_issue(const W4A8Stage& stage, int unit, int half, bool fresh,
                                           const uint32_t (&a)[4 * T::kSteps], int32_t (&c)[32]) {
  const uint64_t x =
      operand(shared_address(stage.memory) + half * T::kHalf * kRowBytes + unit % T::kUnits * T::kSteps * kStepBytes);
  wgmma_fence();
#pragma unroll
  for (int s = 0; s < T::kSteps; s++) wgmma_s8(c, a + 4 * s, x + s * (kStepBytes / 16), !fresh || s);
  wgmma_commit();
}

// total += scale * c, for the sums c of a group.
template <class T>
__device__ __forceinline__ void w4a8_add(const int32_t (&c)[32], uint32_t scales, float (&total)[32]) {
  constexpr float kUnit = T::kSymmetric ? 0.0625f : 1.0f;
  const float scale[2] = {as_float(scales << 16) * kUnit, as_float(scales & 0xFFFF0000u) * kUnit};
#pragma unroll
  for (int i = 0; i < 32; i++) total[i] = fused(scale[i >> 1 & 1], static_cast<float>(c[i]), total[i]);
}

// Pipeline state of a warp: sums of two halves of the tokens; left operands and scales of the current and next unit.
template <class T>
struct W4A8State {
  uint32_t a[2][4 * T::kSteps];
  int32_t c[2][32];
  float total[2][32];
  W4A8Group group[2], ahead[2];  // ahead: prefetched for the units two later
  Slot slot;                     // next stage
  W4A8Stage stage;               // current stage
};

// Loads the left operands of a unit; waits for the stage if the unit is its first.
template <class T, bool Odd>
__device__ __forceinline__ void w4a8_enter(const typename T::Stages& ring, const W4A8Rows<T>& rows, int unit, int warp,
                                           int lane, W4A8State<T>& s) {
  s.group[Odd] = s.ahead[Odd];
  s.ahead[Odd] = rows.group(unit + 2);
  if (unit % T::kUnits == 0) {
    ring.wait_full(s.slot);
    s.stage = {ring.stage(s.slot), s.slot.index};
    ring.advance(s.slot);
  }
  w4a8_load<T, Odd>(s.stage.memory, unit % T::kUnits, warp, lane, s.group[Odd].zeros, s.a[Odd]);
}

// Multiplies two units, whose four halves run back to back: while one is multiplied, the sums of the previous one are
// added, and the next unit's left operands are unpacked.
template <class T>
__device__ __forceinline__ void w4a8_pair(const typename T::Stages& ring, const W4A8Rows<T>& rows, int unit, int units,
                                          int warp, int lane, W4A8State<T>& s) {
  const W4A8Stage first = s.stage;
  const bool fresh = !T::kWhole || unit == 0;
#pragma unroll
  for (int half = 0; half < 2; half++) w4a8_issue<T>(first, unit, half, fresh, s.a[0], s.c[half]);
  w4a8_enter<T, true>(ring, rows, unit + 1, warp, lane, s);
  const W4A8Stage second = s.stage;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    wgmma_wait<1>(s.c[half]);
    if (half && T::kUnits == 1) ring.give_back(first.index);
    if (!T::kWhole) w4a8_add<T>(s.c[half], s.group[0].scales, s.total[half]);
    w4a8_issue<T>(second, unit + 1, half, !T::kWhole, s.a[1], s.c[half]);
  }
  if (unit + 2 < units) w4a8_enter<T, false>(ring, rows, unit + 2, warp, lane, s);
  wgmma_wait<1>(s.c[0]);
  if (!T::kWhole) w4a8_add<T>(s.c[0], s.group[1].scales, s.total[0]);
  wgmma_wait<0>(s.c[1]);
  if ((unit + 2) % T::kUnits == 0 || unit + 2 == units) ring.give_back(second.index);
  if (!T::kWhole) w4a8_add<T>(s.c[1], s.group[1].scales, s.total[1]);
}

// Computes the sums of a tile.
template <class T>
__device__ __forceinline__ void w4a8_multiply(const typename T::Stages& ring, const W4A8Rows<T>& rows, int units,
                                              int warp, int lane, W4A8State<T>& s) {
#pragma unroll
  for (int i = 0; i < 64; i++) s.total[i / 32][i % 32] = 0;
#pragma unroll
  for (int i = 0; i < 2; i++) s.ahead[i] = rows.group(i);
  w4a8_enter<T, false>(ring, rows, 0, warp, lane, s);
  for (int unit = 0; unit < units; unit += 2) w4a8_pair<T>(ring, rows, unit, units, warp, lane, s);
  if constexpr (T::kWhole) {
#pragma unroll
    for (int half = 0; half < 2; half++) w4a8_add<T>(s.c[half], s.group[0].scales, s.total[half]);
  }
}

// Position in shared memory of a pair of adjacent outputs, 32 pairs per token. Swizzled so that eight lanes that write,
// and eight that read two pairs each, access different banks.
__device__ __forceinline__ int w4a8_place(int token, int pair) { return token * 32 + (pair ^ (token >> 1 & 3)); }

// Weight sums and biases of four adjacent outputs, for the epilogue.
struct W4A8Output {
  int64_t n;
  float sum[4], bias[4];
};
__device__ __forceinline__ W4A8Output w4a8_output(const NybbleCudaProduct& p, int64_t n) {
  W4A8Output output{n, {0, 0, 0, 0}, {0, 0, 0, 0}};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if (n + i >= p.n) continue;
    output.sum[i] = p.weight_sum[n + i];
    if (p.bias) output.bias[i] = read(p.bias, p.bias_dtype, n + i);
  }
  return output;
}

__device__ __forceinline__ void w4a8_store(const NybbleCudaProduct& p, int64_t token, const W4A8Output& output,
                                           const float (&sums)[4]) {
  if (token >= p.m || output.n >= p.n) return;
  const float zero = static_cast<float>(p.act_zero[token]), scale = p.act_scale[token];
  float y[4];
#pragma unroll
  for (int i = 0; i < 4; i++) y[i] = fused(fused(-zero, output.sum[i], sums[i]), scale, output.bias[i]);
  const int64_t at = token * p.n + output.n;
  if (p.n % 4 == 0) return write_four(p.y, p.y_dtype, at, y);
#pragma unroll
  for (int i = 0; i < 4; i++)
    if (output.n + i < p.n) write(p.y, p.y_dtype, at + i, y[i]);
}

// Writes a warpgroup's tile to y, transposed through shared memory, half of the tokens at a time.
template <class T>
__device__ __forceinline__ void w4a8_write(const NybbleCudaProduct& p, const OutputTile& at, int warp, int lane,
                                           unsigned char* memory, const float (&total)[2][32]) {
  constexpr int kVectors = kTile / 4;  // per token
  const int thread = threadIdx.x % kWarpgroup, vector = thread % kVectors;
  const W4A8Output output = w4a8_output(p, at.column * T::kOutputs + warp / kWarps * kTile + 4 * vector);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    sync_warpgroup(1 + warp / kWarps);  // the previous contents have been read
#pragma unroll
    for (int i = 0; i < 16; i++) {
      const int token = 8 * (i / 2) + 2 * thread_in_group(lane) + i % 2, first = 4 * (i / 2) + i % 2;
      const int pair = w4a8_place(token, 4 * group_of_lane(lane) + warp % kWarps);
      store_shared_8(memory + 8 * pair, as_bits(total[half][first]), as_bits(total[half][first + 2]));
    }
    sync_warpgroup(1 + warp / kWarps);
#pragma unroll 4
    for (int token = thread / kVectors; token < T::kHalf; token += kWarpgroup / kVectors) {
      const Vector v = load_shared(reinterpret_cast<const Vector*>(memory) + w4a8_place(token, 2 * vector) / 2);
      const bool swapped = token >> 1 & 1;
      const float sums[4] = {as_float(swapped ? v.w[2] : v.w[0]), as_float(swapped ? v.w[3] : v.w[1]),
                             as_float(swapped ? v.w[0] : v.w[2]), as_float(swapped ? v.w[1] : v.w[3])};
      w4a8_store(p, at.row * T::kTokens + half * T::kHalf + token, output, sums);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1)
    w4a8_sm90_kernel(const NybbleCudaProduct p, const __grid_constant__ TensorMap x) {
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const auto ring = T::Stages::here();
  ring.set_up(T::kWarpgroups * kWarps);
  const W4A8Tiles tiles = w4a8_tiles<T>(p);
  const Turn turn = turn_of_block();
  if (warp >= T::kWarpgroups * kWarps) {
    shrink_registers<T::kFew>();
    if (threadIdx.x == T::kWarpgroups * kWarpgroup) w4a8_copy<T>(p, ring, tiles, turn, &x);
    return ring.leave();
  }
  grow_registers<T::kMany>();
  W4A8State<T> state;
  state.slot = {0, 0};
  for (int64_t tile = turn.first; tile < tiles.count; tile += turn.step) {
    const OutputTile at = w4a8_tile<T>(tiles, turn, tile);
    const W4A8Rows<T> rows = w4a8_rows<T>(p, at.column, warp, lane);
    w4a8_multiply<T>(ring, rows, tiles.units, warp, lane, state);
    w4a8_write<T>(p, at, warp, lane, ring.after() + warp / kWarps * T::kOut, state.total);
  }
  ring.leave();
}

}  // namespace cuda
}  // namespace nybble
