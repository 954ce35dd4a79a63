// runtime.h for tests on a CPU.
#include "runtime.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "../runtime.h"

namespace srn::cuda {
namespace {

std::atomic<int64_t> alive{0};
std::atomic<bool> full{false}, captured{false};
std::atomic<uint64_t> stream{0};
std::vector<std::pair<void*, void (*)(void*)>> kept;

}  // namespace

void* upload(const void* host, size_t bytes, int) {
  if (full) throw std::runtime_error("the CUDA shim: out of memory");
  void* memory = std::aligned_alloc(128, (bytes + 127) / 128 * 128);
  host ? std::memcpy(memory, host, bytes) : std::memset(memory, 0, bytes);
  ++alive;
  return memory;
}
void release(void* memory, int) noexcept {
  std::free(memory);
  --alive;
}
void* current_stream(int) { return nullptr; }
bool capturing(void*) { return captured; }
uint64_t stream_id(void*) { return stream; }
void keep_for_graph(void*, void* object, void (*forget)(void*)) {
  kept.emplace_back(object, forget);
}
bool serves(bool is_cuda) { return !is_cuda; }
DeviceGuard::DeviceGuard(int device) : previous(device) {}
DeviceGuard::~DeviceGuard() {}

namespace shim {

int64_t allocations() { return alive; }
void fail_uploads(bool fail) { full = fail; }
void set_stream(uint64_t id) { stream = id; }
void set_capturing(bool begun) { captured = begun; }
void destroy_graphs() {
  for (auto& [object, forget] : kept) forget(object);
  kept.clear();
}

}  // namespace shim
}  // namespace srn::cuda
