// The interface between the driver and the CPU kernels: plain C structs, no ownership, no exceptions.
// A kernel file includes only this, C headers, intrinsics and tile_*.h.
#pragma once

#include <stddef.h>
#include <stdint.h>

enum NybbleDtype { NYBBLE_F32 = 0, NYBBLE_BF16 = 1, NYBBLE_F16 = 2, NYBBLE_S32 = 3, NYBBLE_S8 = 4 };

enum NybbleStatus { NYBBLE_OK = 0, NYBBLE_UNSUPPORTED = 1 };

// Element format of an activation panel. Integer formats hold codes q in [-128, 127], or fewer (act_steps), with one
// scale and one zero point per row: x = (q - act_zero) * act_scale.
enum NybblePanel {
  NYBBLE_PANEL_F32 = 0,  // float32 activations
  NYBBLE_PANEL_S8 = 1,   // codes
  NYBBLE_PANEL_S16 = 2,  // codes, widened to 16 bits; each four k in the order 0 2 1 3
  NYBBLE_PANEL_U8 = 3,   // codes + 128, for u8 x s8 multiplies
  NYBBLE_PANEL_BF16 =
      4,                // bfloat16 activations; each four k in the order 0 2 1 3, so that multiplied pairs are adjacent
  NYBBLE_PANEL_U7 = 5,  // codes + 64, of codes in [-64, 63]: two products with s8 fit in 16 bits
  // Codes, two words of four k of a row together: of 16 k the words 0 and 2, then 1 and 3; of the k after the last 16
  // the words 0 and 1; and a last word alone. [pairs][r][8], and then [r][4].
  NYBBLE_PANEL_S8_PAIRS = 6,
  // Lines, the last formats: 64 bytes of consecutive k of a row together, [lines][r][64 bytes]. The last line is filled
  // up with zeros.
  NYBBLE_PANEL_U8_LINES = 7,    // codes + 128; k_padded is a multiple of 64
  NYBBLE_PANEL_S8_LINES = 8,    // codes
  NYBBLE_PANEL_BF16_LINES = 9,  // bfloat16 activations in the order of BF16
};

// Columns of a packed weight tile, in every packed layout; bytes of a line of a panel, so many k in U8_LINES.
enum { NYBBLE_TILE_N = 16, NYBBLE_LINE_K = 64 };

// k whose lines share a byte of the section `large`, and bytes of a tile's part of it.
enum { NYBBLE_LARGE_K = 64 };
static inline int64_t nybble_large_bytes(int64_t k_padded) { return (k_padded + NYBBLE_LARGE_K - 1) / NYBBLE_LARGE_K; }

// Bytes from where a column's codes of a tile begin to its word w, where lines lie side by side: words i and i + half
// of 16 k, half of which are `half` (2 with 8 bits, 1 with 4).
static inline int64_t nybble_paired_place(int64_t w, int64_t half) {
  return w / (2 * half) * (128 * half) + w % half * 128 + w / half % 2 * 4;
}

// Groups that share a scale and a minimum, of weights with levels.
enum { NYBBLE_BLOCK_GROUPS = 8 };
static inline int64_t nybble_scale_blocks(int64_t groups) {
  return (groups + NYBBLE_BLOCK_GROUPS - 1) / NYBBLE_BLOCK_GROUPS;
}

// Lines of a mask layout whose masks are stored together.
enum { NYBBLE_MASK_LINES = 8 };

// Bytes of an element of a panel, and of a row of k_padded elements.
static inline int64_t nybble_panel_element(int32_t format) {
  if (format == NYBBLE_PANEL_F32) return 4;
  return format == NYBBLE_PANEL_S16 || format == NYBBLE_PANEL_BF16 || format == NYBBLE_PANEL_BF16_LINES ? 2 : 1;
}
static inline int64_t nybble_panel_row(int32_t format, int64_t k_padded) {
  const int64_t bytes = k_padded * nybble_panel_element(format);
  return format >= NYBBLE_PANEL_U8_LINES ? (bytes + NYBBLE_LINE_K - 1) / NYBBLE_LINE_K * NYBBLE_LINE_K : bytes;
}

// Packs the activations of `rows` tokens into a panel, in blocks of `block_rows` rows; the last block may have fewer.
// Block b, of r rows, starts after b * block_rows rows and is [k_padded / 4][r][4], except in pairs and in lines.
// Elements from k to k_padded have the code 0.
struct NybblePrepareArgs {
  const void* x;  // [rows][ldx] elements of x_dtype
  int64_t ldx;
  int32_t x_dtype;
  int32_t panel_format;
  int64_t rows, k, k_padded, block_rows;
  int64_t group, groups;  // group * groups == k_padded
  const int32_t* order;   // [k]: the element of x that comes at each k of the panel; null: the same
  void* panel;
  // The rest is for integer formats only.
  float* act_scale;   // [rows]; NaN for a row with a NaN or an Inf
  int32_t* act_zero;  // [rows] zero points
  int32_t* act_sum;   // [rows][groups] sums of codes times sum_factor, or null
  int32_t sum_factor;
  int32_t act_steps;  // from the lowest code to the highest: 255 for [-128, 127], 127 for [-64, 63]
  // 0: dynamic quantization, each row by its own range. Otherwise static quantization: all rows have this scale, in
  // [2^-126, 2^126], and this zero point, one of the codes; values outside the code range are clamped.
  float given_scale;
  int32_t given_zero;
  int64_t block_begin, block_end;  // row blocks of this call
};

// y[m][n] = sum_k x[m][k] * w[n][k] + bias[n] over row blocks [block_begin, block_end) and column tiles
// [tile_begin, tile_end). The weight pointers are the sections of a packed layout (see pack.h).
struct NybbleLinearArgs {
  const void* panel;
  const float* act_scale;
  const int32_t* act_zero;
  // Of weights with scales by group: sums of the codes, multiplied by -1; or where zero_point is null by minus the code
  // of the weight 0, -8 (3 bits: -4, 8 bits: -128); or by 1 where minimum is not.
  const int32_t* act_sum;
  const uint8_t* codes;
  const void* scale;          // [tiles * 16], or [tiles][groups][16] by group, of scale_dtype
  const uint8_t* zero_point;  // [tiles][groups][16] by group, or null: 8 (3 bits: 4), or 0 with minimum; 8 bits: + 128
  const void* minimum;        // likewise, of scale_dtype: weight = code * scale + minimum; null: none
  const int32_t* column_sum;  // [tiles * 16] sums of codes; not by group
  const uint8_t* large;       // [tiles][nybble_large_bytes(k_padded)], layout n16k4 only; see pack.h
  const float* weight_sum;    // [tiles * 16] sums of weights, by group only
  const float* book;          // [16] the value of each code in units of the scale, or null: codes are numbers
  const void* bias;           // [n] elements of bias_dtype, or null
  void* y;                    // [rows][n] elements of y_dtype
  int32_t bias_dtype, y_dtype;
  int32_t scale_dtype;  // f32; by group bf16, f16 or f32
  int64_t rows, n, k_padded, block_rows;
  int64_t group, groups;
  int64_t code_bits;
  // Sparse weights only, see pack.h.
  const uint64_t* start;
  const uint16_t* window;
  const int32_t* order;  // null: the identity
  const int32_t* index;
  int64_t block_n, block_k;
  int64_t block_begin, block_end, tile_begin, tile_end;
  // How the product is cut so that its parts stay in the caches, see blocking.h. It changes no bit of the result.
  int64_t k_block;     // K multiplied at a time, of whole groups by group and for integers; k_padded or more: all
  int64_t pass;        // columns multiplied with all row blocks before the next ones
  int64_t pass_bytes;  // the same as bytes of weights, for the layouts in which columns differ in size
  int64_t one_stream;  // whether few rows leave all fetching to the hardware, see caches.h
  int64_t in_order;    // whether a single row is multiplied with one tile at a time; else with as many as is fastest
  void* partial;       // scratch for the sums of a pass between K blocks; null if all of K is multiplied at a time
  void* decoded;       // scratch for the decoded weights of a K block of a pass; null: decode in registers
  int64_t partial_bytes, decoded_bytes;  // their sizes; a kernel that needs more refuses
  // [tiles][groups][2][16], or null. Each group's scale is its first number times the scale of its block of
  // NYBBLE_BLOCK_GROUPS groups, and its minimum is minus its second number times that of the block: scale and minimum
  // are [tiles][blocks][16], of f16.
  const uint8_t* levels;
};

// A size of `partial` that is enough: so many bytes for each row of the blocks, with all of block_rows, and column of a
// pass.
enum { NYBBLE_PARTIAL_BYTES = 8 };

// Expands the mask layout to lines of the dense layout: tiles [tile_begin, tile_end), written from `to` on.
struct NybbleExpandArgs {
  const uint64_t* start;
  const uint8_t* codes;
  uint8_t* to;
  int64_t lines;  // per tile
  int64_t code_bits;
  int64_t tile_begin, tile_end;
};

enum NybbleMask {
  NYBBLE_MASK_NONE = 0,
  NYBBLE_MASK_BOOL = 1,  // bytes, not 0: the query sees the key
  NYBBLE_MASK_F32 = 2,   // added to the scaled scores; -inf: the query does not see the key
  NYBBLE_MASK_BF16 = 3,
  NYBBLE_MASK_F16 = 4,
};

// y = softmax(q k^T * scale + mask) v for queries that read one head of keys and values. A column is a pair of a query
// and one of the `heads` heads that share the keys: head * queries + query. Strides are in elements; those of the last
// dimension are 1. A column that sees no key gives 0.
struct NybbleAttentionArgs {
  const void *q, *k, *v;
  void* y;
  int32_t dtype;  // of q, y, and of k and v unless they have scales
  int32_t mask_kind;
  int64_t heads, queries, keys, head_dim, value_dim;
  int64_t q_head, q_token, k_token, v_token, y_head, y_token;
  const void* mask;
  int64_t mask_head, mask_query, mask_key;
  const float* slopes;             // [heads], or null; adds slope * (key - (keys - queries + query))
  const float *k_scale, *v_scale;  // of each key, or both null; else k and v are int8 codes, in units of them
  int64_t k_scale_token, v_scale_token;
  float scale;
  int32_t causal;                                        // query i sees the keys up to i + keys - queries
  int64_t window;                                        // 0, or with causal: it sees only the last so many of them
  int64_t column_begin, column_end, key_begin, key_end;  // of this call
  void* scratch;                                         // nybble_attention_scratch bytes, aligned to 64
  int64_t scratch_bytes;
  // Where keys are split over calls: each leaves its sums in `partial`, instead of writing y, and a last call merges
  // them. nybble_attention_partial bytes a part, aligned to 64.
  void* partial;
  int64_t parts;  // of the last call; else 0
  // Of the int8 kernels only: the codes of all keys and values, nybble_attention8_packed bytes, aligned to 64. A call
  // with `pack` writes them and no more; the others read them.
  void* packed;
  int32_t pack;
};

// Keys that are multiplied at a time; columns that share a tile, at most; columns up to which the kernel of few columns
// runs, the only one that splits keys; bytes of what a kernel notes for 16 columns.
enum {
  NYBBLE_ATTENTION_KEYS = 128,
  NYBBLE_ATTENTION_COLUMNS = 32,
  NYBBLE_ATTENTION_FEW = 8,
  NYBBLE_ATTENTION_TILE = 512
};

static inline int64_t nybble_attention_row(int64_t dim) { return (dim + 15) / 16 * 16 + 16; }

static inline int64_t nybble_attention_scratch(int64_t columns, int64_t head_dim, int64_t value_dim) {
  const int64_t whole = (columns + NYBBLE_ATTENTION_COLUMNS - 1) / NYBBLE_ATTENTION_COLUMNS * NYBBLE_ATTENTION_COLUMNS;
  const int64_t rows = nybble_attention_row(head_dim) + nybble_attention_row(value_dim);
  return (NYBBLE_ATTENTION_KEYS * (rows + 2 * NYBBLE_ATTENTION_COLUMNS) + whole * (rows + 2)) * 4 +
         whole / 16 * NYBBLE_ATTENTION_TILE;
}

static inline int64_t nybble_attention_partial(int64_t value_dim) {
  return NYBBLE_ATTENTION_FEW * (nybble_attention_row(value_dim) + 2) * 4;
}

// A block of keys and values as codes of at most two bytes, with their scales, see tile_attention8_pack.h.
static inline int64_t nybble_attention8_block(int64_t head_dim, int64_t value_dim) {
  const int64_t rows = nybble_attention_row(value_dim);
  return NYBBLE_ATTENTION_KEYS * 2 * (nybble_attention_row(head_dim) + rows) + 4 * (2 * NYBBLE_ATTENTION_KEYS + rows) +
         64;
}

static inline int64_t nybble_attention8_packed(int64_t keys, int64_t head_dim, int64_t value_dim) {
  return (keys + NYBBLE_ATTENTION_KEYS - 1) / NYBBLE_ATTENTION_KEYS * nybble_attention8_block(head_dim, value_dim);
}

typedef enum NybbleStatus (*NybbleAttentionFn)(const struct NybbleAttentionArgs*);
// Row (r) and column (c) of a matrix: element r * stride + c from `at` on.
struct NybbleMatrix {
  void* at;  // null: none
  int64_t stride;
};

enum NybbleNorm { NYBBLE_NORM_NONE = 0, NYBBLE_NORM_LAYER = 1, NYBBLE_NORM_RMS = 2 };
enum NybbleAct {
  NYBBLE_ACT_IDENTITY = 0,
  NYBBLE_ACT_GELU = 1,        // x Phi(x), by the error function
  NYBBLE_ACT_GELU_TANH = 2,   // x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
  NYBBLE_ACT_QUICK_GELU = 3,  // x sigmoid(1.702 x)
  NYBBLE_ACT_SILU = 4,        // x sigmoid(x)
  NYBBLE_ACT_RELU = 5,
  NYBBLE_ACT_TANH = 6,
};

// The scale of a norm: rows of `columns` elements of float dtypes, or null.
struct NybbleScale {
  const void *weight, *bias;
  int32_t weight_dtype, bias_dtype;
  float eps, weight_offset;
};

// sum = x + residual, rounded to dtype; y = norm(sum), see tile_norm.h. residual and sum may be none; y may be x, and
// sum may be x or residual.
struct NybbleNormArgs {
  int32_t kind, dtype;
  int64_t rows, columns;
  struct NybbleMatrix x, residual, sum, y;
  struct NybbleScale scale;
};

// y = act(x) * other + residual, in fp32, rounded once. other and residual may be none; y may be any of the others.
// With a limit that is not 0: act(min(x, limit)) * (other, clamped to [-limit, limit], + other_offset) + residual.
struct NybbleActivateArgs {
  int32_t act, dtype;
  int64_t rows, columns;
  struct NybbleMatrix x, other, residual, y;
  float limit, other_offset;
};

// Row r of y is the sum over its terms j of weight[r][j] times the row from[r][j] of x, in fp32 and in the order of j,
// rounded once. There is no term where `from` is negative.
struct NybbleMixArgs {
  int32_t dtype;
  int64_t rows, columns, terms;
  const int64_t* from;  // [rows][terms]
  const float* weight;  // [rows][terms]
  struct NybbleMatrix x, y;
};

// Rotary positions: turns the first `rotated` elements of each head of head_dim, as pairs of an element of the first
// half and one of the second, or of neighbours if interleaved. Before, if scale.weight is not null, a head is
// RMS-normalized. y may be x. Row r has the position r0 + r, whose cosines and sines are those of sequence
// (r0 + r) / length and token (r0 + r) % length.
struct NybbleRotateArgs {
  int32_t dtype, cos_dtype, sin_dtype, interleaved;
  int64_t rows, heads, head_dim, rotated;
  struct NybbleMatrix x, y;
  const void *cos, *sin;
  int64_t cos_sequence, cos_token, sin_sequence, sin_token;  // strides in elements
  int64_t row0, length;
  struct NybbleScale scale;
};

// A step of a recurrent layer, for units [begin, end) of each row: see tile_gates.h. x and h hold the products with the
// input and with the state before, biases added: gate i of unit u is column i * units + u.
struct NybbleGatesArgs {
  int32_t dtype;  // of the states and y
  int64_t rows, units, begin, end;
  struct NybbleMatrix x, h;      // float32
  struct NybbleMatrix cell;      // float32, of an LSTM only: read and written
  struct NybbleMatrix before;    // of a GRU only: the state before
  struct NybbleMatrix state, y;  // both receive the state after
};

// How the rows of a lookup become one row of y.
enum NybbleBag {
  NYBBLE_BAG_NONE = 0,  // each id gives a row
  NYBBLE_BAG_SUM = 1,
  NYBBLE_BAG_MEAN = 2,
  NYBBLE_BAG_MAX = 3,
};

// Rows of a weight by their numbers: y[i] = (code - zero_point) * scale of row ids[i]; or the sum, mean or maximum of
// the rows ids[start[i]] .. ids[start[i + 1] - 1], in fp32. A bag without rows gives 0.
struct NybbleLookupArgs {
  int32_t dtype, id_bytes, code_bits, bag;  // id_bytes: 4 or 8
  const void* ids;
  const int64_t* start;   // of bags only, ascending
  const float* weights;   // of the ids of NYBBLE_BAG_SUM, or null
  int64_t left_out;       // an id that bags skip; -1: none
  int64_t rows, columns;  // of the weight
  // The sections of the layout plain (row by row), or of those in tiles (pack.h), which are `tile_bytes` long.
  const uint8_t* codes;
  const void* scale;
  int32_t scale_dtype;
  const uint8_t* zero_point;  // null: 0 for 8 bits and beside minimum, 8 for 4 bits
  const void* minimum;        // of scale_dtype, or null
  uint8_t flipped;            // bits that codes and zero points of 8 bits have changed, as in n16k4g
  uint8_t paired;             // 1: lines side by side (n16k16...)
  int64_t tile_bytes;         // 0: plain
  int64_t group, groups;      // columns of a group: 16, 32, 64, 128, or all in one group
  struct NybbleMatrix y;
  int64_t begin, end;  // rows of y of this call
  int64_t* wrong;      // set to the place of the first id that is no row, where the call ends
};

// The row kernels of a target. They refuse unknown kinds and dtypes.
struct NybbleRowKernels {
  enum NybbleStatus (*norm)(const struct NybbleNormArgs*);
  enum NybbleStatus (*activate)(const struct NybbleActivateArgs*);
  enum NybbleStatus (*rotate)(const struct NybbleRotateArgs*);
  enum NybbleStatus (*lstm)(const struct NybbleGatesArgs*);
  enum NybbleStatus (*gru)(const struct NybbleGatesArgs*);
  enum NybbleStatus (*mix)(const struct NybbleMixArgs*);
  enum NybbleStatus (*lookup)(const struct NybbleLookupArgs*);
};

typedef enum NybbleStatus (*NybbleExpandFn)(const struct NybbleExpandArgs*);
typedef enum NybbleStatus (*NybblePrepareFn)(const struct NybblePrepareArgs*);
typedef enum NybbleStatus (*NybbleLinearFn)(const struct NybbleLinearArgs*);
