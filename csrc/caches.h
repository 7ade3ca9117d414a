// Sizes of the data caches of one core.
#pragma once

#include <cstdint>
#include <string>

namespace nybble {

struct Caches {
  int64_t l1 = 0, l2 = 0, l3 = 0;  // bytes; l1 holds data only, l3 may be shared with other cores
};

// From NYBBLE_CACHE, if it is set, else from CPUID, else from sysfs, else a guess; read once.
// Throws std::invalid_argument if NYBBLE_CACHE is not three ascending sizes.
const Caches& caches();

// "32K,512K,32M" as caches: sizes in bytes, or with the suffix K or M. Throws std::invalid_argument.
Caches parse_caches(const std::string& text);

}  // namespace nybble
