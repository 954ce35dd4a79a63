// runtime.h for tests on a CPU.
#include "../runtime.h"

#include <cstdlib>
#include <cstring>

namespace srn::cuda {

void* upload(const void* host, size_t bytes, int) {
  void* memory = std::aligned_alloc(128, (bytes + 127) / 128 * 128);
  host ? std::memcpy(memory, host, bytes) : std::memset(memory, 0, bytes);
  return memory;
}
void release(void* memory, int) { std::free(memory); }
void* current_stream(int) { return nullptr; }
bool capturing(void*) { return false; }
bool serves(bool is_cuda) { return !is_cuda; }
DeviceGuard::DeviceGuard(int device) : previous(device) {}
DeviceGuard::~DeviceGuard() {}

}  // namespace srn::cuda
