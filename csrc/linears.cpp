#include "linears.h"

#include <algorithm>

namespace nybble {

namespace {

// Whether two weights read the same panel.
bool share(const LinearCall& a, const Cut& cut, const LinearCall& b, const Cut& other) {
  const bool sums = a.shape.by_group() && a.kernel->int_activations();
  const bool other_sums = b.shape.by_group() && b.kernel->int_activations();
  const bool own = a.static_activations || b.static_activations || a.shape.ordered || b.shape.ordered;
  return !own && a.prepare == b.prepare && a.kernel->panel == b.kernel->panel &&
         a.shape.k_padded() == b.shape.k_padded() && a.act_steps == b.act_steps && a.shape.group() == b.shape.group() &&
         sums == other_sums && sum_factor(a.shape) == sum_factor(b.shape) && cut.block_rows == other.block_rows &&
         cut.chunk_rows == other.chunk_rows;
}

int64_t strips_of(const WeightShape& shape) { return shape.tiles() / shape.strip(); }

// Whether a packed weight has its columns in another order, so that a piece is not a rectangle of the output.
bool is_reordered(const LinearCall& call) { return linear_args(call, Chunk{}).order != nullptr; }

// Reads the static scale anew, since a packed weight may have been written since the plan was made. False for a bad
// one.
bool read_given(LinearCall& call) {
  try {
    call.packed = {call.packed.address - kGivenBytes, call.packed.bytes + kGivenBytes};
    take_given(call);
    return true;
  } catch (const std::invalid_argument&) {
    return false;
  }
}

// Tiles that are multiplied before their outputs are finished: whole strips, whose outputs fit in the L1 cache or are
// at least a few tiles.
int64_t finished_tiles(int64_t rows, int64_t strip, int dtype) {
  constexpr int64_t kLeastTiles = 8;
  const int64_t tiles = caches().l1 / (rows * NYBBLE_TILE_N * dtype_bytes(dtype));
  return round_up(std::max(tiles, kLeastTiles), strip);
}

// Part of a row kernel's rectangle.
NybbleActivateArgs columns_of(NybbleActivateArgs args, int64_t begin, int64_t end) {
  for (NybbleMatrix* matrix : {&args.x, &args.other, &args.residual, &args.y})
    *matrix = part_of(*matrix, 0, begin, args.dtype);
  args.columns = end - begin;
  return args;
}

}  // namespace

bool LinearsCall::exact() const {
  return std::all_of(weights.begin(), weights.end(),
                     [](const LinearsWeight& weight) { return weight.call.kernel->int_activations(); });
}

void check_linears(const LinearsCall& call) {
  if (call.weights.empty() || call.weights.size() > kMostWeights)
    refuse("weights: must be 1 to " + std::to_string(kMostWeights));
  check_norm(call.norm, call.k());
  for (size_t i = 0; i < call.weights.size(); i++) {
    LinearCall one = call.weights[i].call;
    if (one.shape.k != call.k())
      refuse("weights[" + std::to_string(i) + "]: has " + std::to_string(one.shape.k) +
             " inputs, the first weight has " + std::to_string(call.k()));
    one.x_dtype = one.y_dtype = call.dtype;
    one.rows = 1;
    resolved(one);
  }
}

// The state of a thread in a call.
struct LinearsPlan::Running {
  const LinearsAt& at;
  Team& team;
  const NybbleMatrix x;  // the rows that are quantized
  const bool norms;      // whether they are computed just before; x is where they are kept too, if anywhere
  bool ok = true;
};

LinearsPlan::LinearsPlan(const LinearsCall& call, int64_t rows, int threads) : call_(call), rows_(rows) {
  for (size_t i = 0; i < call.weights.size(); i++) add(i, threads);
  if (groups_.size() > 1) normed_bytes_ = round_up(rows * call.k() * dtype_bytes(call.dtype), 64);
}

// Puts a weight into the group whose panel it can read, if what it needs of others is there by then.
void LinearsPlan::add(size_t index, int threads) {
  LinearCall one = call_.weights[index].call;
  one.x_dtype = one.y_dtype = call_.dtype;
  one.rows = rows_;
  Part part{resolved(one), {}, index, index};
  part.cut = cut_for(product_of(*part.call.kernel, part.call.shape, rows_, threads), caches());
  panel_bytes_ = std::max(panel_bytes_, chunk_bytes(part.call, part.cut.chunk_rows));
  for (Group& group : groups_)
    if (share(group[0].call, group[0].cut, part.call, part.cut) && follows(group, part, &part.root)) {
      group.push_back(part);
      return;
    }
  groups_.push_back({part});
}

// Whether all that a weight reads of others is written before a group runs, or by weights of it that have one root and
// are cut alike: then its pieces run after theirs.
bool LinearsPlan::follows(const Group& group, const Part& part, size_t* root) const {
  const std::vector<size_t>& after = call_.weights[part.index].after;
  for (const Group& other : groups_) {
    const bool here = &other == &group;
    for (const Part& each : other) {
      if (std::find(after.begin(), after.end(), each.index) == after.end()) continue;
      if (!here && &other > &group) return false;
      if (!here) continue;
      const bool alike = each.call.shape.form == part.call.shape.form && each.call.shape.form != Form::gather &&
                         each.call.shape.strip() == part.call.shape.strip();
      if (!alike || (*root != part.index && *root != each.root)) return false;
      *root = each.root;
    }
  }
  return true;
}

bool LinearsPlan::run(const LinearsAt& asked, Team& team, uint8_t* scratch) const {
  LinearsAt at = asked;
  bool norms = call_.norm.kind != NYBBLE_NORM_NONE || at.residual.at || at.sum.at || at.normed.at, ok = true;
  if (norms && groups_.size() > 1) {  // each panel reads the rows again
    if (!at.normed.at) at.normed = {scratch, call_.k()};
    ok = each_rows(team, call_.rows->rows->norm, norm_args(at));
    at.x = at.normed;
    norms = false;
  }
  Running running{at, team, norms ? at.normed : at.x, norms};
  for (const Group& group : groups_) {
    LinearCall call = group[0].call;
    if (call.static_activations) ok = read_given(call) && ok;
    call.x.address = reinterpret_cast<uintptr_t>(running.x.at);
    call.stride = running.x.stride;
    const Cut& cut = group[0].cut;
    for (int64_t row = 0; row < rows_; row += cut.chunk_rows)
      run_chunk(group, carve(call, row, cut, scratch + normed_bytes_), running);
  }
  return ok && running.ok;
}

// With only the rows split, a piece packs its own activations and finds them in its cache. Otherwise all are packed
// before the first product.
void LinearsPlan::run_chunk(const Group& group, const Chunk& chunk, Running& running) const {
  const int64_t blocks = (chunk.rows + chunk.cut.block_rows - 1) / chunk.cut.block_rows;
  int64_t row_pieces = 1, pieces = 0;
  bool together = true;
  for (const Part& part : group) {
    together = together && part.cut.tile_parts == 1;
    row_pieces = std::max(row_pieces, part.cut.block_parts);
    pieces += pieces_of(part);
  }
  if (together) {
    running.team.each(row_pieces, [&](int64_t i) {
      const int64_t begin = blocks * i / row_pieces, end = blocks * (i + 1) / row_pieces;
      prepare(group, chunk, running, begin, end);
      for (const Part& part : group) multiply(part, chunk, running, {begin, end, 0, strips_of(part.call.shape)});
    });
    return;
  }
  running.team.each(blocks, [&](int64_t block) { prepare(group, chunk, running, block, block + 1); });
  running.team.each(pieces, [&](int64_t i) {
    const Part* root = &group[0];
    for (; i >= pieces_of(*root); root++) i -= pieces_of(*root);
    const int64_t t = i / root->cut.block_parts, b = i % root->cut.block_parts, strips = strips_of(root->call.shape);
    const Piece piece{blocks * b / root->cut.block_parts, blocks * (b + 1) / root->cut.block_parts,
                      strips * t / root->cut.tile_parts, strips * (t + 1) / root->cut.tile_parts};
    for (const Part& part : group)
      if (part.root == root->index) multiply(part, chunk, running, piece);
  });
  for (const Part& part : group)
    if (part.cut.tile_parts > 1 && finishes(part, running.at) && is_reordered(part.call))
      running.ok =
          each_rows(running.team, call_.rows->rows->activate, finish_args(part, running.at, chunk.row, chunk.rows)) &&
          running.ok;
}

// Packs the row blocks [begin, end) of a chunk, and normalizes each before.
void LinearsPlan::prepare(const Group& group, const Chunk& chunk, Running& running, int64_t begin, int64_t end) const {
  const LinearCall& call = group[0].call;
  const int64_t block_rows = chunk.cut.block_rows, bytes = dtype_bytes(call_.dtype);
  NybblePrepareArgs args = prepare_args(call, chunk);
  args.x = part_of(running.x, chunk.row, 0, call_.dtype).at;
  args.ldx = running.x.stride;
  args.block_begin = begin;
  args.block_end = end;
  if (!running.norms) {
    running.ok = call.prepare->prepare(&args) == NYBBLE_OK && running.ok;
    return;
  }
  thread_local Scratch scratch;
  LinearsAt at = running.at;
  if (!at.normed.at) {
    at.normed = {scratch.try_reserve(static_cast<size_t>(block_rows * call_.k() * bytes)), call_.k()};
    if (!at.normed.at) running.ok = false;
  }
  for (int64_t block = begin; block < end && running.ok; block++) {
    const int64_t row = block * block_rows, rows = std::min(block_rows, chunk.rows - row);
    NybbleNormArgs norm = rows_of(norm_args(at), chunk.row + row, chunk.row + row + rows);
    if (!running.at.normed.at) norm.y = at.normed;
    // Offset such that the block's rows are where it looks for them.
    args.x = reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(norm.y.at) -
                                           static_cast<uintptr_t>(row * norm.y.stride * bytes));
    args.ldx = norm.y.stride;
    args.block_begin = block;
    args.block_end = block + 1;
    running.ok = call_.rows->rows->norm(&norm) == NYBBLE_OK && call.prepare->prepare(&args) == NYBBLE_OK;
  }
}

// Multiplies one piece, and finishes the rectangle that it wrote: a few columns at a time, so that a cache still has
// them.
void LinearsPlan::multiply(const Part& part, const Chunk& whole, Running& running, const Piece& piece) const {
  if (piece.block_begin == piece.block_end || !running.ok) return;
  Chunk chunk = whole;
  chunk.cut = part.cut;
  LinearCall call = part.call;
  call.y.address = reinterpret_cast<uintptr_t>(running.at.of[part.index].y.at);
  NybbleLinearArgs args = linear_args(call, chunk);
  args.block_begin = piece.block_begin;
  args.block_end = piece.block_end;
  const int64_t row = piece.block_begin * part.cut.block_rows, strip = call.shape.strip();
  const int64_t rows = std::min(piece.block_end * part.cut.block_rows, chunk.rows) - row;
  const int64_t begin = piece.strip_begin * strip, end = piece.strip_end * strip;
  const bool all = begin == 0 && end == call.shape.tiles(), finishes = this->finishes(part, running.at);
  const bool reordered = args.order != nullptr, here = finishes && (all || !reordered);
  const int64_t step = here && !reordered ? finished_tiles(rows, strip, call_.dtype) : end - begin;
  for (int64_t tile = begin; tile < end && running.ok; tile += step) {
    args.tile_begin = tile;
    args.tile_end = std::min(tile + step, end);
    running.ok = run_piece(call, part.cut, args);
    const int64_t column = tile * NYBBLE_TILE_N, last = std::min(args.tile_end * NYBBLE_TILE_N, call.shape.n);
    if (!here || column >= last) continue;
    const NybbleActivateArgs whole_width = finish_args(part, running.at, chunk.row + row, rows);
    const NybbleActivateArgs finish = columns_of(whole_width, column, last);
    running.ok = call_.rows->rows->activate(&finish) == NYBBLE_OK && running.ok;
  }
}

bool LinearsPlan::finishes(const Part& part, const LinearsAt& at) const {
  const LinearsAt::Of& of = at.of[part.index];
  return call_.weights[part.index].act != NYBBLE_ACT_IDENTITY || of.other.at || of.residual.at;
}

// What follows the product of a weight, for some rows.
NybbleActivateArgs LinearsPlan::finish_args(const Part& part, const LinearsAt& at, int64_t row, int64_t rows) const {
  const LinearsAt::Of& of = at.of[part.index];
  const NybbleActivateArgs args{
      call_.weights[part.index].act, call_.dtype, rows_, part.call.shape.n, of.y, of.other, of.residual, of.y, 0, 0};
  return rows_of(args, row, row + rows);
}

NybbleNormArgs LinearsPlan::norm_args(const LinearsAt& at) const {
  return {call_.norm.kind, call_.dtype, rows_, call_.k(), at.x, at.residual, at.sum, at.normed, call_.norm.scale()};
}

}  // namespace nybble
