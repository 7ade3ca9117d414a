#include "cpu_features.h"

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#if defined(__aarch64__)
#include <sys/auxv.h>

#include <fstream>

#include "arm_cores.h"
#endif
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace nybble {

CpuFeatures features_of(const CpuWords& words, const std::function<int()>& ask_for_tiles) {
  const uint64_t state = words.saved_state;
  const bool ymm = (state & 0x6) == 0x6, zmm = (state & 0xe6) == 0xe6, tiles = (state & 0x60000) == 0x60000;
  const uint32_t one_c = words.one_c, seven_b = words.seven_b, seven_c = words.seven_c, seven_d = words.seven_d;
  const bool amx = tiles && (seven_d >> 24 & 1);
  const int refusal = amx ? ask_for_tiles() : 0;
  const struct {
    const char* name;
    bool present;
  } all[] = {
      {"avx", ymm && (one_c >> 28 & 1)},
      {"f16c", ymm && (one_c >> 29 & 1)},
      {"fma", ymm && (one_c >> 12 & 1)},
      {"avx2", ymm && (seven_b >> 5 & 1)},
      {"avxvnni", ymm && (words.seven1_a >> 4 & 1)},
      {"avx512f", zmm && (seven_b >> 16 & 1)},
      {"avx512dq", zmm && (seven_b >> 17 & 1)},
      {"avx512bw", zmm && (seven_b >> 30 & 1)},
      {"avx512vl", zmm && (seven_b >> 31 & 1)},
      {"avx512vnni", zmm && (seven_c >> 11 & 1)},
      {"avx512vbmi", zmm && (seven_c >> 1 & 1)},
      {"avx512vbmi2", zmm && (seven_c >> 6 & 1)},
      {"avx512bf16", zmm && (words.seven1_a >> 5 & 1)},
      {"amx_tile", amx && !refusal},
      {"amx_int8", amx && !refusal && (seven_d >> 25 & 1)},
      {"amx_bf16", amx && !refusal && (seven_d >> 22 & 1)},
  };
  CpuFeatures cpu;
  for (const auto& feature : all)
    if (feature.present) cpu.features.push_back(feature.name);
  if (refusal)
    cpu.refused["amx_tile"] = std::string("the operating system refused the tile registers: ") + std::strerror(refusal);
  return cpu;
}

std::vector<std::string> features_of_arm(uint64_t hwcap, uint64_t hwcap2) {
  const struct {
    const char* name;
    bool present;
  } all[] = {
      // the bits of asm/hwcap.h: ASIMD, ASIMDDP, I8MM and BF16
      {"neon", (hwcap >> 1 & 1) != 0},
      {"dotprod", (hwcap >> 20 & 1) != 0},
      {"i8mm", (hwcap2 >> 13 & 1) != 0},
      {"bf16", (hwcap2 >> 14 & 1) != 0},
  };
  std::vector<std::string> features;
  for (const auto& feature : all)
    if (feature.present) features.push_back(feature.name);
  return features;
}

#if defined(__x86_64__)
namespace {

struct Leaf {
  uint32_t a = 0, b = 0, c = 0, d = 0;
};

Leaf cpuid(uint32_t leaf, uint32_t sub) {
  Leaf r;
  __get_cpuid_count(leaf, sub, &r.a, &r.b, &r.c, &r.d);
  return r;
}

// XCR0: the register state that the operating system saves. xgetbv faults without OSXSAVE.
uint64_t saved_state(const Leaf& one) {
  if (!(one.c >> 27 & 1)) return 0;
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

std::string brand_string() {
  if (cpuid(0x80000000u, 0).a < 0x80000004u) return "unknown";
  char text[49] = {};
  for (uint32_t i = 0; i < 3; i++) {
    const Leaf part = cpuid(0x80000002u + i, 0);
    std::memcpy(text + 16 * i, &part, 16);
  }
  std::string brand(text);
  brand.erase(0, brand.find_first_not_of(' '));
  brand.erase(brand.find_last_not_of(' ') + 1);
  return brand;
}

// Asks Linux for the registers of AMX, once. The permission holds for the process: all its threads, those that run
// already too, and children that it forks. A process that it starts asks anew. The kernel refuses if a thread has an
// alternate signal stack too small for the registers. Other systems have no such call.
int ask_for_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // asm/prctl.h; the number of the state in XCR0
  static const int refusal = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 ? 0 : errno;
  return refusal;
#else
  return 0;
#endif
}

}  // namespace

CpuFeatures detect_cpu(bool tiles) {
  const Leaf one = cpuid(1, 0), seven = cpuid(7, 0), seven1 = cpuid(7, 1);
  CpuFeatures cpu = features_of({one.c, seven.b, seven.c, seven.d, seven1.a, saved_state(one)},
                                [&] { return tiles ? ask_for_tiles() : 0; });
  cpu.brand = brand_string();
#if defined(NYBBLE_EMULATE)
  // In this test build, AVX-512 instructions are emulated in plain C++.
  cpu.features = {"avx",      "f16c",     "fma",        "avx2",       "avx512f",     "avx512dq",
                  "avx512bw", "avx512vl", "avx512vnni", "avx512vbmi", "avx512vbmi2", "avx512bf16"};
#endif
#if defined(NYBBLE_EMULATE_AMX)
  const std::vector<std::string> all = cpu.features;
  cpu.features.clear();
  for (const std::string& feature : all)
    if (feature.compare(0, 4, "amx_")) cpu.features.push_back(feature);
  cpu.features.insert(cpu.features.end(), {"amx_tile", "amx_int8", "amx_bf16", "emulated"});
  cpu.refused.clear();
#endif
  return cpu;
}

#elif defined(__aarch64__) && defined(__linux__)

CpuFeatures detect_cpu(bool) {
  std::ifstream cpuinfo("/proc/cpuinfo");
  return {arm_cores(cpuinfo), features_of_arm(getauxval(AT_HWCAP), getauxval(AT_HWCAP2)), {}};
}

#elif defined(__aarch64__) && defined(__APPLE__)
namespace {

bool has(const char* name) {
  int32_t value = 0;
  size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value;
}

}  // namespace

CpuFeatures detect_cpu(bool) {
  CpuFeatures cpu{"unknown", {"neon"}, {}};
  char brand[128];
  size_t size = sizeof brand;
  if (sysctlbyname("machdep.cpu.brand_string", brand, &size, nullptr, 0) == 0) cpu.brand = brand;
  if (has("hw.optional.arm.FEAT_DotProd")) cpu.features.push_back("dotprod");
  if (has("hw.optional.arm.FEAT_I8MM")) cpu.features.push_back("i8mm");
  if (has("hw.optional.arm.FEAT_BF16")) cpu.features.push_back("bf16");
  return cpu;
}

#else

CpuFeatures detect_cpu(bool) { return {"unknown", {}, {}}; }

#endif

}  // namespace nybble
