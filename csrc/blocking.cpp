#include "blocking.h"

#include <algorithm>

namespace nybble {

namespace {

// From this many multiply-adds on, each thread's share is split into pieces, to balance cores of unequal speed. Fewer
// along the columns, because each piece of columns starts with weights that are not prefetched.
constexpr int64_t kLargeProducts = 1 << 24;
constexpr int kRowPieces = 4, kColumnPieces = 2;
// Fewest row blocks of a piece where only the rows are split. Pieces that decode the weights, each for itself, are
// larger: on Zen 5 held to AVX2, 6 to 19 % faster at 128 and 256 rows of 384x1536 than four pieces a thread of two
// blocks.
constexpr int kLeastBlocks = 2, kDecodingPieces = 2, kDecodingBlocks = 8;
// Fewest rows of a chunk.
constexpr int64_t kChunkRows = 64;
// Up to this many row blocks, a pass is short, so that prefetching starts early.
constexpr int64_t kFewBlocks = 8;
// Rows of a tile (AMX).
constexpr int64_t kTileRows = 16;
constexpr int64_t kPassColumns = 64, kStripColumns = 1024, kLeastK = 64;

int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }
int64_t round_down(int64_t a, int64_t b) { return a / b * b; }
int64_t blocks_of(int64_t rows, int64_t block) { return (rows + block - 1) / block; }

// Rows per block such that the blocks are nearly equal; a multiple of 4 where possible, which packs fastest. Tiles are
// as few as possible, of nearly equal rows. Kernels of floats add in another order for few rows, so it must not depend
// on a cache.
int64_t balanced_block(const Product& p) {
  const int64_t most = p.block_rows, rows = p.rows;
  if (p.multiplies_tiles) return std::min(rows, blocks_of(rows, blocks_of(rows, kTileRows)) * (most / kTileRows));
  const int64_t blocks = blocks_of(rows, most), equal = blocks_of(rows, blocks);
  return blocks == 1 || round_up(equal, 4) > most ? equal : round_up(equal, 4);
}

int64_t column_bytes(const Product& p) { return p.k * p.bits / 8; }

// Whether weights must be decoded in memory, and bits of a weight as a kernel reads it once for each row block.
bool must_decode(const Product& p) { return p.multiplies_tiles && p.decoded_bytes > 0; }
int64_t read_bits(const Product& p) { return must_decode(p) ? 8 * p.decoded_bytes : p.bits; }

// With small weights and enough rows for every piece, only the rows are split: each piece then packs its own
// activations and finds them in its cache. Otherwise minimizes the size of the largest piece.
void split(const Product& p, const Caches& caches, int64_t rows, Cut& to) {
  const bool large = p.threads > 1 && rows * p.columns >= kLargeProducts / p.k;
  const bool decodes = p.decoded_bytes > 0 && !p.multiplies_tiles;
  const int64_t units = p.columns / p.column_step,
                row_pieces = large ? p.threads * (decodes ? kDecodingPieces : kRowPieces) : p.threads;
  const int64_t pieces = large ? p.threads * kColumnPieces : p.threads, blocks = blocks_of(rows, to.block_rows);
  // Weights that stay in the L2 cache beside the activations, so that every piece may read all of them.
  const bool small = p.columns * column_bytes(p) <= caches.l2 / 4 * 3;
  const int64_t least = decodes ? kDecodingBlocks : kLeastBlocks;
  if (blocks >= least * row_pieces && p.form == Form::dense && small) {
    to.tile_parts = 1;
    to.block_parts = row_pieces;
    return;
  }
  to.tile_parts = to.block_parts = 1;
  int64_t best = units * blocks;
  for (int64_t t = pieces; t >= 1; t--) {
    const int64_t b = std::min(pieces / t, blocks), piece = blocks_of(units, t) * blocks_of(blocks, b);
    if (piece >= best) continue;
    best = piece;
    to.tile_parts = t;
    to.block_parts = b;
  }
}

// The fewest row blocks of a piece, and their rows.
struct Piece {
  int64_t blocks, rows;
};

// Whether a piece decodes its weights once for all of its row blocks, by a kernel that could also decode them in
// registers.
bool decodes_once(const Product& p, const Piece& piece) {
  return p.decoded_bytes > 0 && !p.multiplies_tiles && piece.rows >= p.decode_rows;
}

// Whether what must be decoded in memory stays in the L1 cache, a column tile and a K block at a time: for 4 bits and a
// single tile of rows, which multiply so little that storing to L2 and loading from there would take longer. On Emerald
// Rapids, w4a16 at 4 to 16 rows is 1.1 to 1.4 times as fast, and at 32 rows 5 % slower; w8a16 gains nothing.
bool decodes_to_l1(const Product& p) { return must_decode(p) && p.bits == 4 && p.rows <= kTileRows; }

// K blocks are multiples of it. Whole groups: most kernels scale a group's sums as it ends.
int64_t k_step(const Product& p) {
  const bool cut = !p.by_group || (p.cuts_groups && p.group == p.k);
  return round_up(kLeastK, cut ? 1 : p.group);
}

// K per block: all, unless the weights of the narrowest pass would fill half of the L2 cache. Decoded weights, which
// are larger, take an eighth of it: on Zen 5 held to AVX2, that gains 6 % over all of K at 4 bytes, 0 to 2 % at fewer.
int64_t k_block_of(const Product& p, const Caches& caches, const Piece& piece) {
  if (p.form == Form::gather) return std::max(kLeastK, round_down(caches.l1 / 2 / p.block_rows, kLeastK));
  const int64_t narrowest = std::max<int64_t>(p.tile_columns, 16), step = k_step(p);
  if (decodes_once(p, piece) && step < p.k)
    return std::min(std::max(round_down(caches.l2 / 8 / (kPassColumns * p.decoded_bytes), step), step), p.k);
  if (decodes_to_l1(p) && step < p.k) {
    const int64_t most = round_down(caches.l1 / 3 * 2 / (narrowest * p.decoded_bytes), step);
    return std::min(std::max(most, step), p.k);
  }
  const bool once = piece.blocks == 1 && !must_decode(p);
  if (once || step >= p.k || narrowest * p.k * read_bits(p) / 8 <= caches.l2 / 2) return p.k;
  const int64_t most = round_down(caches.l2 / 4 * 8 / (narrowest * read_bits(p)), step);
  return std::min(std::max(most, step), p.k);
}

// Columns that all row blocks are multiplied with before the next ones: the weights stay in the L2 cache meanwhile,
// beside those that are prefetched. Few row blocks use few columns, so that prefetching starts early; many use more, or
// they would reread their activations too often, and tiles more than others, since they multiply what they read sooner.
int64_t pass_of(const Product& p, const Caches& caches, int64_t k_block, const Piece& piece) {
  const int64_t most = p.columns, least = std::max<int64_t>(p.tile_columns, 16),
                share = caches.l2 / (p.multiplies_tiles ? 2 : 4);
  // Blocks of zeros are left out: pass_bytes limits the pass, and this the memory of its sums.
  if (p.form == Form::blocks) return k_block < p.k ? std::min(std::max(p.column_step, kStripColumns), most) : most;
  if (decodes_once(p, piece)) {
    const int64_t columns = round_down(share / (k_block * p.decoded_bytes), 16);
    return std::min({std::max(columns, least), kPassColumns, most});
  }
  if (decodes_to_l1(p)) return std::min(least, most);
  if (piece.blocks == 1 && !must_decode(p)) return most;
  const int64_t bytes = k_block * read_bits(p) / 8,
                columns = round_down((piece.blocks <= kFewBlocks ? share / 2 : share) / bytes, kPassColumns);
  if (columns > 0) return std::min(columns, most);
  return std::min(piece.blocks > 2 && kPassColumns * bytes <= share ? kPassColumns : least, most);
}

}  // namespace

Cut cut_for(const Product& p, const Caches& caches) {
  Cut to{};
  to.block_rows = balanced_block(p);
  // Chunks of whole blocks, nearly equal.
  const int64_t chunks = blocks_of(p.rows, std::max(kChunkRows, caches.l3 / 8 / p.panel_row));
  to.chunk_rows = std::min(round_up(blocks_of(p.rows, chunks), to.block_rows), p.rows);
  split(p, caches, to.chunk_rows, to);
  const int64_t blocks = blocks_of(to.chunk_rows, to.block_rows) / to.block_parts;
  const Piece piece{blocks, std::min(blocks * to.block_rows, to.chunk_rows)};
  to.k_block = k_block_of(p, caches, piece);
  to.pass = round_up(pass_of(p, caches, to.k_block, piece), p.column_step);
  to.pass_bytes = caches.l2 / 4;
  const int64_t tile = caches.l2 / 4 / (16 * column_bytes(p));  // tiles of 16 columns
  to.expand = 16 * (tile >= 4 ? round_down(tile, 4) : tile < 2 ? 2 : 4);
  to.decode = must_decode(p) || decodes_once(p, piece);
  to.one_stream = caches.one_stream;
  to.in_order = to.one_stream && p.form == Form::dense && p.rows == 1 && p.columns * column_bytes(p) > caches.l2 / 4;
  return to;
}

}  // namespace nybble
