#include "sparse.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>

#include "abi.h"
#include "parallel.h"
#include "portable.h"

namespace nybble {

namespace {

constexpr int64_t kLine = 64, kStride = 64, kWindow = 128;
constexpr int64_t kSlots = 8, kStep = 2 * 16 * kSlots;  // entries per column and step; bytes per step
constexpr int kToCode = 64;                             // byte distance from an entry's position to its code
// Reordering the columns must save at least this share of the steps, because it costs scattered stores.
constexpr double kWorthReordering = 0.1;

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

WeightShape dense_of(const WeightShape& s) {
  WeightShape dense{s.bits, s.n, s.k, s.group_size, s.symmetric};
  return dense;
}

int64_t mask_planes(const WeightShape& s) { return s.bits == 8 ? 1 : 2; }

// Number of k in a line, which has four bytes for each of 16 columns.
int64_t line_ks(const WeightShape& s) { return s.bits == 8 ? 4 : 8; }

uint64_t word_at(const uint8_t* section, int64_t i) {
  uint64_t word;
  std::memcpy(&word, section + i * 8, 8);
  return word;
}

// Masks of nonzero weights of a dense line: [0] for bytes or low nibbles, [1] for high nibbles.
struct LineMasks {
  uint64_t of[2];
};

// Bit i is set where byte i of the word is not 0.
uint64_t bytes_set(uint64_t word) {
  const uint64_t low = 0x7f7f7f7f7f7f7f7fu;
  const uint64_t tops = (((word & low) + low) | word) & ~low;
  return (tops >> 7) * 0x0102040810204080u >> 56;
}

// Of a line without padding.
LineMasks masks_of(const WeightShape& s, const uint8_t* line) {
  LineMasks masks{};
  for (int64_t i = 0; i < kLine / 8; i++) {
    const uint64_t word = word_at(line, i) ^ (s.bits == 8 ? 0 : 0x8888888888888888u);
    const uint64_t low = s.bits == 8 ? ~uint64_t{0} : 0x0f0f0f0f0f0f0f0fu;
    masks.of[0] |= bytes_set(word & low) << 8 * i;
    masks.of[1] |= bytes_set(word & ~low) << 8 * i;
  }
  return masks;
}

LineMasks masks_of(const WeightShape& s, const uint8_t* line, int64_t tile, int64_t l) {
  if ((tile + 1) * 16 <= s.n && (l + 1) * line_ks(s) <= s.k) return masks_of(s, line);
  LineMasks masks{};
  for (int64_t i = 0; i < kLine; i++) {
    const int64_t k = l * line_ks(s) + i % 4;
    if (tile * 16 + i / 4 >= s.n) break;
    const bool low = s.bits == 8 ? line[i] != 0 : (line[i] & 15) != 8, high = s.bits == 4 && line[i] >> 4 != 8;
    if (low && k < s.k) masks.of[0] |= uint64_t{1} << i;
    if (high && k + 4 < s.k) masks.of[1] |= uint64_t{1} << i;
  }
  return masks;
}

// Adds these bits of the masked bytes of a line to the bytes at `to`; returns the end.
uint8_t* add_values(const uint8_t* line, uint64_t mask, uint8_t bits, uint8_t* to) {
  for (; mask; mask &= mask - 1) *to++ |= line[__builtin_ctzll(mask)] & bits;
  return to;
}

// Puts these bits of the bytes at `from` into the masked bytes of a line; returns the end.
const uint8_t* spread_values(const uint8_t* from, uint64_t mask, uint8_t bits, uint8_t* line) {
  for (; mask; mask &= mask - 1) {
    uint8_t& byte = line[__builtin_ctzll(mask)];
    byte = static_cast<uint8_t>((byte & ~bits) | (*from++ & bits));
  }
  return from;
}

size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

void copy_section(uint8_t* to, size_t at, const void* from, size_t bytes) {
  if (bytes) std::memcpy(to + at, from, bytes);
}

}  // namespace

SparsePack::SparsePack(const WeightShape& shape, const Portable& from, int threads)
    : shape_(shape), from_(from), threads_(usable_threads(threads)), at_(sections_of(shape)) {
  if (shape.form == Form::mask) plan_mask();
  if (shape.form == Form::gather) plan_gather();
  if (shape.form == Form::blocks) plan_blocks();
}

void SparsePack::write(uint8_t* to) const {
  std::memset(to, 0, bytes());
  copy_section(to, at_.start, start_.data(), start_.size() * 8);
  if (shape_.form == Form::mask) write_mask(to);
  if (shape_.form == Form::gather) write_gather(to);
  if (shape_.form == Form::blocks) write_blocks(to);
}

void SparsePack::plan_mask() {
  const WeightShape dense = dense_of(shape_);
  dense_.resize(sections_of(dense).total);
  pack(dense, from_, dense_.data(), threads_);
  const int64_t tiles = shape_.tiles(), lines = shape_.k_padded() / line_ks(shape_), planes = mask_planes(shape_);
  start_.assign(static_cast<size_t>(tiles + 1), 0);
  parallel_for(tiles, threads_, [&](int64_t tile) {
    uint64_t& bytes = start_[static_cast<size_t>(tile + 1)];
    for (int64_t l = 0; l < lines; l += NYBBLE_MASK_LINES) {
      uint64_t kept[2] = {0, 0};
      for (int64_t i = l; i < std::min<int64_t>(l + NYBBLE_MASK_LINES, lines); i++) {
        const LineMasks masks = masks_of(shape_, dense_.data() + (tile * lines + i) * kLine, tile, i);
        for (int p = 0; p < 2; p++) kept[p] += static_cast<uint64_t>(__builtin_popcountll(masks.of[p]));
      }
      bytes += static_cast<uint64_t>(NYBBLE_MASK_LINES * planes * 8) + std::max(kept[0], kept[1]);
    }
  });
  std::partial_sum(start_.begin(), start_.end(), start_.begin());
  code_bytes_ = start_.back() + kLine;
}

void SparsePack::write_mask(uint8_t* to) const {
  const Sections from = sections_of(dense_of(shape_));
  const int64_t tiles = shape_.tiles(), lines = shape_.k_padded() / line_ks(shape_), planes = mask_planes(shape_);
  copy_section(to, at_.scale, dense_.data() + from.scale, from.zero_point - from.scale);
  copy_section(to, at_.sum, dense_.data() + from.sum, static_cast<size_t>(tiles * 16 * 4));
  parallel_for(tiles, threads_, [&](int64_t tile) {
    uint8_t *mask = to + at_.codes + start_[static_cast<size_t>(tile)], *values[2] = {mask, mask};
    for (int64_t l = 0; l < lines; l++, mask += planes * 8) {
      if (l % NYBBLE_MASK_LINES == 0) {
        mask = std::max(values[0], values[1]);
        values[0] = values[1] = mask + NYBBLE_MASK_LINES * planes * 8;
      }
      const uint8_t* line = dense_.data() + (tile * lines + l) * kLine;
      const LineMasks masks = masks_of(shape_, line, tile, l);
      std::memcpy(mask, &masks, static_cast<size_t>(planes * 8));
      const uint8_t bits[2] = {static_cast<uint8_t>(shape_.bits == 8 ? 0xff : 0x0f), 0xf0};
      for (int p = 0; p < planes; p++) values[p] = add_values(line, masks.of[p], bits[p], values[p]);
    }
  });
}

namespace {

// Offset of an entry's position byte in a step: positions of slots 0 to 3, their codes, the same for slots 4 to 7.
int64_t entry_at(int64_t lane, int64_t slot) { return slot / 4 * 128 + lane * 4 + slot % 4; }

// The k of one column's nonzero weights, ascending.
struct Entries {
  std::vector<int32_t> k;
  size_t next = 0;
};

// Assigns the nonzero weights of one tile to steps. A step's window starts at the lowest k that any column still has to
// store, and takes up to kSlots entries within the window from every column. The number of steps thus follows the total
// count per column, not its distribution over windows. Calls fn.step(window), then fn.entry(lane, slot, k, window).
template <class Fn>
void each_step(std::vector<Entries>& lanes, int64_t k_padded, Fn& fn) {
  for (;;) {
    int64_t behind = INT64_MAX;
    for (const Entries& lane : lanes)
      if (lane.next < lane.k.size()) behind = std::min<int64_t>(behind, lane.k[lane.next]);
    if (behind == INT64_MAX) return;
    const int64_t window = std::min(behind / kStride, (k_padded - kWindow) / kStride);
    fn.step(window);
    for (size_t l = 0; l < lanes.size(); l++) {
      Entries& lane = lanes[l];
      for (int slot = 0; slot < kSlots && lane.next < lane.k.size(); slot++, lane.next++) {
        if (lane.k[lane.next] >= window * kStride + kWindow) break;
        fn.entry(l, slot, lane.k[lane.next], window);
      }
    }
  }
}

std::vector<Entries> entries_of(const WeightShape& s, const uint8_t* qweight, const int32_t* order) {
  std::vector<Entries> lanes(16);
  for (int lane = 0; lane < 16; lane++)
    for (int64_t k = 0; order[lane] < s.n && k < s.k; k++)
      if (code_at(s, qweight, order[lane], k)) lanes[lane].k.push_back(static_cast<int32_t>(k));
  return lanes;
}

}  // namespace

void SparsePack::plan_gather() {
  const int64_t n = shape_.n, tiles = shape_.tiles(), places = tiles * 16;
  std::vector<int64_t> kept(static_cast<size_t>(places), 0);
  parallel_for(n, threads_, [&](int64_t row) {
    for (int64_t k = 0; k < shape_.k; k++) kept[row] += code_at(shape_, from_.qweight, row, k) != 0;
  });
  // Estimate of the number of steps: the longest column of each tile, summed.
  const auto longest = [&](const std::vector<int32_t>& order) {
    int64_t sum = 0;
    for (int64_t tile = 0; tile < tiles; tile++) {
      int64_t most = 0;
      for (int64_t i = tile * 16; i < tile * 16 + 16; i++) most = std::max(most, kept[order[i]]);
      sum += most;
    }
    return static_cast<double>(sum);
  };
  order_.resize(static_cast<size_t>(places));
  std::iota(order_.begin(), order_.end(), 0);
  std::vector<int32_t> sorted = order_;
  std::stable_sort(sorted.begin(), sorted.end(), [&](int32_t a, int32_t b) { return kept[a] > kept[b]; });
  struct Windows {
    std::vector<uint16_t> of;
    void step(int64_t window) { of.push_back(static_cast<uint16_t>(window)); }
    void entry(size_t, int, int64_t, int64_t) {}
  };
  const auto windows_of = [&](const std::vector<int32_t>& order) {
    std::vector<Windows> windows(static_cast<size_t>(tiles));
    parallel_for(tiles, threads_, [&](int64_t tile) {
      std::vector<Entries> lanes = entries_of(shape_, from_.qweight, order.data() + tile * 16);
      each_step(lanes, shape_.k_padded(), windows[tile]);
    });
    return windows;
  };
  const auto steps = [](const std::vector<Windows>& windows) {
    double sum = 0;
    for (const Windows& tile : windows) sum += static_cast<double>(tile.of.size());
    return sum;
  };
  std::vector<Windows> windows = windows_of(order_);
  bool reorder = false;
  if (longest(sorted) < longest(order_) * (1 - kWorthReordering)) {
    std::vector<Windows> other = windows_of(sorted);
    reorder = steps(other) < steps(windows) * (1 - kWorthReordering);
    if (reorder) {
      order_.swap(sorted);
      windows.swap(other);
    }
  }
  start_.assign(static_cast<size_t>(tiles + 2), 0);
  for (int64_t tile = 0; tile < tiles; tile++) {
    start_[tile + 1] = start_[tile] + windows[tile].of.size();
    window_.insert(window_.end(), windows[tile].of.begin(), windows[tile].of.end());
  }
  start_.back() = reorder;
  at_.codes = at_.index + aligned(window_.size() * 2);
  code_bytes_ = window_.size() * kStep;
}

void SparsePack::write_gather(uint8_t* to) const {
  struct Writer {
    const SparsePack& pack;
    const int32_t* order;
    uint8_t* next;
    int32_t sums[16] = {};
    void step(int64_t) { next += kStep; }
    void entry(size_t lane, int slot, int64_t k, int64_t window) {
      const int code = code_at(pack.shape_, pack.from_.qweight, order[lane], k);
      uint8_t* byte = next - kStep + entry_at(lane, slot);
      byte[0] = static_cast<uint8_t>(k - window * kStride);
      byte[kToCode] = static_cast<uint8_t>(code);
      sums[lane] += code;
    }
  };
  copy_section(to, at_.order, order_.data(), order_.size() * 4);
  copy_section(to, at_.index, window_.data(), window_.size() * 2);
  parallel_for(shape_.tiles(), threads_, [&](int64_t tile) {
    const int32_t* order = order_.data() + tile * 16;
    std::vector<Entries> lanes = entries_of(shape_, from_.qweight, order);
    Writer writer{*this, order, to + at_.codes + start_[tile] * kStep};
    each_step(lanes, shape_.k_padded(), writer);
    std::memcpy(to + at_.sum + tile * 64, writer.sums, 64);
    for (int lane = 0; lane < 16; lane++)
      if (order[lane] < shape_.n) std::memcpy(to + at_.scale + tile * 64 + lane * 4, from_.scale + order[lane] * 4, 4);
  });
}

void SparsePack::plan_blocks() {
  const int64_t r = shape_.block_n, c = shape_.block_k, strips = shape_.tiles() * 16 / r, width = shape_.k_padded() / c;
  start_.assign(static_cast<size_t>(strips + 1), 0);
  for (int64_t strip = 0; strip < strips; strip++) {
    for (int64_t b = 0; b < width; b++) {
      bool any = false;
      for (int64_t n = strip * r; n < std::min(shape_.n, (strip + 1) * r) && !any; n++)
        for (int64_t k = b * c; k < std::min(shape_.k, (b + 1) * c) && !any; k++)
          any = code_at(shape_, from_.qweight, n, k) != 0;
      if (any) index_.push_back(static_cast<int32_t>(b));
    }
    start_[strip + 1] = index_.size();
  }
  at_.codes = at_.index + aligned(index_.size() * 4);
  code_bytes_ = index_.size() * static_cast<size_t>(r * c);
}

void SparsePack::write_blocks(uint8_t* to) const {
  const int64_t r = shape_.block_n, c = shape_.block_k;
  copy_section(to, at_.index, index_.data(), index_.size() * 4);
  for (int64_t n = 0; n < shape_.n; n++) {
    std::memcpy(to + at_.scale + n * 4, from_.scale + n * 4, 4);
    int32_t sum = 0;
    const int64_t strip = n / r, row = n % r;
    for (uint64_t b = start_[strip]; b < start_[strip + 1]; b++) {
      uint8_t* block = to + at_.codes + static_cast<int64_t>(b) * r * c + row / 16 * 16 * c + row % 16 * 4;
      for (int64_t i = 0; i < c && index_[b] * c + i < shape_.k; i++) {
        const int code = code_at(shape_, from_.qweight, n, index_[b] * c + i);
        block[i / 4 * kLine + i % 4] = static_cast<uint8_t>(code);
        sum += code;
      }
    }
    std::memcpy(to + at_.sum + n * 4, &sum, 4);
  }
}

Sections sparse_sections(const WeightShape& shape, const uint8_t* packed, size_t bytes) {
  Sections at = sections_of(shape);
  if (bytes < at.total) refuse("packed: has " + std::to_string(bytes) + " bytes, needs " + std::to_string(at.total));
  const uint64_t count = word_at(packed + at.start, shape.tiles() / shape.strip());
  const uint64_t unit = shape.form == Form::mask     ? 1
                        : shape.form == Form::gather ? kStep
                                                     : static_cast<uint64_t>(shape.block_n * shape.block_k);
  if (count > bytes)
    refuse("packed: start counts " + std::to_string(count) + " items, more than its " + std::to_string(bytes) +
           " bytes");
  if (shape.form != Form::mask) at.codes = at.index + aligned(count * (shape.form == Form::gather ? 2 : 4));
  const uint64_t needed = at.codes + count * unit + (shape.form == Form::mask ? kLine : 0);
  if (bytes < needed) refuse("packed: has " + std::to_string(bytes) + " bytes, needs " + std::to_string(needed));
  return at;
}

void check_packed(const WeightShape& shape, const uint8_t* packed, size_t bytes) {
  const Sections at = sparse_sections(shape, packed, bytes);
  const int64_t strips = shape.tiles() / shape.strip(), ks = shape.k_padded();
  if (word_at(packed + at.start, 0) != 0) refuse("packed: start[0] must be 0");
  for (int64_t i = 0; i < strips; i++) {
    const uint64_t begin = word_at(packed + at.start, i), end = word_at(packed + at.start, i + 1);
    const auto wrong = [&](const char* what) { refuse("packed: start[" + std::to_string(i + 1) + "] " + what); };
    if (end < begin) wrong("is less than the previous entry");
    if (end > word_at(packed + at.start, strips)) wrong("is greater than the last entry");
    if (shape.form == Form::mask) {
      const int64_t planes = mask_planes(shape), lines = ks / line_ks(shape);
      const uint64_t mask_bytes = static_cast<uint64_t>(NYBBLE_MASK_LINES * planes * 8);
      uint64_t next = begin;
      for (int64_t l = 0; l < lines; l += NYBBLE_MASK_LINES) {
        if (end - next < mask_bytes) wrong("leaves no room for the tile's masks");
        uint64_t kept[2] = {0, 0};
        for (int64_t word = 0; word < NYBBLE_MASK_LINES * planes; word++) {
          const uint64_t mask = word_at(packed + at.codes + next, word);
          if (mask && l + word / planes >= lines) wrong("ends a tile with nonzero masks beyond K");
          kept[word % planes] += static_cast<uint64_t>(__builtin_popcountll(mask));
        }
        next += mask_bytes + std::max(kept[0], kept[1]);
        if (next > end) wrong("leaves no room for the values of the tile's masks");
      }
      if (next != end) wrong("does not match the number of values in the tile's masks");
    }
    if (shape.form == Form::blocks) {
      int64_t last = -1;
      for (uint64_t b = begin; b < end; b++) {
        int32_t index;
        std::memcpy(&index, packed + at.index + b * 4, 4);
        if (index <= last || index >= ks / shape.block_k)
          refuse("packed: index[" + std::to_string(b) + "]=" + std::to_string(index) + ": must be in [0, " +
                 std::to_string(ks / shape.block_k) + ") and greater than the previous entry of its strip");
        last = index;
      }
    }
  }
  if (shape.form != Form::gather) return;
  for (uint64_t v = 0; v < word_at(packed + at.start, strips); v++) {
    uint16_t window;
    std::memcpy(&window, packed + at.index + v * 2, 2);
    if (window * kStride + kWindow > ks)
      refuse("packed: window[" + std::to_string(v) + "]=" + std::to_string(window) + ": must be at most " +
             std::to_string((ks - kWindow) / kStride));
  }
  const uint64_t reordered = word_at(packed + at.start, strips + 1);
  if (reordered > 1) refuse("packed: the last word of start must be 0 or 1");
  std::vector<bool> seen(static_cast<size_t>(shape.tiles() * 16));
  for (size_t i = 0; i < seen.size(); i++) {
    int32_t column;
    std::memcpy(&column, packed + at.order + i * 4, 4);
    if (column < 0 || static_cast<size_t>(column) >= seen.size() || seen[column])
      refuse("packed: order[" + std::to_string(i) + "]=" + std::to_string(column) + ": order is not a permutation");
    if (!reordered && static_cast<size_t>(column) != i)
      refuse("packed: order[" + std::to_string(i) + "]=" + std::to_string(column) +
             ": must be the identity, because the last word of start is 0");
    seen[column] = true;
  }
}

namespace {

void unpack_mask(const WeightShape& s, const Sections& at, const uint8_t* packed, const Portable& to, int threads) {
  const WeightShape dense = dense_of(s);
  const Sections into = sections_of(dense);
  std::vector<uint8_t> lines(into.total);
  const int64_t per_tile = s.k_padded() / line_ks(s), planes = mask_planes(s);
  std::memcpy(lines.data() + into.scale, packed + at.scale, into.zero_point - into.scale);
  parallel_for(s.tiles(), threads, [&](int64_t tile) {
    const uint8_t *mask = packed + at.codes + word_at(packed + at.start, tile), *low = mask, *high = mask;
    for (int64_t l = 0; l < per_tile; l++, mask += planes * 8) {
      if (l % NYBBLE_MASK_LINES == 0) {
        mask = std::max(low, high);
        low = high = mask + NYBBLE_MASK_LINES * planes * 8;
      }
      const uint64_t bytes = word_at(mask, 0), nibbles = planes == 2 ? word_at(mask, 1) : 0;
      uint8_t* line = lines.data() + into.codes + static_cast<size_t>((tile * per_tile + l) * kLine);
      std::memset(line, s.bits == 8 ? 0 : 0x88, kLine);
      const uint8_t bits = s.bits == 8 ? 0xff : 0x0f;
      low = spread_values(low, bytes, bits, line);
      high = spread_values(high, nibbles, 0xf0, line);
    }
  });
  unpack(dense, lines.data(), to, threads);
  if (s.bits == 4 && s.k % 2)  // the unused nibble
    for (int64_t n = 0; n < s.n; n++) to.qweight[(n + 1) * ((s.k + 1) / 2) - 1] &= 15;
}

void unpack_gather(const WeightShape& s, const Sections& at, const uint8_t* packed, const Portable& to) {
  std::memset(to.qweight, 0, s.qweight_bytes());
  for (int64_t tile = 0; tile < s.tiles(); tile++)
    for (int64_t lane = 0; lane < 16; lane++) {
      int32_t row;
      std::memcpy(&row, packed + at.order + tile * 64 + lane * 4, 4);
      if (row >= s.n) continue;
      std::memcpy(to.scale + row * 4, packed + at.scale + tile * 64 + lane * 4, 4);
      for (uint64_t v = word_at(packed + at.start, tile); v < word_at(packed + at.start, tile + 1); v++) {
        uint16_t window;
        std::memcpy(&window, packed + at.index + v * 2, 2);
        for (int slot = 0; slot < kSlots; slot++) {
          const uint8_t* entry = packed + at.codes + v * kStep + entry_at(lane, slot);
          const int64_t k = window * kStride + (*entry & 127);
          if (entry[kToCode] && k < s.k) to.qweight[row * s.k + k] = entry[kToCode];
        }
      }
    }
}

void unpack_blocks(const WeightShape& s, const Sections& at, const uint8_t* packed, const Portable& to) {
  const int64_t r = s.block_n, c = s.block_k;
  std::memset(to.qweight, 0, s.qweight_bytes());
  std::memcpy(to.scale, packed + at.scale, s.scale_bytes());
  for (int64_t n = 0; n < s.n; n++)
    for (uint64_t b = word_at(packed + at.start, n / r); b < word_at(packed + at.start, n / r + 1); b++) {
      int32_t index;
      std::memcpy(&index, packed + at.index + b * 4, 4);
      const uint8_t* block = packed + at.codes + static_cast<int64_t>(b) * r * c + n % r / 16 * 16 * c + n % 16 * 4;
      for (int64_t i = 0; i < c && index * c + i < s.k; i++)
        to.qweight[n * s.k + index * c + i] = block[i / 4 * kLine + i % 4];
    }
}

}  // namespace

void unpack_sparse(const WeightShape& shape, const uint8_t* packed, size_t bytes, const Portable& to, int threads) {
  check_packed(shape, packed, bytes);
  const Sections at = sparse_sections(shape, packed, bytes);
  if (shape.form == Form::mask) unpack_mask(shape, at, packed, to, usable_threads(threads));
  if (shape.form == Form::gather) unpack_gather(shape, at, packed, to);
  if (shape.form == Form::blocks) unpack_blocks(shape, at, packed, to);
}

}  // namespace nybble
