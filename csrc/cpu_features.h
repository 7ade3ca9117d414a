// Instruction sets that this CPU and operating system support.
#pragma once

#include <string>
#include <vector>

namespace nybble {

struct CpuFeatures {
  std::string brand;
  std::vector<std::string> features;  // e.g. "avx2", "avx512vnni"; only those whose registers the OS saves
};

CpuFeatures detect_cpu();

}  // namespace nybble
