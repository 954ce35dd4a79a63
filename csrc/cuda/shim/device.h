// device.h on a CPU, for tests: a CTA is an OS thread, its threads are fibers that take turns, so
// that tickets, counters and waits between CTAs are really concurrent. Copies into shared memory
// happen when somebody has waited for them, and poison it until then. A barrier that not all
// threads reach, or reach at different places, is an error, and so is a wait without end.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../plan.h"

#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define SRN_DEVICE inline

struct float4 {
  float x, y, z, w;
};
struct uint2 {
  uint32_t x, y;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }

namespace srn::cuda {

// fibers.cpp
int thread_index();
int cta_count();
char* shared_memory();
void sync_at(const char* file, int line, int threads);  // the first `threads` of the CTA
void sync_group_at(int group, int threads, const char* file, int line);
void sync_warp();
int from_leader(int x);
double warp_sum_doubles(double x);
float warp_sum_floats(float x);
void pause();  // within a wait
void defer_copy(void* barrier, char* to, const char* from, int bytes);
[[noreturn]] void fail(const char* what);

#define sync_all() sync_at(__FILE__, __LINE__, kThreads)
#define sync_consumers() sync_at(__FILE__, __LINE__, kConsumers)
#define sync_group(group, threads) sync_group_at(group, threads, __FILE__, __LINE__)
inline double warp_sum(double x) { return warp_sum_doubles(x); }
inline float warp_sum(float x) { return warp_sum_floats(x); }

template <int N, class T>
T warp_sums(T (&x)[N]) {
  T sums[N];
  for (int i = 0; i < N; ++i) sums[i] = warp_sum(x[i]);
  return sums[thread_index() % kWarp / (kWarp / N)];
}

inline int add_relaxed(int32_t* p, int n) { return __atomic_fetch_add(p, n, __ATOMIC_RELAXED); }
inline int add_release_acquire(int32_t* p, int n) {
  return __atomic_fetch_add(p, n, __ATOMIC_ACQ_REL);
}
inline int load_acquire(const int32_t* p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }

template <class T>
T load_shared_by_ctas(const T* p) {
  return *p;
}

template <class P>
P load_lines_shared_by_ctas(const void* p) {
  if (uintptr_t(p) % 16) fail("an unaligned load");
  return *static_cast<const P*>(p);
}

struct Barrier {
  int16_t count;
  int16_t pending;
  uint32_t phase;
};
static_assert(sizeof(Barrier) == 8);
void init(Barrier* b, int count);
inline void publish_barriers() {}
void arrive(Barrier* b);
bool passed(Barrier* b, uint32_t parity);  // runs the copies that it waited for
inline void wait(Barrier* b, uint32_t parity) {
  while (!passed(b, parity)) {
  }
}

constexpr int kFetchArrivals = kWarp;
inline void fetch_lines(Barrier* full, char* to, const char* from, int bytes, int lane, bool) {
  if ((uintptr_t(to) | uintptr_t(from) | uintptr_t(bytes)) % 16) fail("an unaligned copy");
  if (lane == 0) defer_copy(full, to, from, bytes);
}
inline void fetch_started(Barrier* full) { arrive(full); }

template <class V>
void store_last(V* p, V x) {
  if (uintptr_t(p) % sizeof(V)) fail("an unaligned store");
  *p = x;
}

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

inline float float_of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

template <class E>
struct Convert;
template <>
struct Convert<float> {
  static float load(float x) { return x; }
  static float store(float x) { return x; }
};
template <>
struct Convert<double> {
  static double load(double x) { return x; }
  static double store(double x) { return x; }
};
template <>
struct Convert<bfloat16> {
  static float load(bfloat16 x) { return float_of_bits(uint32_t(x.bits) << 16); }
  static bfloat16 store(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return {0x7fff};
    return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
  }
};
template <>
struct Convert<float16> {
  static float load(float16 x) {
    const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
    const float sign = x.bits & 0x8000 ? -1.0f : 1.0f;
    if (exponent == 31) return fraction ? NAN : sign * INFINITY;
    return exponent ? sign * std::ldexp(1.0f + fraction / 1024.0f, exponent - 15)
                    : sign * std::ldexp(float(fraction), -24);
  }
  static float16 store(float x) {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    const float size = std::fabs(x);
    if (x != x) return {0x7fff};
    if (size >= 65520.0f) return {uint16_t(sign | 0x7c00)};
    if (size < 0x1p-14f) return {uint16_t(sign | uint16_t(std::nearbyint(size * 0x1p24f)))};
    const int exponent = std::ilogb(size);
    const auto fraction = uint32_t(std::nearbyint(std::ldexp(size, 10 - exponent)));
    return {uint16_t(sign | (uint32_t(exponent + 14) << 10) + fraction)};
  }
};

}  // namespace srn::cuda
