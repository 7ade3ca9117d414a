// Runs the probes of probes.def, which measure this machine's peak memory bandwidth and multiply rates.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace nybble {

struct ProbeCall {
  std::string name;  // <kind>_<feature> of probes.def
  int threads;       // at least 1
  uint64_t amount;   // per thread and pass: bytes to read, or rounds of multiplies
  int64_t passes;    // per run, at least 1
  int runs;          // at least 1; the fastest is returned
  bool huge_pages;   // whether to request huge pages for the memory that is read, or to forbid them
};

struct ProbeResult {
  double seconds;  // of the fastest run
  uint64_t work;   // bytes or operations of all threads in a run
};

struct ProbeEntry {
  std::string name, kind;
  std::string why_not;  // empty if it runs here
};

std::vector<ProbeEntry> probe_table();

// Throws std::invalid_argument for an unknown name, a probe that cannot run here, or an argument out of range.
ProbeResult run_probe(const ProbeCall& call);

}  // namespace nybble
