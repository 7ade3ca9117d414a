// See w8a8_sm90.cu. A block has two consumer warpgroups, one for each half of its tokens, and a producer warpgroup
// whose first thread issues the copies. Blocks are persistent: the copies for the next tile start while the last is
// written. The two blocks of a cluster have tiles with the same outputs: each copies half of the weights to both.
#pragma once

#include "finish.cuh"
#include "ring.cuh"

namespace nybble {
namespace cuda {

// Tiles of 128 tokens and 256 outputs, or 128 outputs if there would be too few tiles.
template <int Outputs>
struct W8A8 {
  static constexpr int kTokens = 128, kOutputs = Outputs, kK = kRowBytes;  // size of a tile
  static constexpr int kWarpgroups = 2, kStages = Outputs == 256 ? 4 : 6;
  static constexpr int kSums = Outputs / 2;  // per thread
  static constexpr int kThreads = (kWarpgroups + 1) * kWarpgroup;
  static constexpr int kFew = 40, kMany = 232;         // registers per thread: a scheduler has 504 for its three warps
  static constexpr int kRows = kTokens / kWarpgroups;  // tokens per warpgroup
  static constexpr int kX = kTokens * kRowBytes, kStage = kX + kOutputs * kRowBytes;
  static constexpr int kShare = kOutputs / kPair;  // rows of weights that a block copies
  using Stages = Ring<kStages, kStage>;
  static constexpr int kEnds = kWarpgroups * kOutputs * 16;  // bytes of the epilogue parameters of each warpgroup
  static constexpr int kShared = Stages::kBytes + kEnds;
};

// Epilogue parameters of a token, and of an output feature.
struct W8A8Token {
  int64_t index;
  float scale;
  int32_t zero;
};
struct alignas(16) W8A8Output {
  float scale, bias;
  int32_t sum;
};

// The tiles of a product: tall x wide pairs.
struct W8A8Tiles {
  int64_t tall, wide, count;
  int steps;
};
template <class T>
NYBBLE_HD W8A8Tiles w8a8_tiles(const NybbleCudaProduct& p) {
  const int64_t tall = (p.m + T::kTokens * kPair - 1) / (T::kTokens * kPair),
                wide = (p.n + T::kOutputs - 1) / T::kOutputs;
  return {tall, wide, tall * wide, static_cast<int>(p.k_padded / T::kK)};
}

template <class T>
__device__ __forceinline__ OutputTile w8a8_tile(const W8A8Tiles& tiles, const Turn& turn, int64_t i) {
  const OutputTile at = output_tile(i, tiles.tall, tiles.wide);
  return {at.row * kPair + turn.block, at.column};
}

template <class T>
__device__ __forceinline__ void w8a8_copy(const typename T::Stages& ring, const W8A8Tiles& tiles, const Turn& turn,
                                          const TensorMap* x, const TensorMap* w) {
  Slot slot{0, 0};
  for (int64_t tile = turn.first; tile < tiles.count; tile += turn.step) {
    const OutputTile at = w8a8_tile<T>(tiles, turn, tile);
    for (int step = 0; step < tiles.steps; step++) {
      Barrier* full = ring.fill(slot, T::kStage);
      unsigned char* stage = ring.stage(slot);
      copy_box(stage, x, full, step * T::kK, static_cast<int>(at.row * T::kTokens));
      const int first = turn.block * T::kShare, row = static_cast<int>(at.column * T::kOutputs) + first;
      copy_box_to(kBothBlocks, stage + T::kX + first * kRowBytes, w, full, step * T::kK, row);
      ring.advance(slot);
    }
  }
}

// Computes the sums of a tile: while one step is in flight, the next is issued, and the previous one's stage is
// released.
template <class T>
__device__ __forceinline__ void w8a8_multiply(const typename T::Stages& ring, int steps, int warpgroup, Slot& slot,
                                              int32_t (&c)[T::kSums]) {
  int before = 0;
  for (int step = 0; step < steps; step++) {
    ring.wait_full(slot);
    const uint32_t stage = shared_address(ring.stage(slot));
    const uint64_t x = operand(stage + warpgroup * T::kRows * kRowBytes), w = operand(stage + T::kX);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < T::kK / kStepBytes; k++)
      wgmma_s8(c, x + k * (kStepBytes / 16), w + k * (kStepBytes / 16), step + k);
    wgmma_commit();
    wgmma_wait<1>(c);
    if (step) ring.give_back(before);
    before = slot.index;
    ring.advance(slot);
  }
  wgmma_wait<0>(c);
  ring.give_back(before);
}

__device__ __forceinline__ W8A8Token w8a8_token(const NybbleCudaProduct& p, int64_t m) {
  return m < p.m ? W8A8Token{m, p.act_scale[m], p.act_zero[m]} : W8A8Token{m, 0, 0};
}
__device__ __forceinline__ W8A8Output w8a8_output(const NybbleCudaProduct& p, int64_t n) {
  if (n >= p.n) return {0, 0, 0};
  return {p.row_scale[n], p.bias ? read(p.bias, p.bias_dtype, n) : 0.0f, p.column_sum[n]};
}

// The epilogue, with the same operations as `finished` (finish.cuh), to give the same bits.
__device__ __forceinline__ float w8a8_finish(int32_t sum, const W8A8Token& token, const W8A8Output& output) {
  const float centred = static_cast<float>(sum - token.zero * output.sum);
  return fused(centred, token.scale * output.scale, output.bias);
}

// Transposes four words of each of four adjacent lanes: lane t gets word t of all four.
__device__ __forceinline__ void transpose(uint32_t (&v)[4], int lane) {
#pragma unroll
  for (int mask = 1; mask <= 2; mask *= 2) {
    const bool upper = lane & mask;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (i & mask) continue;
      const uint32_t got = from_lane_xor(upper ? v[i] : v[i ^ mask], mask);
      upper ? v[i] = got : v[i ^ mask] = got;
    }
  }
}

// Stores 32 outputs of a token from column n on; y[j][e] of a lane is column 8 j + 2 t + e. whole: rows of y consist of
// whole 16-byte vectors.
template <int Dtype>
__device__ __forceinline__ void w8a8_store(const NybbleCudaProduct& p, int64_t token, int64_t n, bool whole, int lane,
                                           const float (&y)[4][2]) {
  const int t = thread_in_group(lane);
  char* row = static_cast<char*>(p.y) + token * p.n * (Dtype == NYBBLE_F32 ? 4 : 2);
  if (whole && Dtype == NYBBLE_F32) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int64_t at = n + 8 * j + 2 * t;
      if (token < p.m && at < p.n) store_global_8(row + at * 4, as_bits(y[j][0]), as_bits(y[j][1]));
    }
  } else if (whole) {
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 4; j++) words[j] = half_bits(Dtype, y[j][0]) | half_bits(Dtype, y[j][1]) << 16;
    transpose(words, lane);
    const int64_t at = n + 8 * t;
    if (token < p.m && at < p.n) store_global(row + at * 2, {{words[0], words[1], words[2], words[3]}});
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int64_t at = n + 8 * (i / 2) + 2 * t + i % 2;
      if (token < p.m && at < p.n) write(row, Dtype, at, y[i / 2][i % 2]);
    }
  }
}

// Epilogue parameters that a thread reads before the multiply: for its tokens, and for outputs that it will share with
// its warpgroup.
template <class T>
struct W8A8Ends {
  W8A8Token tokens[2];
  W8A8Output outputs[T::kOutputs / kWarpgroup];
};
template <class T>
__device__ __forceinline__ W8A8Ends<T> w8a8_ends(const NybbleCudaProduct& p, const OutputTile& at, int warp, int lane) {
  const int64_t m = at.row * T::kTokens + warp * 16 + group_of_lane(lane);
  const int64_t n = at.column * T::kOutputs + threadIdx.x % kWarpgroup;
  W8A8Ends<T> ends{{w8a8_token(p, m), w8a8_token(p, m + 8)}, {}};
#pragma unroll
  for (int i = 0; i < T::kOutputs / kWarpgroup; i++) ends.outputs[i] = w8a8_output(p, n + i * kWarpgroup);
  return ends;
}

// Writes a tile to y. outputs: epilogue parameters of all columns of the tile, in shared memory.
template <class T, int Dtype>
__device__ __forceinline__ void w8a8_write(const NybbleCudaProduct& p, const OutputTile& at, int lane,
                                           const W8A8Token (&tokens)[2], const W8A8Output* outputs,
                                           const int32_t (&c)[T::kSums]) {
  const bool whole = p.n % (Dtype == NYBBLE_F32 ? 4 : 8) == 0;
#pragma unroll
  for (int eight = 0; eight < T::kOutputs / 8; eight += 4) {
    float y[2][4][2];
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int j = eight + i / 2, e = i % 2;
      const Vector v = load_shared(reinterpret_cast<const Vector*>(outputs + 8 * j + 2 * thread_in_group(lane) + e));
      const W8A8Output output{as_float(v.w[0]), as_float(v.w[1]), static_cast<int32_t>(v.w[2])};
#pragma unroll
      for (int h = 0; h < 2; h++) y[h][i / 2][e] = w8a8_finish(c[4 * j + 2 * h + e], tokens[h], output);
    }
#pragma unroll
    for (int h = 0; h < 2; h++)
      w8a8_store<Dtype>(p, tokens[h].index, at.column * T::kOutputs + 8 * eight, whole, lane, y[h]);
  }
}

template <class T, int Dtype>
__global__ void __launch_bounds__(T::kThreads, 1)
    w8a8_sm90_kernel(const NybbleCudaProduct p, const __grid_constant__ TensorMap x,
                     const __grid_constant__ TensorMap w) {
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const auto ring = T::Stages::here();
  ring.set_up(T::kWarpgroups * kWarps);
  const W8A8Tiles tiles = w8a8_tiles<T>(p);
  const Turn turn = turn_of_block();
  if (warp >= T::kWarpgroups * kWarps) {
    shrink_registers<T::kFew>();
    if (threadIdx.x == T::kWarpgroups * kWarpgroup) w8a8_copy<T>(ring, tiles, turn, &x, &w);
    return ring.leave();
  }
  grow_registers<T::kMany>();
  const int warpgroup = warp / kWarps;
  W8A8Output* outputs = reinterpret_cast<W8A8Output*>(ring.after()) + warpgroup * T::kOutputs;
  Slot slot{0, 0};
  for (int64_t tile = turn.first; tile < tiles.count; tile += turn.step) {
    const OutputTile at = w8a8_tile<T>(tiles, turn, tile);
    const W8A8Ends<T> ends = w8a8_ends<T>(p, at, warp, lane);
    int32_t c[T::kSums];
    w8a8_multiply<T>(ring, tiles.steps, warpgroup, slot, c);
    sync_warpgroup(1 + warpgroup);  // the last tile's parameters have been read
#pragma unroll
    for (int i = 0; i < T::kOutputs / kWarpgroup; i++)
      outputs[threadIdx.x % kWarpgroup + i * kWarpgroup] = ends.outputs[i];
    sync_warpgroup(1 + warpgroup);
    w8a8_write<T, Dtype>(p, at, lane, ends.tokens, outputs, c);
  }
  ring.leave();
}

}  // namespace cuda
}  // namespace nybble
