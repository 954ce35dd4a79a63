// Scratch buffers that survive the call, one per concurrent call.
#include <mutex>
#include <stdexcept>

#include "layer.h"

namespace srn {

static std::mutex mutex;
static std::vector<std::vector<char>> idle;

Workspace::Workspace() {
  std::lock_guard<std::mutex> lock(mutex);
  if (!idle.empty()) {
    storage_ = std::move(idle.back());
    idle.pop_back();
  }
}

Workspace::~Workspace() {
  std::lock_guard<std::mutex> lock(mutex);
  if (idle.size() < 4) idle.push_back(std::move(storage_));
}

void Workspace::reserve(int64_t bytes) {
  if (int64_t(storage_.size()) < bytes + 64) storage_ = std::vector<char>(bytes + 64);
}

void* Workspace::take(int64_t bytes) {
  const uintptr_t base = (reinterpret_cast<uintptr_t>(storage_.data()) + 63) / 64 * 64;
  void* p = reinterpret_cast<void*>(base + used_);
  used_ += round_up(bytes, 64);
  if (used_ + 63 > int64_t(storage_.size()))
    throw std::logic_error("srn_kernels: workspace too small");
  return p;
}

}  // namespace srn
