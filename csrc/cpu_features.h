// What this CPU and this operating system let a kernel use.
#pragma once

#include <string>
#include <vector>

namespace nybble {

struct CpuFeatures {
  std::string brand;
  std::vector<std::string> features;  // e.g. "avx2", "avx512vnni"; only those whose registers the system saves
};

CpuFeatures detect_cpu();

}  // namespace nybble
