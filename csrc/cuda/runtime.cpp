#include "runtime.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

namespace srn::cuda {
namespace {

// Allocations and copies that no capture should see, nor forbid.
class Uncaptured {
 public:
  Uncaptured() { C10_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode)); }
  ~Uncaptured() { C10_CUDA_CHECK_WARN(cudaThreadExchangeStreamCaptureMode(&mode)); }

 private:
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
};

}  // namespace

void* upload(const void* host, size_t bytes, int device) {
  const DeviceGuard guard(device);
  const Uncaptured uncaptured;
  void* memory = nullptr;
  cudaStream_t stream;
  C10_CUDA_CHECK(cudaMalloc(&memory, bytes));
  C10_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  if (host)
    C10_CUDA_CHECK(cudaMemcpyAsync(memory, host, bytes, cudaMemcpyHostToDevice, stream));
  else
    C10_CUDA_CHECK(cudaMemsetAsync(memory, 0, bytes, stream));
  C10_CUDA_CHECK(cudaStreamSynchronize(stream));
  C10_CUDA_CHECK(cudaStreamDestroy(stream));
  return memory;
}

void release(void* memory, int device) {
  const DeviceGuard guard(device);
  const Uncaptured uncaptured;
  C10_CUDA_CHECK_WARN(cudaFree(memory));  // waits for the device
}

void* current_stream(int device) {
  return c10::cuda::getCurrentCUDAStream(c10::DeviceIndex(device)).stream();
}

bool capturing(void* stream) {
  cudaStreamCaptureStatus status;
  C10_CUDA_CHECK(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status));
  return status != cudaStreamCaptureStatusNone;
}

bool serves(bool is_cuda) { return is_cuda; }

DeviceGuard::DeviceGuard(int device) : previous(int(c10::cuda::current_device())) {
  if (previous != device) c10::cuda::set_device(c10::DeviceIndex(device));
}
DeviceGuard::~DeviceGuard() {
  if (int(c10::cuda::current_device()) != previous)
    c10::cuda::set_device(c10::DeviceIndex(previous));
}

}  // namespace srn::cuda
