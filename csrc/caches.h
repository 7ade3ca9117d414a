// The data caches of one core, and how it fetches from memory.
#pragma once

#include <array>
#include <cstdint>
#include <string>

namespace nybble {

struct Caches {
  int64_t l1 = 0, l2 = 0, l3 = 0;  // bytes; l1 holds data only, l3 may be shared with other cores
  // Whether one stream in the order of addresses, left to the hardware's prefetching, comes fastest from memory; else
  // several streams that software prefetches do. Measured with one row of 4096 x 4096: on Zen 5 one stream is 15 to 17
  // % faster, on Emerald Rapids several are 33 to 58 % faster with w4a8 and 13 to 56 % with w8a8.
  bool one_stream = false;
};

// Sizes from NYBBLE_CACHE, if it is set, else from CPUID, else from sysfs or sysctl, else a guess; read once.
// Throws std::invalid_argument if NYBBLE_CACHE is not three ascending sizes.
const Caches& caches();

// "32K,512K,32M" as caches: sizes in bytes, or with the suffix K or M; one_stream with a fourth word "one-stream".
// Throws std::invalid_argument.
Caches parse_caches(const std::string& text);

// The bytes of L1, L2 and L3 in a tree such as Linux keeps in /sys/devices/system/cpu: those of its fastest core, since
// that one does most of the work where cores differ. 0: not listed, or not to be believed. A machine that lists an L2
// and no L3 has none: L3 is then L2.
std::array<int64_t, 3> listed_caches(const std::string& cpus);

}  // namespace nybble
