// What tests on a CPU can arrange and ask of the device that shim/runtime.cpp stands in for.
#pragma once

#include <cstdint>

namespace srn::cuda::shim {

int64_t allocations();           // alive
void fail_uploads(bool fail);    // as a full device does
void set_stream(uint64_t id);    // the current one
void set_capturing(bool begun);  // into a graph that lives until destroy_graphs()
void destroy_graphs();

}  // namespace srn::cuda::shim
