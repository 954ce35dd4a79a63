// What both kernels are made of, and their launch. Compiled by nvcc, and by g++ with SRN_SHIM for
// tests on a CPU.
#pragma once

#include <cstring>
#include <stdexcept>
#include <string>

#include "elements.h"
#include "launch.h"
#ifdef SRN_SHIM
#include "shim/launch.h"
#endif

// The kernels for many layers are those for few with a larger table: a check of the machine code
// may leave them out.
#ifdef SRN_FEW_LAYERS
#define SRN_MANY kSmall
#else
#define SRN_MANY kLarge
#endif

namespace srn::cuda {
namespace {

template <class A, class Direction, class Work, class Pointers>
SRN_DEVICE void run(const Common& c, const Pointers* layers) {
  const Shared<A> shared = Shared<A>::carve(shared_memory());
  set_up_barriers(c, shared.control);
  if (thread_index() >= kConsumers) {
    Producer<Direction>(c, layers, shared.control, shared.slots).run();
  } else {
    Consumer consumer(c, shared.control, shared.slots);
    Work work(c, layers);
    for (;;) {
      const Entry& e = consumer.entry();
      if (e.op == kExit) break;
      work.run(e);
      consumer.finished();
    }
  }
  leave(c, shared.control);
}

template <class Pointers, int kCapacity>
void launch(void (*kernel)(Parameters<Pointers, kCapacity>), const Common& common,
            const Pointers* layers, int64_t shared_bytes, int ctas, void* stream) {
  if (common.n_layers > kCapacity)
    throw std::length_error("srn_kernels: a launch of more layers than its parameters hold");
  Parameters<Pointers, kCapacity> parameters;
  parameters.common = common;
  std::memcpy(parameters.layers, layers, common.n_layers * sizeof(Pointers));
#ifdef SRN_SHIM
  run_on_host(ctas, int(shared_bytes), [&] { kernel(parameters); });
#else
  const auto check = [](cudaError_t error) {
    if (error != cudaSuccess)
      throw std::runtime_error(std::string("srn_kernels: ") + cudaGetErrorString(error));
  };
  // Costs less than remembering for which device it was set.
  check(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)));
  void* arguments[] = {&parameters};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(ctas), dim3(kThreads),
                         arguments, size_t(shared_bytes), static_cast<cudaStream_t>(stream)));
#endif
}

inline int64_t shared_bytes(const Common& c, bool float64) {
  return control_bytes(float64) +
         int64_t(c.stream_slots + c.resident_slots) * int64_t(c.slot_bytes);
}

// The smallest of a direction's kernels that takes so many layers; float64 has the small one alone.
template <class Pointers, class Small, class Large, class Double>
void launch_one(const Small& small, const Large& large, const Double& float64_kernel,
                const Common& c, const Pointers* layers, bool float64, int ctas, void* stream) {
  const int64_t bytes = shared_bytes(c, float64);
  if (float64)
    launch(float64_kernel, c, layers, bytes, ctas, stream);
  else if (c.n_layers <= kSmall<Pointers>)
    launch(small, c, layers, bytes, ctas, stream);
  else
    launch(large, c, layers, bytes, ctas, stream);
}

}  // namespace
}  // namespace srn::cuda
