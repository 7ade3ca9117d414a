// Memory in huge pages: weights read from memory or from L3 then wait less for the addresses of pages.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstddef>
#include <cstdint>

namespace nybble {

// Moves memory that was written, and will be read again and again, to huge pages, with what else is on them. Nothing
// but speed changes, and the system may refuse.
inline void use_huge_pages([[maybe_unused]] const void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  constexpr size_t kLeast = size_t{1} << 17;  // less is not worth a call
  constexpr int kCollapse = 25;               // MADV_COLLAPSE, which older headers lack
  if (bytes < kLeast) return;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes + kHuge - 1) / kHuge * kHuge;
  madvise(reinterpret_cast<void*>(begin), end - begin, kCollapse);
#endif
}

}  // namespace nybble
