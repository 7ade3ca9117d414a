// Compares the attention kernels of the given targets with the scalar one, on random problems and without Python, and
// each with itself on several threads, bit for bit. Those with products of 8 bits equal the scalar one bit for bit too.
//   compare_attention TARGET...      targets of kernels.def that this CPU supports
// Every buffer has its exact size, so that a sanitizer detects out-of-bounds accesses.
#include "../../csrc/attention.h"
#include "random_problem.h"

namespace {

// A random tensor (batch, heads, tokens, width): tokens or heads first in memory, with gaps.
struct Heads {
  Bytes bytes;
  Strides3 at;
  Heads(int64_t batch, int64_t heads, int64_t tokens, int64_t width, NybbleDtype dtype, Random& random) {
    const int64_t gap = random.integer(0, 1) * random.integer(0, 5);
    if (random.integer(0, 1))
      at = {tokens * heads * (width + gap), width + gap, heads * (width + gap)};
    else
      at = {tokens * heads * (width + gap), tokens * (width + gap), width + gap};
    const int64_t last = (batch - 1) * at.batch + (heads - 1) * at.head + (tokens - 1) * at.token + width;
    bytes.resize(static_cast<size_t>(last) * bytes_of(dtype));
    for (size_t i = 0; i < bytes.size(); i += bytes_of(dtype)) store(&bytes[i], dtype, random.real());
  }
};

struct Masked {
  Bytes bytes;
  Masked(int kind, int64_t count, Random& random) {
    const NybbleDtype dtype = kind == NYBBLE_MASK_F32    ? NYBBLE_F32
                              : kind == NYBBLE_MASK_BF16 ? NYBBLE_BF16
                                                         : NYBBLE_F16;
    const size_t size = kind == NYBBLE_MASK_BOOL ? 1 : bytes_of(dtype);
    bytes.resize(static_cast<size_t>(count) * size);
    for (size_t i = 0; i < bytes.size(); i += size) {
      const bool seen = random.integer(0, 3);
      if (kind == NYBBLE_MASK_BOOL)
        bytes[i] = seen;
      else
        store(&bytes[i], dtype, seen ? random.real() : -INFINITY);
    }
  }
};

// Makes the call use the kernel, or the scalar one of its operation.
void use(AttentionCall& call, const KernelEntry& kernel) {
  const bool int8 = std::string(kernel.op) == "attention8";
  call.kernel = int8 ? &find_kernel("attention_scalar") : &kernel;
  call.kernel8 = int8 ? &kernel : nullptr;
}

// Returns "" if the kernel agrees with the scalar one, else what is wrong.
std::string check(const KernelEntry& kernel, int seed) {
  Random random(static_cast<uint64_t>(seed));
  const NybbleDtype dtypes[] = {NYBBLE_F32, NYBBLE_BF16, NYBBLE_F16};
  AttentionCall call{};
  use(call, kernel);
  call.dtype = random.pick(dtypes);
  call.batch = random.integer(1, 2);
  call.kv_heads = random.integer(1, 2);
  call.heads = call.kv_heads * random.integer(1, 3);
  const int64_t least = call.kernel8 ? 96 : 1;  // below that the products are of floats
  call.queries = random.integer(0, 1) ? least + random.integer(0, 2) : least + random.integer(0, 69);
  call.keys = random.integer(0, 7) ? random.integer(least, 150) : random.integer(1000, 1100);
  call.head_dim = random.integer(1, 70);
  call.value_dim = random.integer(1, 70);
  Heads q(call.batch, call.heads, call.queries, call.head_dim, call.dtype, random);
  Heads k(call.batch, call.kv_heads, call.keys, call.head_dim, call.dtype, random);
  Heads v(call.batch, call.kv_heads, call.keys, call.value_dim, call.dtype, random);
  Heads y(call.batch, call.heads, call.queries, call.value_dim, call.dtype, random), other = y, again = y;
  call.mask_kind = static_cast<int>(random.integer(NYBBLE_MASK_NONE, NYBBLE_MASK_F16));
  const bool each_query = random.integer(0, 1);
  Masked mask(call.mask_kind, call.mask_kind ? call.keys * (each_query ? call.queries : 1) : 0, random);
  call.mask = span(mask.bytes);
  call.mask_key = 1;
  call.mask_query = each_query ? call.keys : 0;
  Bytes slopes(random.integer(0, 1) ? static_cast<size_t>(call.heads) * 4 : 0);
  for (size_t i = 0; i < slopes.size(); i += 4) store(&slopes[i], NYBBLE_F32, random.real() / 64);
  call.slopes = span(slopes);
  call.scale = 1.0f;
  call.causal = random.integer(0, 1);
  call.window = call.causal && random.integer(0, 1) ? random.integer(1, 40) : 0;
  call.q = span(q.bytes), call.k = span(k.bytes), call.v = span(v.bytes), call.y = span(y.bytes);
  call.q_at = q.at, call.k_at = k.at, call.v_at = v.at, call.y_at = y.at;
  run_attention(call, 1);
  call.y = span(again.bytes);
  run_attention(call, 3);
  if (again.bytes != y.bytes) return "threads change the result";
  call.y = span(other.bytes);
  use(call, find_kernel(call.kernel8 ? "attention8_scalar" : "attention_scalar"));
  run_attention(call, 1);
  if (call.kernel8) return other.bytes == y.bytes ? "" : "differs from the scalar kernel";
  const float most = call.dtype == NYBBLE_F32 ? 2e-5f : call.dtype == NYBBLE_BF16 ? 1e-2f : 2e-3f;
  const float worst = largest(y.bytes, other.bytes, call.dtype, [](float a, float b) { return std::fabs(a - b); });
  return worst <= most ? "" : "differs from the scalar kernel";
}

}  // namespace

int main(int argc, char** argv) {
  return compare_all(argc, argv, kCases, [](const KernelEntry& kernel) { return kernel.attention != nullptr; }, check);
}
