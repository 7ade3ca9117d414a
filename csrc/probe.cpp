#include "probe.h"

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <new>
#include <stdexcept>

#include "cpu_features.h"
#include "parallel.h"

extern "C" {
#define NYBBLE_PROBE(kind, feature, target) uint64_t nybble_probe_##kind##_##feature(const void*, uint64_t);
#include "probes_built.def"
#undef NYBBLE_PROBE
}

namespace nybble {
namespace {

struct Probe {
  const char *name, *kind, *feature, *target;
  uint64_t (*run)(const void* data, uint64_t amount);
};

const Probe kProbes[] = {
#define NYBBLE_PROBE(kind, feature, target) \
  {#kind "_" #feature, #kind, #feature, #target, nybble_probe_##kind##_##feature},
#include "probes_built.def"
#undef NYBBLE_PROBE
};

// What the compiler flags of a target (CMakeLists.txt) need: the CPU features that they add to those of another target.
struct Flags {
  const char* above;
  std::vector<const char*> features;
};

std::vector<std::string> needs(const Probe& probe) {
  static const std::map<std::string, Flags> flags = {
      {"scalar", {"", {}}},
      {"avx2", {"", {"avx2", "fma", "f16c"}}},
      {"avx512bw", {"avx2", {"avx512f", "avx512bw", "avx512dq", "avx512vl"}}},
      {"avx512vnni", {"avx512bw", {"avx512vnni"}}},
      {"amx", {"avx512vnni", {"avx512bf16", "amx_tile", "amx_int8", "amx_bf16"}}},
      {"neon", {"", {"neon"}}},
      {"neondot", {"neon", {"dotprod"}}},
      {"i8mm", {"neondot", {"i8mm"}}},
      {"neonbf16", {"neon", {"bf16"}}},
  };
  const std::string feature = probe.feature;
  std::vector<std::string> all;
  for (std::string target = probe.target; !target.empty(); target = flags.at(target).above) {
    const auto& more = flags.at(target).features;
    all.insert(all.begin(), more.begin(), more.end());
  }
  if (feature != "scalar" && feature != probe.target) all.push_back(feature);
  return all;
}

std::string why_not(const Probe& probe) {
  const std::vector<std::string> has = detect_cpu(true).features;
  for (const std::string& feature : needs(probe))
    if (std::find(has.begin(), has.end(), feature) == has.end()) return "this CPU or system lacks " + feature;
  return "";
}

const Probe& find(const std::string& name) {
  for (const Probe& probe : kProbes) {
    if (name != probe.name) continue;
    const std::string reason = why_not(probe);
    if (!reason.empty()) throw std::invalid_argument("probe=\"" + name + "\": " + reason);
    return probe;
  }
  throw std::invalid_argument("probe=\"" + name + "\": not in the table, or not built");
}

// Fresh zeroed pages from the operating system, not from the heap, aligned to a huge page.
class Pages {
 public:
  Pages(size_t bytes, [[maybe_unused]] bool huge) : bytes_(bytes + kHuge) {
    base_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base_ == MAP_FAILED) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    madvise(base_, bytes_, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
#endif
  }
  ~Pages() { munmap(base_, bytes_); }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  uint8_t* data() const {
    const uintptr_t start = reinterpret_cast<uintptr_t>(base_);
    return reinterpret_cast<uint8_t*>((start + kHuge - 1) / kHuge * kHuge);
  }

 private:
  static constexpr size_t kHuge = size_t{2} << 20;
  void* base_;
  size_t bytes_;
};

void check(bool holds, const char* message) {
  if (!holds) throw std::invalid_argument(message);
}

}  // namespace

std::vector<ProbeEntry> probe_table() {
  std::vector<ProbeEntry> table;
  for (const Probe& probe : kProbes) table.push_back({probe.name, probe.kind, why_not(probe)});
  return table;
}

ProbeResult run_probe(const ProbeCall& call) {
  const Probe& probe = find(call.name);
  const bool reads = std::string(probe.kind) == "read";
  check(call.threads >= 1 && call.passes >= 1 && call.runs >= 1, "threads, passes, runs: must be at least 1");
  check(call.amount >= 1 && call.amount <= uint64_t{1} << 40, "amount: must be in 1..2^40");
  check(!reads || call.amount % 4096 == 0, "amount: bytes to read must be a multiple of 4096");

  const int threads = usable_threads(call.threads);
  const Pages pages(reads ? call.amount * static_cast<uint64_t>(call.threads) : 1, call.huge_pages);
  std::vector<uint64_t> work(static_cast<size_t>(call.threads));
  const auto run = [&](int64_t passes) {
    parallel_for(call.threads, threads, [&](int64_t i) {
      const uint8_t* data = pages.data() + (reads ? call.amount * static_cast<uint64_t>(i) : 0);
      uint64_t done = 0;
      for (int64_t pass = 0; pass < passes; pass++) done += probe.run(data, call.amount);
      work[static_cast<size_t>(i)] = done;
    });
  };
  if (reads)  // write to every page: untouched pages all map to one shared zero page
    parallel_for(call.threads, threads, [&](int64_t i) {
      uint8_t* data = pages.data() + call.amount * static_cast<uint64_t>(i);
      for (uint64_t at = 0; at < call.amount; at += 4096) data[at] = 1;
    });

  ProbeResult best{0, 0};
  run(1);
  for (int i = 0; i < call.runs; i++) {
    const auto start = std::chrono::steady_clock::now();
    run(call.passes);
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    if (i == 0 || took.count() < best.seconds) best.seconds = took.count();
  }
  for (const uint64_t done : work) best.work += done;
  return best;
}

}  // namespace nybble
