// The backward kernel and its launch.
#include "backward.h"

#include "kernel.h"

namespace srn::cuda {
namespace {

template <class A, int kCapacity>
__global__ void __launch_bounds__(kThreads, 1)
    backward_kernel(const __grid_constant__ Parameters<BackwardPointers, kCapacity> p) {
  run<A, BackwardDirection, Backward<A>>(p.common, p.layers);
}

constexpr int kFew = kSmall<BackwardPointers>, kMany = SRN_MANY<BackwardPointers>;

}  // namespace

void launch_backward(const Common& c, const BackwardPointers* layers, bool float64, int ctas,
                     void* stream) {
  launch_one(backward_kernel<float, kFew>, backward_kernel<float, kMany>,
             backward_kernel<double, kFew>, c, layers, float64, ctas, stream);
}

}  // namespace srn::cuda
