#include "lookup.h"

#include <algorithm>
#include <vector>

#include "parallel.h"

namespace nybble {

namespace {

constexpr size_t kAlignment = 64;

size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Fills in where the sections of the weight lie; they are inside the packed weight.
void place_sections(const LookupCall& call, NybbleLookupArgs& args) {
  const WeightShape& s = call.shape;
  Sections at;
  if (call.tiled) {
    at = sections_of(s);
    args.tile_bytes = s.k_padded() / (s.bits == 8 ? 4 : 8) * 4 * NYBBLE_TILE_N;
  } else {
    at.scale = aligned(s.qweight_bytes());
    at.zero_point = at.scale + aligned(s.scale_bytes());
    at.minimum = at.zero_point;  // it has one of the two
    at.total = at.zero_point + s.zero_point_bytes() + s.minimum_bytes();
  }
  require("packed", call.packed, static_cast<int64_t>(at.total), 1);
  const auto* packed = reinterpret_cast<const uint8_t*>(call.packed.address);
  args.codes = packed + at.codes;
  args.scale = packed + at.scale;
  args.scale_dtype = s.scale_dtype();
  args.zero_point = s.symmetric ? nullptr : packed + at.zero_point;
  args.minimum = s.minimum ? packed + at.minimum : nullptr;
}

void check_bags(const LookupCall& call) {
  if (call.bags < 0) refuse("bags=" + std::to_string(call.bags) + ": must be at least 0");
  require("start", call.start, call.bags + 1, 8);
  const auto* start = reinterpret_cast<const int64_t*>(call.start.address);
  for (int64_t i = 0; i <= call.bags; i++) {
    const int64_t least = i ? start[i - 1] : 0;
    if (start[i] < least || start[i] > call.count)
      refuse("offsets[" + std::to_string(i) + "]=" + std::to_string(start[i]) + ": must be at least " +
             std::to_string(least) + " and at most the number of ids, " + std::to_string(call.count));
  }
  if (call.weights.address) require("per_sample_weights", call.weights, call.count, 4);
}

NybbleLookupArgs args_of(const LookupCall& call) {
  NybbleLookupArgs args{};
  const WeightShape& s = call.shape;
  if (s.form != Form::dense) refuse("layout: must be a dense one");
  if (call.id_bytes != 4 && call.id_bytes != 8) refuse("ids: must be int32 or int64");
  if (call.dtype == NYBBLE_S32) refuse("dtype: must be a float");
  require("ids", call.ids, call.count, call.id_bytes);
  const bool bags = call.bag != NYBBLE_BAG_NONE;
  if (bags) check_bags(call);
  args.end = bags ? call.bags : call.count;
  if (args.end > (int64_t{1} << 62) / s.k) refuse("ids: too many");
  require("y", call.y, args.end * s.k, dtype_bytes(call.dtype));
  place_sections(call, args);
  args.dtype = call.dtype, args.id_bytes = call.id_bytes, args.code_bits = s.bits, args.bag = call.bag;
  args.flipped = call.tiled ? s.flipped() : 0, args.paired = call.tiled && s.paired;
  args.ids = reinterpret_cast<const void*>(call.ids.address);
  args.start = reinterpret_cast<const int64_t*>(call.start.address);
  args.weights = reinterpret_cast<const float*>(call.weights.address);
  args.left_out = call.left_out;
  args.rows = s.n, args.columns = s.k;
  args.group = s.group(), args.groups = s.groups();
  args.y = {reinterpret_cast<void*>(call.y.address), s.k};
  return args;
}

[[noreturn]] void refuse_id(const LookupCall& call, int64_t place) {
  const void* ids = reinterpret_cast<const void*>(call.ids.address);
  const int64_t id =
      call.id_bytes == 8 ? static_cast<const int64_t*>(ids)[place] : static_cast<const int32_t*>(ids)[place];
  throw std::out_of_range("ids: " + std::to_string(id) + " (item " + std::to_string(place) + ") is not in [0, " +
                          std::to_string(call.shape.n) + "), the rows of the embedding");
}

}  // namespace

int bag_of(const std::string& mode) {
  if (mode == "sum") return NYBBLE_BAG_SUM;
  if (mode == "mean") return NYBBLE_BAG_MEAN;
  if (mode == "max") return NYBBLE_BAG_MAX;
  refuse("mode=\"" + mode + "\": must be \"sum\", \"mean\" or \"max\"");
}

void run_lookup(const LookupCall& call, int threads) {
  const NybbleLookupArgs whole = args_of(call);
  // A piece has at least so many elements, which take longer than handing it out.
  constexpr int64_t kLeastElements = 1 << 16;
  const int64_t read = std::max(whole.end, call.count);
  const int64_t workers = usable_threads(threads), most = read * call.shape.k / kLeastElements + 1;
  const int64_t pieces = std::max<int64_t>(1, std::min({most, workers == 1 ? 1 : 4 * workers, whole.end}));
  std::vector<int64_t> wrong(static_cast<size_t>(pieces), -1);
  std::vector<NybbleStatus> status(static_cast<size_t>(pieces), NYBBLE_OK);
  parallel_for(pieces, static_cast<int>(workers), [&](int64_t i) {
    NybbleLookupArgs part = whole;
    part.begin = whole.end * i / pieces, part.end = whole.end * (i + 1) / pieces;
    part.wrong = &wrong[static_cast<size_t>(i)];
    status[static_cast<size_t>(i)] = call.kernel->rows->lookup(&part);
  });
  for (size_t i = 0; i < wrong.size(); i++) {
    if (wrong[i] >= 0) refuse_id(call, wrong[i]);
    if (status[i] != NYBBLE_OK) refuse("kernel: refuses this lookup");
  }
}

}  // namespace nybble
