// How a product is cut so that its parts stay in the caches and every thread has its share. No cut changes a bit of the
// result.
#pragma once

#include <cstdint>

#include "caches.h"
#include "pack.h"

namespace nybble {

// A product of `rows` rows with a packed weight, and the kernel that computes it.
struct Product {
  int64_t rows;
  int64_t columns, k;   // of the packed weight: padded
  int64_t column_step;  // pieces have multiples of so many columns: those of a tile, or of a strip of blocks
  int64_t group, bits;  // group == k: one
  bool by_group;        // whether sums of groups are scaled, see WeightShape
  Form form;
  int64_t block_rows;     // most rows that the kernel multiplies at a time
  int64_t tile_columns;   // columns that it multiplies at a time with so many rows
  int64_t panel_row;      // bytes of a row of activations in the panel
  int64_t decoded_bytes;  // bytes of a decoded weight; 0: the kernel never decodes
  int64_t decode_rows;    // fewest rows of a piece for which it decodes weights once; 0: none
  bool multiplies_tiles;  // of 16 rows, and of weights that are decoded, if at all, in memory
  bool cuts_groups;       // whether a K block may end inside a group that spans K: not where planes of it are joined
  int threads;
};

struct Cut {
  int64_t block_rows;               // rows multiplied at a time; depends on the product and its kernel alone
  int64_t chunk_rows;               // rows packed into a panel at a time, whole blocks; the last chunk may have fewer
  int64_t k_block;                  // K multiplied at a time; k: all
  int64_t pass;                     // columns multiplied with all row blocks before the next ones
  int64_t pass_bytes;               // the same as bytes of weights, for the layouts in which columns differ in size
  int64_t expand;                   // columns of a mask layout expanded at a time
  bool one_stream;                  // see Caches
  bool in_order;                    // whether a single row reads the weights in the order in which they lie in memory
  bool decode;                      // whether the weights of a K block of a pass are decoded once, into a buffer
  int64_t tile_parts, block_parts;  // pieces along the columns and along the row blocks
};

// Depends on nothing else. Parts may be larger than a cache where its share of the product would be too small to use.
Cut cut_for(const Product& product, const Caches& caches);

}  // namespace nybble
