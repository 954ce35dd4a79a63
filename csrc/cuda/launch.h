// The launches: torch-free, one kernel each.
#pragma once

#include <cstdint>
#include <string>

#include "plan.h"

namespace srn::cuda {

// Errors are std::runtime_error. `stream` is a cudaStream_t; float64: all layers compute in it.
void launch_normalize(const Common& common, const ForwardPointers* layers, bool float64, int ctas,
                      void* stream);
void launch_backward(const Common& common, const BackwardPointers* layers, bool float64, int ctas,
                     void* stream);

// Why the kernels cannot run on the current device: they were built for others. Empty: they can.
std::string unloadable();

// Shared memory of a CTA without its slots.
int64_t control_bytes(bool float64);

}  // namespace srn::cuda
