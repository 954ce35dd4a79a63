// The kernels and their launches. Compiled by nvcc, and by g++ with SRN_SHIM for tests on a CPU.
#include <cstring>
#include <stdexcept>
#include <string>

#include "backward.h"
#include "forward.h"
#include "launch.h"
#ifdef SRN_SHIM
#include "shim/launch.h"
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
    for (int n = 0;; ++n) {
      const Entry& e = consumer.entry(n);
      if (e.op == kExit) break;
      work.run(e);
      consumer.finished(n);
    }
  }
  leave(c, shared.control);
}

template <class A, int kCapacity>
__global__ void __launch_bounds__(kThreads, 1)
    normalize_kernel(const __grid_constant__ Parameters<ForwardPointers, kCapacity> p) {
  run<A, ForwardDirection, Forward<A>>(p.common, p.layers);
}

template <class A, int kCapacity>
__global__ void __launch_bounds__(kThreads, 1)
    backward_kernel(const __grid_constant__ Parameters<BackwardPointers, kCapacity> p) {
  run<A, BackwardDirection, Backward<A>>(p.common, p.layers);
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
  kernel<<<ctas, kThreads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(parameters);
  check(cudaGetLastError());
#endif
}

int64_t shared_bytes(const Common& c, bool float64) {
  return control_bytes(float64) +
         int64_t(c.stream_slots + c.resident_slots) * int64_t(c.slot_bytes);
}

}  // namespace

int64_t control_bytes(bool float64) {
  return float64 ? Shared<double>::kBytes : Shared<float>::kBytes;
}

std::string unloadable() {
#ifdef SRN_SHIM
  return "";
#else
  cudaFuncAttributes found;
  const cudaError_t error =
      cudaFuncGetAttributes(&found, normalize_kernel<float, kSmall<ForwardPointers>>);
  if (error == cudaSuccess) return "";
  (void)cudaGetLastError();  // it was met
  return cudaGetErrorString(error);
#endif
}

void launch_normalize(const Common& c, const ForwardPointers* layers, bool float64, int ctas,
                      void* stream) {
  constexpr int small = kSmall<ForwardPointers>, large = kLarge<ForwardPointers>;
  const int64_t bytes = shared_bytes(c, float64);
  if (float64)
    launch(normalize_kernel<double, small>, c, layers, bytes, ctas, stream);
  else if (c.n_layers <= small)
    launch(normalize_kernel<float, small>, c, layers, bytes, ctas, stream);
  else
    launch(normalize_kernel<float, large>, c, layers, bytes, ctas, stream);
}

void launch_backward(const Common& c, const BackwardPointers* layers, bool float64, int ctas,
                     void* stream) {
  constexpr int small = kSmall<BackwardPointers>, large = kLarge<BackwardPointers>;
  const int64_t bytes = shared_bytes(c, float64);
  if (float64)
    launch(backward_kernel<double, small>, c, layers, bytes, ctas, stream);
  else if (c.n_layers <= small)
    launch(backward_kernel<float, small>, c, layers, bytes, ctas, stream);
  else
    launch(backward_kernel<float, large>, c, layers, bytes, ctas, stream);
}

}  // namespace srn::cuda
