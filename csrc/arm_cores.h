// The names of Arm's cores.
#pragma once

#include <istream>
#include <string>

namespace nybble {

// What the cores are called whose implementer and part numbers Linux lists in /proc/cpuinfo: "Neoverse-V2", or where
// there are several kinds, in their order, "4 Cortex-A55, 4 Cortex-A76". The numbers of cores that have no name here;
// "unknown" if there are none.
std::string arm_cores(std::istream& cpuinfo);

}  // namespace nybble
