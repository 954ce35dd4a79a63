// What the bindings need of the device; runtime.cpp answers for CUDA, shim/runtime.cpp for tests on
// a CPU. Torch's own types stay out of here.
#pragma once

#include <cstddef>

namespace srn::cuda {

// Memory that outlives every stream's work and every graph; complete when this returns, also while
// a stream is captured. Zeros where `host` is null. Rare: once a plan and stream.
void* upload(const void* host, size_t bytes, int device);
void release(void* memory, int device);

void* current_stream(int device);
bool capturing(void* stream);
bool serves(bool is_cuda);  // tensors on this kind of device

class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous;
};

}  // namespace srn::cuda
