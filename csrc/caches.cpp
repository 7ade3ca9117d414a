#include "caches.h"

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace nybble {

namespace {

constexpr const char *kVariable = "NYBBLE_CACHE", *kOneStream = "one-stream";
// Where neither the CPU nor the operating system tells.
constexpr int64_t kGuess[] = {32 << 10, 512 << 10, 8 << 20};
constexpr int kMostCaches = 16;
// Sizes outside are not believed: some hypervisors report nonsense.
constexpr int64_t kLeast[] = {8 << 10, 128 << 10, 1 << 20}, kMost[] = {1 << 20, 64 << 20, int64_t{4} << 30};

[[noreturn]] void refuse(const std::string& text) {
  throw std::invalid_argument(
      std::string(kVariable) + "=\"" + text +
      "\": must be the bytes of L1, L2 and L3, ascending, such as 32K,512K,32M, and one-stream after them or not");
}

// Bytes of a size such as 512K; 0 if it is none.
int64_t size_of(const std::string& text) {
  const size_t digits = text.find_first_not_of("0123456789");
  const std::string unit = digits == std::string::npos ? "" : text.substr(digits);
  const int64_t factor = unit.empty() ? 1 : unit == "K" ? 1 << 10 : unit == "M" ? 1 << 20 : 0;
  const size_t length = text.size() - unit.size();
  return length < 1 || length > 9 ? 0 : std::atoll(text.substr(0, length).c_str()) * factor;
}

void keep(int64_t (&sizes)[3], unsigned level, int64_t bytes) {
  if (level < 1 || level > 3) return;
  int64_t& size = sizes[level - 1];
  if (bytes >= kLeast[level - 1] && bytes <= kMost[level - 1] && bytes > size) size = bytes;
}

#if defined(__x86_64__)
// The caches of a CPUID leaf that lists them: 4 of Intel, 0x8000001D of AMD.
void add_cpuid(int64_t (&sizes)[3], unsigned leaf) {
  constexpr unsigned kNone = 0, kInstructions = 2;
  for (unsigned i = 0; i < kMostCaches; i++) {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(leaf, i, &a, &b, &c, &d)) return;
    const unsigned type = a & 31, level = a >> 5 & 7;
    if (type == kNone) return;
    const int64_t line = (b & 0xfff) + 1, partitions = (b >> 12 & 0x3ff) + 1, ways = (b >> 22) + 1;
    if (type != kInstructions) keep(sizes, level, line * partitions * ways * (int64_t{c} + 1));
  }
}
#endif

// The folder of the core with the greatest capacity, of several the first, of those that list their caches: a core that
// is switched off lists none. Capacities are listed where cores differ.
std::string fastest_core(const std::string& cpus) {
  std::string fastest;
  int64_t most = 0, first = 0;
  std::error_code absent;
  for (const auto& entry : std::filesystem::directory_iterator(cpus, absent)) {
    const std::string name = entry.path().filename().string();
    int64_t core = 0, capacity = 0;
    if (name.rfind("cpu", 0) != 0 || !(std::istringstream(name.substr(3)) >> core)) continue;
    if (!std::ifstream(entry.path() / "cache/index0/level")) continue;
    std::ifstream(entry.path() / "cpu_capacity") >> capacity;
    if (fastest.empty() || capacity > most || (capacity == most && core < first)) {
      most = capacity, first = core;
      fastest = entry.path().string();
    }
  }
  return fastest;
}

#if defined(__APPLE__)
int64_t system_value(const char* name) {
  int64_t value = 0;
  size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 ? value : 0;
}
#endif

// What the operating system lists: macOS that of the fast cores, of which several share an L2, and no L3.
std::array<int64_t, 3> system_caches() {
#if defined(__APPLE__)
  const int64_t shared = system_value("hw.perflevel0.l2cachesize"), cores = system_value("hw.perflevel0.cpusperl2");
  int64_t sizes[3] = {};
  keep(sizes, 1, system_value("hw.perflevel0.l1dcachesize"));
  keep(sizes, 2, cores > 0 ? shared / cores : shared);
  keep(sizes, 3, shared);
  return {sizes[0], sizes[1], sizes[2]};
#else
  return listed_caches("/sys/devices/system/cpu");
#endif
}

// Of AMD's CPUs, Zen 5 was measured; of Intel's, Emerald Rapids.
bool has_one_stream() {
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(0, &a, &b, &c, &d) && b == signature_AMD_ebx && c == signature_AMD_ecx && d == signature_AMD_edx;
#else
  return false;
#endif
}

Caches detect() {
  const bool one_stream = has_one_stream();
  if (const char* text = std::getenv(kVariable); text && *text) {
    Caches told = parse_caches(text);
    told.one_stream |= one_stream;
    return told;
  }
  int64_t sizes[3] = {};
#if defined(__x86_64__)
  add_cpuid(sizes, 4);
  add_cpuid(sizes, 0x8000001Du);
#endif
  const std::array<int64_t, 3> listed = system_caches();
  for (int level = 0; level < 3; level++) {
    if (sizes[level] == 0) sizes[level] = listed[level];
    if (sizes[level] == 0) sizes[level] = kGuess[level];
    if (level > 0 && sizes[level] < sizes[level - 1]) sizes[level] = sizes[level - 1];
  }
  return {sizes[0], sizes[1], sizes[2], one_stream};
}

}  // namespace

Caches parse_caches(const std::string& text) {
  std::vector<int64_t> sizes;
  std::istringstream parts(text);
  bool one_stream = false;
  for (std::string part; std::getline(parts, part, ',');) {
    if (one_stream) refuse(text);
    one_stream = sizes.size() == 3 && part == kOneStream;
    if (!one_stream) sizes.push_back(size_of(part));
  }
  if (sizes.size() != 3 || sizes[0] < 1 || sizes[1] < sizes[0] || sizes[2] < sizes[1] || text.back() == ',')
    refuse(text);
  return {sizes[0], sizes[1], sizes[2], one_stream};
}

std::array<int64_t, 3> listed_caches(const std::string& cpus) {
  const std::string core = fastest_core(cpus) + "/cache/index";
  int64_t sizes[3] = {};
  bool has_l3 = false;
  for (int i = 0; i < kMostCaches; i++) {
    const std::string path = core + std::to_string(i) + "/";
    std::ifstream level_file(path + "level"), type_file(path + "type"), size_file(path + "size");
    unsigned level = 0;
    std::string type, size;
    if (!(level_file >> level) || !(type_file >> type) || !(size_file >> size)) continue;
    has_l3 |= level == 3;
    if (type != "Instruction") keep(sizes, level, size_of(size));
  }
  if (!has_l3) sizes[2] = sizes[1];
  return {sizes[0], sizes[1], sizes[2]};
}

const Caches& caches() {
  static const Caches found = detect();
  return found;
}

}  // namespace nybble
