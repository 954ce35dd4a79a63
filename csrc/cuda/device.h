// The few things that the kernels need of the hardware, for sm_80 and later. Bulk copies exist from
// sm_90 on; sm_80 does the same with 16-byte cp.async. shim/device.h answers the same names on a
// CPU.
#pragma once

#ifdef SRN_SHIM
#include "shim/device.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "plan.h"

#define SRN_DEVICE __device__ __forceinline__

namespace srn::cuda {

// Asked for anew each time: registers are needed for more.
SRN_DEVICE int thread_index() {
  int x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  __builtin_assume(x >= 0 && x < kThreads);  // lane and warp cost an instruction each then
  return x;
}
SRN_DEVICE int cta_count() { return int(gridDim.x); }
SRN_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

SRN_DEVICE void sync_all() { __syncthreads(); }
SRN_DEVICE void sync_consumers() { asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory"); }
// A group of warps that share a row; groups count from 0.
SRN_DEVICE void sync_group(int group, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(group + 2), "r"(threads) : "memory");
}
SRN_DEVICE void sync_warp() { __syncwarp(); }
SRN_DEVICE int from_leader(int x) { return __shfl_sync(~0u, x, 0); }
template <class T>
SRN_DEVICE T warp_sum(T x) {
#pragma unroll
  for (int m = kWarp / 2; m > 0; m /= 2) x += __shfl_xor_sync(~0u, x, m);
  return x;
}

// The sums of N values over a warp, N = 1, 2 or 4: each lane gets the one of lane / (32 / N). Lanes
// that need not know a value any more take part in another's sum.
template <int N, class T>
SRN_DEVICE T warp_sums(T (&x)[N]) {
  static_assert(N == 1 || N == 2 || N == 4);
  const int lane = thread_index() % kWarp;
  if constexpr (N == 4) {
    const bool upper = lane & 16;
    T pair[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      pair[i] = (upper ? x[2 + i] : x[i]) + __shfl_xor_sync(~0u, upper ? x[i] : x[2 + i], 16);
    const bool odd = lane & 8;
    x[0] = (odd ? pair[1] : pair[0]) + __shfl_xor_sync(~0u, odd ? pair[0] : pair[1], 8);
  } else if constexpr (N == 2) {
    const bool upper = lane & 16;
    x[0] = (upper ? x[1] : x[0]) + __shfl_xor_sync(~0u, upper ? x[0] : x[1], 16);
  }
#pragma unroll
  for (int m = kWarp / N / 2; m > 0; m /= 2) x[0] += __shfl_xor_sync(~0u, x[0], m);
  return x[0];
}

// Counters in global memory.
SRN_DEVICE int add_relaxed(int32_t* p, int n) { return atomicAdd(p, n); }
SRN_DEVICE int add_release_acquire(int32_t* p, int n) {
  int before;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(p), "r"(n)
               : "memory");
  return before;
}
SRN_DEVICE int load_acquire(const int32_t* p) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}
SRN_DEVICE void pause() { __nanosleep(32); }

// What another CTA of this launch may have written: past L1.
template <class T>
SRN_DEVICE T load_shared_by_ctas(const T* p) {
  return __ldcg(p);
}

// mbarriers in shared memory.
struct Barrier {
  uint64_t state;
};

SRN_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

SRN_DEVICE void init(Barrier* b, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(count)
               : "memory");
}
// After init, before another thread or the copy engine uses the barriers.
SRN_DEVICE void publish_barriers() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
SRN_DEVICE void arrive(Barrier* b) {
  asm volatile("{ .reg .b64 t; mbarrier.arrive.shared::cta.b64 t, [%0]; }" ::"r"(shared_address(b))
               : "memory");
}
SRN_DEVICE bool passed(Barrier* b, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{ .reg .pred p;\n\t"
#if __CUDA_ARCH__ >= 900
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
#else
      "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
#endif
      "selp.u32 %0, 1, 0, p; }"
      : "=r"(done)
      : "r"(shared_address(b)), "r"(parity)
      : "memory");
  return done;
}
SRN_DEVICE void wait(Barrier* b, uint32_t parity) {
  while (!passed(b, parity)) {
  }
}

// Arrivals that complete a fetch: every lane of the producer, on sm_80 its copies apart.
#if __CUDA_ARCH__ >= 900
constexpr int kFetchArrivals = kWarp;
#else
constexpr int kFetchArrivals = 2 * kWarp;
#endif

SRN_DEVICE uint64_t l2_policy(bool keep) {
  uint64_t policy;
  if (keep)
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  else
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Starts copying whole 16-byte lines into a slot; called by all lanes of the producer.
SRN_DEVICE void fetch_lines(Barrier* full, char* to, const char* from, int bytes, int lane,
                            bool keep) {
  const uint64_t policy = l2_policy(keep);
#if __CUDA_ARCH__ >= 900
  // Ends of the slot's last use were written by ordinary stores.
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncwarp();
  if (lane == 0) {
    asm volatile(
        "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(full)),
        "r"(bytes)
        : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1], %2, [%3], %4;" ::"r"(shared_address(to)),
        "l"(from), "r"(bytes), "r"(shared_address(full)), "l"(policy)
        : "memory");
  }
#else
  for (int i = lane * 16; i < bytes; i += kWarp * 16)
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(
                     shared_address(to + i)),
                 "l"(from + i), "l"(policy)
                 : "memory");
#endif
}
// After all copies into a slot were started.
SRN_DEVICE void fetch_started(Barrier* full) {
#if __CUDA_ARCH__ < 900
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(full))
               : "memory");
#endif
  arrive(full);
}

// 16 bytes that another CTA may have written.
template <class P>
SRN_DEVICE P load_lines_shared_by_ctas(const void* p) {
  static_assert(sizeof(P) == 16);
  const uint4 raw = __ldcg(static_cast<const uint4*>(p));
  return *reinterpret_cast<const P*>(&raw);
}

// Stores that nobody reads soon.
SRN_DEVICE void store_last(float4* p, float4 x) { __stcs(p, x); }
SRN_DEVICE void store_last(uint2* p, uint2 x) { __stcs(p, x); }

SRN_DEVICE float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }

template <class E>
struct Convert;
template <>
struct Convert<float> {
  SRN_DEVICE static float load(float x) { return x; }
  SRN_DEVICE static float store(float x) { return x; }
};
template <>
struct Convert<double> {
  SRN_DEVICE static double load(double x) { return x; }
  SRN_DEVICE static double store(double x) { return x; }
};
using bfloat16 = __nv_bfloat16;
using float16 = __half;
template <>
struct Convert<bfloat16> {
  SRN_DEVICE static float load(bfloat16 x) { return __bfloat162float(x); }
  SRN_DEVICE static bfloat16 store(float x) { return __float2bfloat16_rn(x); }
};
template <>
struct Convert<float16> {
  SRN_DEVICE static float load(float16 x) { return __half2float(x); }
  SRN_DEVICE static float16 store(float x) { return __float2half_rn(x); }
};

}  // namespace srn::cuda
#endif
