// Runs a kernel's body on the host; see device.h.
#pragma once

#include <functional>

namespace srn::cuda {

void run_on_host(int ctas, int shared_bytes, const std::function<void()>& body);

}  // namespace srn::cuda
