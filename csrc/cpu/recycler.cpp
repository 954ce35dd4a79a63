// Touching fresh pages costs several times the arithmetic of a round, and the allocator returns
// large blocks to the system; so a lent block comes back here when its storage dies, and is lent
// again. Whatever keeps a storage alive (views, graphs, Python) keeps its block from coming back.
#include "recycler.h"

#include <memory>
#include <mutex>
#include <unordered_map>

namespace srn {
namespace {

constexpr int64_t kSmallest = 64 << 10;  // below, the allocator itself keeps the pages
constexpr uint64_t kForgetAfter = 512;   // calls without use until an idle block is freed

struct Block {
  c10::DataPtr memory;
  int64_t bytes;
  uint64_t last_used;
};

struct Pool {
  std::mutex mutex;
  std::unordered_map<int64_t, std::vector<std::unique_ptr<Block>>> idle;  // by bytes
  uint64_t calls = 0;
};

// Never destroyed: tensors may outlive the module.
Pool& pool() {
  static Pool* const instance = new Pool;
  return *instance;
}

// The deleter of a lent block; runs on any thread, with or without Python's lock.
void give_back(void* context) {
  std::unique_ptr<Block> block(static_cast<Block*>(context));
  std::lock_guard<std::mutex> lock(pool().mutex);
  block->last_used = pool().calls;
  pool().idle[block->bytes].push_back(std::move(block));
}

c10::Storage storage(int64_t bytes, c10::DataPtr memory) {
  return c10::Storage(c10::Storage::use_byte_size_t(), bytes, std::move(memory),
                      c10::GetAllocator(at::kCPU), /*resizable=*/true);
}

c10::Storage take(int64_t bytes) {
  if (bytes < kSmallest) return storage(bytes, c10::GetAllocator(at::kCPU)->allocate(bytes));
  auto& idle = pool().idle[bytes];
  std::unique_ptr<Block> block;
  if (idle.empty()) {
    block.reset(new Block{c10::GetAllocator(at::kCPU)->allocate(bytes), bytes, 0});
  } else {
    block = std::move(idle.back());
    idle.pop_back();
  }
  void* data = block->memory.get();
  return storage(bytes, c10::DataPtr(data, block.release(), &give_back, at::kCPU));
}

int64_t drop_idle(uint64_t unused_since) {
  int64_t freed = 0;
  for (auto& [bytes, idle] : pool().idle)
    for (size_t i = 0; i < idle.size(); ++i)
      if (idle[i]->last_used <= unused_since) {
        freed += bytes;
        idle.erase(idle.begin() + i--);
      }
  return freed;
}

// Past the dispatcher, which would cost more than the arithmetic of a small layer.
at::Tensor take_one(const at::Tensor& like, at::ScalarType type) {
  const int64_t bytes = like.numel() * int64_t(c10::elementSize(type));
  at::Tensor t = at::detail::make_tensor<c10::TensorImpl>(
      take(bytes), c10::DispatchKeySet(c10::DispatchKey::CPU), c10::scalarTypeToTypeMeta(type));
  t.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides());
  return t;
}

template <class TypeOf>
std::vector<at::Tensor> take_all(const std::vector<at::Tensor>& like, const TypeOf& type_of) {
  // Outlives the lock: if an allocation fails, the tensors taken so far give their blocks back.
  std::vector<at::Tensor> out;
  out.reserve(like.size());
  std::lock_guard<std::mutex> lock(pool().mutex);
  if (++pool().calls % kForgetAfter == 0) drop_idle(pool().calls - kForgetAfter);
  for (const auto& t : like) out.push_back(take_one(t, type_of(t)));
  return out;
}

}  // namespace

std::vector<at::Tensor> take_like(const std::vector<at::Tensor>& like, at::ScalarType type) {
  return take_all(like, [&](const at::Tensor&) { return type; });
}

std::vector<at::Tensor> take_like(const std::vector<at::Tensor>& like) {
  return take_all(like, [](const at::Tensor& t) { return t.scalar_type(); });
}

int64_t empty_recycler() {
  std::lock_guard<std::mutex> lock(pool().mutex);
  return drop_idle(~uint64_t(0));
}

}  // namespace srn
