// Convolutions whose patches a kernel reads where they lie in frames of codes: how they are cut for threads.
#pragma once

#include <functional>

#include "conv.h"
#include "parallel.h"

namespace nybble {

// What a run over some samples needs besides the call.
struct DirectRun {
  const ConvCall* call;     // resolved
  NybbleLinearArgs weight;  // its sections
  // The first pixel of the first patch of the first sample, and bytes from a row of pixels, and from a sample, to the
  // next.
  const uint8_t* x;
  int64_t row, sample_bytes;
  const int64_t* offset;  // of the runs of a patch
  int64_t runs, run;
  const NybbleRounding* how;  // of each sample
  int64_t first, samples;
  int workers;
  const DirectRun* more = nullptr;  // whose product is added, see NybbleDirectArgs
};

// Bytes of a run of a patch, that is, of adjacent elements.
int64_t run_of(const ConvShape& shape);

// Every thread of a team calls it. extend(sample, range) extends the range of y of a sample. False if a kernel rejects
// its arguments, or no memory is left.
bool run_direct(const DirectRun& run, Team& team,
                const std::function<void(int64_t sample, const NybbleRangeArgs& range)>& extend);

}  // namespace nybble
