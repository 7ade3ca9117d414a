// Compares the lookups of the row kernels of the given targets, on random problems and without Python: with the scalar
// ones, and on one thread with several, bit for bit; and, in float32, with the weight's own numbers.
//   compare_lookup TARGET...         targets of kernels.def that this CPU supports
// Every buffer has its exact size, so that a sanitizer detects out-of-bounds accesses.
#include "../../csrc/lookup.h"
#include "../../csrc/portable.h"
#include "random_weight.h"

namespace {

// The portable tensors in one buffer, each aligned to 64 bytes.
Bytes plain_of(const Weight& weight) {
  Bytes all;
  for (const Bytes* part : {&weight.qweight, &weight.scale, &weight.zero_point}) {
    all.resize(static_cast<size_t>(round_up(static_cast<int64_t>(all.size()), 64)));
    all.insert(all.end(), part->begin(), part->end());
  }
  return all;
}

float value_at(const Weight& weight, int64_t n, int64_t k) {
  const WeightShape& s = weight.shape;
  const size_t place = static_cast<size_t>(n * s.groups() + k / s.group());
  const int code = code_at(s, weight.qweight.data(), n, k);
  const int zero = zero_point_at(s, weight.zero_point.data(), static_cast<int64_t>(place));
  return static_cast<float>(code - zero) * scale_at(s, weight.scale.data(), static_cast<int64_t>(place));
}

// Random ids, of 4 or 8 bytes.
Bytes random_ids(int64_t count, int bytes, int64_t rows, Random& random) {
  Bytes ids(static_cast<size_t>(count * bytes));
  for (int64_t i = 0; i < count; i++) {
    const int64_t id = random.integer(0, rows - 1);
    std::memcpy(&ids[static_cast<size_t>(i * bytes)], &id, static_cast<size_t>(bytes));  // little-endian
  }
  return ids;
}

// Where each of so many bags begins, and the end; some ids may belong to none.
Bytes random_bags(int64_t bags, int64_t count, Random& random) {
  std::vector<int64_t> start(static_cast<size_t>(bags + 1));
  for (int64_t& at : start) at = random.integer(0, count);
  std::sort(start.begin(), start.end());
  Bytes bytes(start.size() * 8);
  std::memcpy(bytes.data(), start.data(), bytes.size());
  return bytes;
}

// Returns "" if y is the rows of the weight.
std::string check_values(const Weight& weight, const Bytes& ids, int id_bytes, const Bytes& y) {
  const int64_t k = weight.shape.k;
  for (size_t i = 0; i * 4 < y.size(); i++) {
    int64_t id = 0;
    std::memcpy(&id, &ids[i / static_cast<size_t>(k) * static_cast<size_t>(id_bytes)], static_cast<size_t>(id_bytes));
    if (load(&y[i * 4], NYBBLE_F32) != value_at(weight, id, static_cast<int64_t>(i) % k)) return "a value is wrong";
  }
  return "";
}

std::string check(const KernelEntry& kernel, int seed) {
  Random random(static_cast<uint64_t>(seed));
  const NybbleDtype dtypes[] = {NYBBLE_F32, NYBBLE_BF16, NYBBLE_F16};
  const char* linears[] = {"w8a16_scalar", "w8a16_scalar_groups", "w4a16_scalar"};
  const KernelEntry& linear = find_kernel(random.pick(linears));
  const int64_t n = random.integer(1, 40), k = random.integer(0, 3) ? random.integer(1, 300) : random.integer(500, 700);
  WeightShape shape = random_shape(linear, n, k, random);
  shape.paired = random.integer(0, 1);
  Weight weight = random_weight(shape, random, 1);
  Bytes plain = plain_of(weight);
  LookupCall call{};
  call.kernel = &kernel;
  call.shape = weight.shape;
  call.tiled = random.integer(0, 1);
  call.packed = call.tiled ? span(weight.packed) : span(plain);
  call.id_bytes = random.integer(0, 1) ? 4 : 8;
  call.count = random.integer(0, 7) ? random.integer(0, 20) : random.integer(300, 400);
  Bytes ids = random_ids(call.count, call.id_bytes, n, random), weights(static_cast<size_t>(call.count) * 4);
  for (size_t i = 0; i < weights.size(); i += 4) store(&weights[i], NYBBLE_F32, random.real());
  call.ids = span(ids);
  call.dtype = random.pick(dtypes);
  call.bag = static_cast<int>(random.integer(NYBBLE_BAG_NONE, NYBBLE_BAG_MAX));
  call.bags = random.integer(0, 9);
  Bytes start = random_bags(call.bags, call.count, random);
  call.start = span(start);
  if (call.bag == NYBBLE_BAG_SUM && random.integer(0, 1)) call.weights = span(weights);
  call.left_out = random.integer(0, 1) ? random.integer(0, n - 1) : -1;
  const int64_t rows = call.bag == NYBBLE_BAG_NONE ? call.count : call.bags;
  Bytes y(static_cast<size_t>(rows * k) * bytes_of(call.dtype), 0x55), again(y.size()), other(y.size());
  call.y = span(y);
  run_lookup(call, 1);
  call.y = span(again);
  run_lookup(call, 3);
  if (again != y) return "threads change the result";
  call.kernel = &find_kernel("rows_scalar");
  call.y = span(other);
  run_lookup(call, 1);
  if (other != y) return "differs from the scalar kernel";
  const bool plainly = call.bag == NYBBLE_BAG_NONE && call.dtype == NYBBLE_F32;
  return plainly ? check_values(weight, ids, call.id_bytes, y) : "";
}

}  // namespace

int main(int argc, char** argv) {
  return compare_all(argc, argv, kCases, [](const KernelEntry& kernel) { return kernel.rows != nullptr; }, check);
}
