// Convolutions in which each channel has a weight of its own, a row of outputs at a time: see
// csrc/cpu/tile_depthwise.h.
#pragma once

#include <vector>

#include "conv.h"

namespace nybble {

// What a row needs besides its codes.
struct DepthwiseRun {
  const ConvCall* call;     // resolved
  NybbleLinearArgs weight;  // its sections
  const int64_t* offset;    // of the taps of a patch
  const float* taps;        // see depthwise_taps
  NybbleRounding how;       // of the sample
};

// The codes of the weights of each channel, as floats: [K][channels, rounded up to whole tiles].
std::vector<float> depthwise_taps(const LinearCall& linear);

// The outputs of a row of codes from x on, before what follows the product; valid until this thread's next call. Null
// if the kernel rejects its arguments, or no memory is left.
const float* run_depthwise(const DepthwiseRun& run, const uint8_t* x);

}  // namespace nybble
