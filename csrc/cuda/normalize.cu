// The forward kernel and its launch.
#include "forward.h"
#include "kernel.h"

namespace srn::cuda {
namespace {

template <class A, int kCapacity>
__global__ void __launch_bounds__(kThreads, 1)
    normalize_kernel(const __grid_constant__ Parameters<ForwardPointers, kCapacity> p) {
  run<A, ForwardDirection, Forward<A>>(p.common, p.layers);
}

constexpr int kFew = kSmall<ForwardPointers>, kMany = SRN_MANY<ForwardPointers>;

}  // namespace

int64_t control_bytes(bool float64) {
  return float64 ? Shared<double>::kBytes : Shared<float>::kBytes;
}

std::string unloadable() {
#ifdef SRN_SHIM
  return "";
#else
  cudaFuncAttributes found;
  const cudaError_t error = cudaFuncGetAttributes(&found, normalize_kernel<float, kFew>);
  if (error == cudaSuccess) return "";
  (void)cudaGetLastError();  // it was met
  return cudaGetErrorString(error);
#endif
}

void launch_normalize(const Common& c, const ForwardPointers* layers, bool float64, int ctas,
                      void* stream) {
  launch_one(normalize_kernel<float, kFew>, normalize_kernel<float, kMany>,
             normalize_kernel<double, kFew>, c, layers, float64, ctas, stream);
}

}  // namespace srn::cuda
