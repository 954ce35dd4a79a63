// Picks the kernel table for the processor at run time.
#include <atomic>
#include <string>

#include "kernels.h"

namespace srn {

namespace isa_baseline {
KernelTables make_tables();
}
#if defined(__x86_64__)
namespace isa_avx2 {
KernelTables make_tables();
}
namespace isa_avx512 {
KernelTables make_tables();
}
#endif

static const KernelTables* find(const std::string& isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && (isa == "auto" || isa == "avx512")) {
    static const KernelTables tables = isa_avx512::make_tables();
    return &tables;
  }
  if (avx2 && (isa == "auto" || isa == "avx2")) {
    static const KernelTables tables = isa_avx2::make_tables();
    return &tables;
  }
#endif
  if (isa == "auto" || isa == "baseline") {
    static const KernelTables tables = isa_baseline::make_tables();
    return &tables;
  }
  return nullptr;
}

static std::atomic<const KernelTables*> current{nullptr};

const KernelTables& kernels() {
  const KernelTables* tables = current.load(std::memory_order_acquire);
  if (tables == nullptr) {
    tables = find("auto");
    current.store(tables, std::memory_order_release);
  }
  return *tables;
}

bool select_kernels(const std::string& isa) {
  const KernelTables* tables = find(isa);
  if (tables != nullptr) current.store(tables, std::memory_order_release);
  return tables != nullptr;
}

}  // namespace srn
