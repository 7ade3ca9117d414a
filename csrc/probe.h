// Measures what this machine can do at most: probes.def, run on its threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace nybble {

struct ProbeCall {
  std::string name;  // <kind>_<feature> of probes.def
  int threads;       // at least 1
  uint64_t amount;   // of each thread and pass: bytes to read, or rounds of multiplies
  int64_t passes;    // over the amount in a run, at least 1
  int runs;          // the fastest counts, at least 1
  bool huge_pages;   // asked for the memory that is read; without, refused
};

struct ProbeResult {
  double seconds;  // of the fastest run
  uint64_t work;   // of all threads in a run: bytes or operations
};

struct ProbeEntry {
  std::string name, kind;
  std::string why_not;  // empty where it runs here
};

std::vector<ProbeEntry> probe_table();

// Throws std::invalid_argument for an unknown name, one that cannot run here, or an argument below its least value.
ProbeResult run_probe(const ProbeCall& call);

}  // namespace nybble
