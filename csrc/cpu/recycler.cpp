// Touching fresh pages costs several times the arithmetic of a round, and the allocator returns
// large blocks to the system; so storages are kept here and handed out again once their reference
// count says that the pool is their only owner.
#include "recycler.h"

#include <mutex>
#include <unordered_map>

namespace srn {
namespace {

constexpr int64_t kSmallest = 64 << 10;  // below, the allocator itself keeps the pages
constexpr uint64_t kForgetAfter = 512;   // calls without use until an idle storage is freed

struct Kept {
  c10::Storage storage;
  const void* data;
  uint64_t last_used;
};

std::mutex mutex;
std::unordered_map<int64_t, std::vector<Kept>> pool;  // by bytes
uint64_t calls = 0;

bool idle(const Kept& k) { return k.storage.use_count() == 1; }

// Someone may have resized the storage or moved it to shared memory.
bool intact(const Kept& k, int64_t bytes) {
  return int64_t(k.storage.nbytes()) == bytes && k.storage.data() == k.data;
}

c10::Storage take(int64_t bytes) {
  auto& kept = pool[bytes];
  for (size_t i = 0; i < kept.size(); ++i) {
    if (!idle(kept[i])) continue;
    if (!intact(kept[i], bytes)) {
      kept.erase(kept.begin() + i--);
      continue;
    }
    kept[i].last_used = calls;
    return kept[i].storage;
  }
  at::Tensor fresh = at::empty({bytes}, at::TensorOptions().dtype(at::kByte));
  kept.push_back({fresh.storage(), fresh.storage().data(), calls});
  return fresh.storage();
}

int64_t drop_idle(uint64_t unused_since) {
  int64_t freed = 0;
  for (auto& [bytes, kept] : pool)
    for (size_t i = 0; i < kept.size(); ++i)
      if (idle(kept[i]) && kept[i].last_used <= unused_since) {
        freed += bytes;
        kept.erase(kept.begin() + i--);
      }
  return freed;
}

at::Tensor take_one(const at::Tensor& like, at::ScalarType type) {
  const int64_t bytes = like.numel() * int64_t(c10::elementSize(type));
  const auto options = at::TensorOptions().dtype(type);
  if (bytes < kSmallest) return at::empty_strided(like.sizes(), like.strides(), options);
  at::Tensor t = at::detail::make_tensor<c10::TensorImpl>(
      take(bytes), c10::DispatchKeySet(c10::DispatchKey::CPU), c10::scalarTypeToTypeMeta(type));
  t.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides());
  return t;
}

}  // namespace

std::vector<at::Tensor> take_like(const std::vector<at::Tensor>& like, at::ScalarType type) {
  std::lock_guard<std::mutex> lock(mutex);
  if (++calls % kForgetAfter == 0) drop_idle(calls - kForgetAfter);
  std::vector<at::Tensor> out;
  out.reserve(like.size());
  for (const auto& t : like) out.push_back(take_one(t, type));
  return out;
}

std::vector<at::Tensor> take_like(const std::vector<at::Tensor>& like) {
  std::lock_guard<std::mutex> lock(mutex);
  if (++calls % kForgetAfter == 0) drop_idle(calls - kForgetAfter);
  std::vector<at::Tensor> out;
  out.reserve(like.size());
  for (const auto& t : like) out.push_back(take_one(t, t.scalar_type()));
  return out;
}

int64_t empty_recycler() {
  std::lock_guard<std::mutex> lock(mutex);
  return drop_idle(~uint64_t(0));
}

}  // namespace srn
