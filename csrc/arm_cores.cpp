#include "arm_cores.h"

#include <cstdlib>
#include <utility>
#include <vector>

namespace nybble {

namespace {

struct Core {
  long implementer, part;
  const char* name;
};

// The numbers of arch/arm64/include/asm/cputype.h of Linux.
const Core kCores[] = {
    {0x41, 0xd03, "Cortex-A53"},     {0x41, 0xd04, "Cortex-A35"},    {0x41, 0xd05, "Cortex-A55"},
    {0x41, 0xd07, "Cortex-A57"},     {0x41, 0xd08, "Cortex-A72"},    {0x41, 0xd09, "Cortex-A73"},
    {0x41, 0xd0a, "Cortex-A75"},     {0x41, 0xd0b, "Cortex-A76"},    {0x41, 0xd0c, "Neoverse-N1"},
    {0x41, 0xd0d, "Cortex-A77"},     {0x41, 0xd40, "Neoverse-V1"},   {0x41, 0xd41, "Cortex-A78"},
    {0x41, 0xd44, "Cortex-X1"},      {0x41, 0xd46, "Cortex-A510"},   {0x41, 0xd47, "Cortex-A710"},
    {0x41, 0xd48, "Cortex-X2"},      {0x41, 0xd49, "Neoverse-N2"},   {0x41, 0xd4b, "Cortex-A78C"},
    {0x41, 0xd4d, "Cortex-A715"},    {0x41, 0xd4e, "Cortex-X3"},     {0x41, 0xd4f, "Neoverse-V2"},
    {0x41, 0xd80, "Cortex-A520"},    {0x41, 0xd81, "Cortex-A720"},   {0x41, 0xd82, "Cortex-X4"},
    {0x41, 0xd84, "Neoverse-V3"},    {0x41, 0xd85, "Cortex-X925"},   {0x41, 0xd87, "Cortex-A725"},
    {0x41, 0xd8e, "Neoverse-N3"},    {0x46, 0x001, "A64FX"},         {0x48, 0xd01, "TaiShan v110"},
    {0x4e, 0x004, "Carmel"},         {0x51, 0x001, "Oryon"},         {0x61, 0x022, "Icestorm (M1)"},
    {0x61, 0x023, "Firestorm (M1)"}, {0x61, 0x032, "Blizzard (M2)"}, {0x61, 0x033, "Avalanche (M2)"},
    {0xc0, 0xac3, "Ampere-1"},       {0xc0, 0xac4, "Ampere-1A"},
};

std::string name_of(const std::string& implementer, const std::string& part) {
  for (const Core& core : kCores)
    if (core.implementer == std::strtol(implementer.c_str(), nullptr, 16) &&
        core.part == std::strtol(part.c_str(), nullptr, 16))
      return core.name;
  return "Arm core of implementer " + implementer + ", part " + part;
}

}  // namespace

std::string arm_cores(std::istream& cpuinfo) {
  std::vector<std::pair<std::string, int>> kinds;  // and how many there are
  std::string implementer;
  for (std::string line; std::getline(cpuinfo, line);) {
    const size_t colon = line.find(": ");
    if (colon == std::string::npos) continue;
    const std::string value = line.substr(colon + 2);
    if (!line.compare(0, 15, "CPU implementer")) implementer = value;
    if (line.compare(0, 8, "CPU part")) continue;
    const std::string name = name_of(implementer, value);
    size_t i = 0;
    while (i < kinds.size() && kinds[i].first != name) i++;
    if (i == kinds.size()) kinds.emplace_back(name, 0);
    kinds[i].second++;
  }
  if (kinds.empty()) return "unknown";
  if (kinds.size() == 1) return kinds[0].first;
  std::string all;
  for (const auto& [name, count] : kinds) all += (all.empty() ? "" : ", ") + std::to_string(count) + " " + name;
  return all;
}

}  // namespace nybble
