// Instruction sets that this CPU and operating system support.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace nybble {

struct CpuFeatures {
  std::string brand;
  std::vector<std::string> features;           // e.g. "avx2", "avx512vnni"; only those whose registers the OS saves
  std::map<std::string, std::string> refused;  // features that the CPU has but the OS refuses: why
};

// The words of CPUID that hold feature bits, named for leaf and register, and XCR0: the registers that the OS saves.
struct CpuWords {
  uint32_t one_c, seven_b, seven_c, seven_d, seven1_a;
  uint64_t saved_state;
};

// The features of a CPU of x86 without its brand. ask_for_tiles is called if there are tile registers, and returns 0 if
// this process may use them, else an errno.
CpuFeatures features_of(const CpuWords& words, const std::function<int()>& ask_for_tiles);

// The features of a CPU of AArch64, from the words AT_HWCAP and AT_HWCAP2 that Linux gives a process.
std::vector<std::string> features_of_arm(uint64_t hwcap, uint64_t hwcap2);

// tiles: whether to ask the operating system for the tile registers of AMX, which this process then holds. Without
// asking, a CPU that has them counts as having them.
CpuFeatures detect_cpu(bool tiles);

}  // namespace nybble
