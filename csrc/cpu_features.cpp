#include "cpu_features.h"

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace nybble {

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

}  // namespace

CpuFeatures detect_cpu() {
  CpuFeatures cpu;
  cpu.brand = brand_string();
  const Leaf one = cpuid(1, 0), seven = cpuid(7, 0), seven1 = cpuid(7, 1);
  const uint64_t state = saved_state(one);
  const bool ymm = (state & 0x6) == 0x6, zmm = (state & 0xe6) == 0xe6, tiles = (state & 0x60000) == 0x60000;
  const struct {
    const char* name;
    bool present;
  } all[] = {
      {"avx", ymm && (one.c >> 28 & 1)},          {"f16c", ymm && (one.c >> 29 & 1)},
      {"fma", ymm && (one.c >> 12 & 1)},          {"avx2", ymm && (seven.b >> 5 & 1)},
      {"avxvnni", ymm && (seven1.a >> 4 & 1)},    {"avx512f", zmm && (seven.b >> 16 & 1)},
      {"avx512dq", zmm && (seven.b >> 17 & 1)},   {"avx512bw", zmm && (seven.b >> 30 & 1)},
      {"avx512vl", zmm && (seven.b >> 31 & 1)},   {"avx512vnni", zmm && (seven.c >> 11 & 1)},
      {"avx512vbmi", zmm && (seven.c >> 1 & 1)},  {"avx512vbmi2", zmm && (seven.c >> 6 & 1)},
      {"avx512bf16", zmm && (seven1.a >> 5 & 1)}, {"amx_int8", tiles && (seven.d >> 25 & 1)},
      {"amx_bf16", tiles && (seven.d >> 22 & 1)},
  };
  for (const auto& feature : all)
    if (feature.present) cpu.features.push_back(feature.name);
#if defined(NYBBLE_EMULATE)
  // In this test build, AVX-512 instructions are emulated in plain C++.
  cpu.features = {"avx",      "f16c",       "fma",        "avx2",        "avx512f",    "avx512dq", "avx512bw",
                  "avx512vl", "avx512vnni", "avx512vbmi", "avx512vbmi2", "avx512bf16", "emulated"};
#endif
  return cpu;
}

#else

CpuFeatures detect_cpu() { return {"unknown", {}}; }

#endif

}  // namespace nybble
