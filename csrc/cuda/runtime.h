// What the bindings need of the device; runtime.cpp answers for CUDA, shim/runtime.cpp for tests on
// a CPU. Torch's own types stay out of here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>

namespace srn::cuda {

// Memory that outlives every stream's work; complete when this returns, also while a stream is
// captured. Zeros where `host` is null. Rare: once a plan and stream. Where the device is full,
// what torch's allocator only holds in reserve is given back first.
void* upload(const void* host, size_t bytes, int device);
void release(void* memory, int device) noexcept;

// Owns what upload() gave.
class Memory {
 public:
  Memory() = default;
  Memory(const void* host, size_t bytes, int device)
      : memory(upload(host, bytes, device)), device(device) {}
  Memory(Memory&& other) noexcept
      : memory(std::exchange(other.memory, nullptr)), device(other.device) {}
  Memory& operator=(Memory&& other) noexcept {
    std::swap(memory, other.memory);
    std::swap(device, other.device);
    return *this;
  }
  ~Memory() {
    if (memory) release(memory, device);
  }
  char* data() const { return static_cast<char*>(memory); }

 private:
  void* memory = nullptr;
  int device = 0;
};

void* current_stream(int device);
bool capturing(void* stream);
// Which stream this is, for the calling thread: handles such as cudaStreamPerThread name several.
uint64_t stream_id(void* stream);
// Keeps `object` until the graph that `stream` is captured into, and everything made of it, is
// gone; `forget` is called then, perhaps by another thread, and may not call the device.
void keep_for_graph(void* stream, void* object, void (*forget)(void*));
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
