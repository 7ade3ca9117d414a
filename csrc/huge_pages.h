// Memory in huge pages: weights read from memory or from L3 then wait less for the addresses of pages.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace nybble {

// Moves memory (address, bytes) that was written, and will be read again and again, to huge pages, with what else is on
// them. Nothing but speed changes, and the system may refuse. Each call of the system waits for all cores: there is one
// for a run of neighbouring pages.
inline void use_huge_pages([[maybe_unused]] const std::vector<std::pair<uintptr_t, size_t>>& memory) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  constexpr size_t kLeast = size_t{1} << 17;  // less is not worth a call
  constexpr int kCollapse = 25;               // MADV_COLLAPSE, which older headers lack
  std::vector<std::pair<uintptr_t, uintptr_t>> runs;
  for (const auto& [address, bytes] : memory)
    if (bytes >= kLeast) runs.emplace_back(address / kHuge * kHuge, (address + bytes + kHuge - 1) / kHuge * kHuge);
  std::sort(runs.begin(), runs.end());
  for (size_t i = 0; i < runs.size();) {
    auto [begin, end] = runs[i];
    for (i++; i < runs.size() && runs[i].first <= end; i++) end = std::max(end, runs[i].second);
    madvise(reinterpret_cast<void*>(begin), end - begin, kCollapse);
  }
#endif
}

}  // namespace nybble
