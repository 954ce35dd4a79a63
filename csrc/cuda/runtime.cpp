#include "runtime.h"

#include <c10/cuda/CUDACachingAllocator.h>
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

struct Stream {
  cudaStream_t stream = nullptr;
  Stream() { C10_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking)); }
  ~Stream() { C10_CUDA_CHECK_WARN(cudaStreamDestroy(stream)); }
};

void* allocate(size_t bytes, int device) {
  void* memory = nullptr;
  cudaError_t error = cudaMalloc(&memory, bytes);
  if (error == cudaErrorMemoryAllocation && !capturing(current_stream(device))) {
    (void)cudaGetLastError();  // it was met
    c10::cuda::CUDACachingAllocator::emptyCache();
    error = cudaMalloc(&memory, bytes);
  }
  C10_CUDA_CHECK(error);
  return memory;
}

}  // namespace

void* upload(const void* host, size_t bytes, int device) {
  const DeviceGuard guard(device);
  const Uncaptured uncaptured;
  const Stream side;
  void* memory = allocate(bytes, device);
  try {
    if (host)
      C10_CUDA_CHECK(cudaMemcpyAsync(memory, host, bytes, cudaMemcpyHostToDevice, side.stream));
    else
      C10_CUDA_CHECK(cudaMemsetAsync(memory, 0, bytes, side.stream));
    C10_CUDA_CHECK(cudaStreamSynchronize(side.stream));
  } catch (...) {
    release(memory, device);
    throw;
  }
  return memory;
}

void release(void* memory, int device) noexcept {
  try {
    const DeviceGuard guard(device);
    const Uncaptured uncaptured;
    C10_CUDA_CHECK_WARN(cudaFree(memory));  // waits for the device
  } catch (...) {                           // a device that is lost keeps its memory
  }
}

void* current_stream(int device) {
  return c10::cuda::getCurrentCUDAStream(c10::DeviceIndex(device)).stream();
}

bool capturing(void* stream) {
  cudaStreamCaptureStatus status;
  C10_CUDA_CHECK(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status));
  return status != cudaStreamCaptureStatusNone;
}

uint64_t stream_id(void* stream) {
  unsigned long long id = 0;
  C10_CUDA_CHECK(cudaStreamGetId(static_cast<cudaStream_t>(stream), &id));
  return id;
}

void keep_for_graph(void* stream, void* object, void (*forget)(void*)) {
  cudaStreamCaptureStatus status;
  cudaGraph_t graph = nullptr;
  cudaUserObject_t owner = nullptr;
#if CUDART_VERSION >= 13000
  cudaError_t error = cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &status, nullptr,
                                               &graph, nullptr, nullptr, nullptr);
#else
  cudaError_t error = cudaStreamGetCaptureInfo_v2(static_cast<cudaStream_t>(stream), &status,
                                                  nullptr, &graph, nullptr, nullptr);
#endif
  if (error == cudaSuccess && !graph) error = cudaErrorStreamCaptureInvalidated;
  if (error == cudaSuccess)
    error = cudaUserObjectCreate(&owner, object, forget, 1, cudaUserObjectNoDestructorSync);
  if (error == cudaSuccess)
    error = cudaGraphRetainUserObject(graph, owner, 1, cudaGraphUserObjectMove);
  if (error != cudaSuccess) owner ? (void)cudaUserObjectRelease(owner, 1) : forget(object);
  C10_CUDA_CHECK(error);
}

bool serves(bool is_cuda) { return is_cuda; }

DeviceGuard::DeviceGuard(int device) : previous(int(c10::cuda::current_device())) {
  if (previous != device) c10::cuda::set_device(c10::DeviceIndex(device));
}
DeviceGuard::~DeviceGuard() {
  int now = previous;
  C10_CUDA_CHECK_WARN(cudaGetDevice(&now));
  if (now != previous) C10_CUDA_CHECK_WARN(cudaSetDevice(previous));
}

}  // namespace srn::cuda
