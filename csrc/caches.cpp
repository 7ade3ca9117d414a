#include "caches.h"

#include <cstdlib>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace nybble {

namespace {

constexpr const char *kVariable = "NYBBLE_CACHE", *kOneStream = "one-stream";
// Where neither the CPU nor the operating system tells.
constexpr int64_t kGuess[] = {32 << 10, 512 << 10, 8 << 20};
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
  constexpr unsigned kNone = 0, kInstructions = 2, kMostCaches = 16;
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

// The caches of the first CPU by sysfs, for the levels that are still unknown.
void add_sysfs(int64_t (&sizes)[3]) {
  int64_t found[3] = {};
  for (int i = 0; i < 8; i++) {
    const std::string path = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(i) + "/";
    std::ifstream level_file(path + "level"), type_file(path + "type"), size_file(path + "size");
    unsigned level = 0;
    std::string type, size;
    if (!(level_file >> level) || !(type_file >> type) || !(size_file >> size)) continue;
    if (type != "Instruction") keep(found, level, size_of(size));
  }
  for (int level = 0; level < 3; level++)
    if (sizes[level] == 0) sizes[level] = found[level];
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
  add_sysfs(sizes);
  for (int level = 0; level < 3; level++) {
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

const Caches& caches() {
  static const Caches found = detect();
  return found;
}

}  // namespace nybble
