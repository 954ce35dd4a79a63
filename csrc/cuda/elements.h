// Elements of a weight as numbers: loads and stores of one or four, in any of the stored types.
// A is what a layer computes in: float64 for float64 weights, else float32.
#pragma once

#include <type_traits>

#include "cta.h"

namespace srn::cuda {

template <class E, int N>
struct alignas(sizeof(E) * N) Pack {
  E x[N];
};

// N neighbouring elements; for N = 4 at a multiple of their size together.
template <class E, int N, class A>
SRN_DEVICE void load(const void* p, int64_t i, A (&to)[N]) {
  const auto pack = *reinterpret_cast<const Pack<E, N>*>(static_cast<const E*>(p) + i);
#pragma unroll
  for (int k = 0; k < N; ++k) to[k] = A(Convert<E>::load(pack.x[k]));
}

template <class E, int N, class A>
SRN_DEVICE void store(void* p, int64_t i, const A (&from)[N]) {
  Pack<E, N> pack;
#pragma unroll
  for (int k = 0; k < N; ++k) pack.x[k] = Convert<E>::store(from[k]);
  E* to = static_cast<E*>(p) + i;
  if constexpr (sizeof(pack) == 16 && sizeof(E) == 4) {
    store_last(reinterpret_cast<float4*>(to), *reinterpret_cast<const float4*>(&pack));
  } else if constexpr (sizeof(pack) == 8 && N == 4) {
    store_last(reinterpret_cast<uint2*>(to), *reinterpret_cast<const uint2*>(&pack));
  } else {
    *reinterpret_cast<Pack<E, N>*>(to) = pack;
  }
}

// The type is the same for a whole tile: the branches are uniform.
template <int N, class A>
SRN_DEVICE void load_any(const void* p, int type, int64_t i, A (&to)[N]) {
  if constexpr (sizeof(A) == 8) {
    if (type == kFloat64) return load<double>(p, i, to);
  }
  if (type == kFloat32)
    load<float>(p, i, to);
  else if (type == kBFloat16)
    load<bfloat16>(p, i, to);
  else
    load<float16>(p, i, to);
}

// E, or Any: whatever `type` says.
struct Any {};
template <class E, int N, class A>
SRN_DEVICE void load_as(const void* p, int type, int64_t i, A (&to)[N]) {
  if constexpr (std::is_same_v<E, Any>)
    load_any(p, type, i, to);
  else
    load<E>(p, i, to);
}

template <int N, class A>
SRN_DEVICE void store_any(void* p, int type, int64_t i, const A (&from)[N]) {
  if constexpr (sizeof(A) == 8) {
    if (type == kFloat64) return store<double>(p, i, from);
  }
  float narrow[N];
#pragma unroll
  for (int k = 0; k < N; ++k) narrow[k] = float(from[k]);
  if (type == kFloat32)
    store<float>(p, i, narrow);
  else if (type == kBFloat16)
    store<bfloat16>(p, i, narrow);
  else
    store<float16>(p, i, narrow);
}

// The element (row, column in memory order) of any layout.
SRN_DEVICE int64_t offset_of(const Record& r, int row, int column) {
  const int a = column / r.inner;
  return (int64_t(a) * r.rows + row) * r.inner + (column - a * r.inner);
}

// Columns in memory order -> in the matrix's own order.
SRN_DEVICE int matrix_column(const Common& c, const Record& r, int column) {
  return r.column_of < 0 ? column : c.columns[r.column_of + column];
}

// The unit u and v of the round.
template <class A>
SRN_DEVICE A* round_u(const Common& c, const Record& r) {
  return static_cast<A*>(c.round_state) + r.round;
}
template <class A>
SRN_DEVICE A* round_v(const Common& c, const Record& r) {
  return round_u<A>(c, r) + round_up(r.rows, kStatePad);
}

// Four (or one) of a vector that is listed by matrix column.
template <int N, class A>
SRN_DEVICE void load_v(const Common& c, const Record& r, const A* v, int column, A (&to)[N]) {
#pragma unroll
  for (int k = 0; k < N; ++k) to[k] = load_shared_by_ctas(v + matrix_column(c, r, column + k));
}

// How threads share a piece: `across` of them side by side over its columns (N each), `down` of
// these rows at a time.
struct Grid {
  int first;  // unit of this thread: N columns
  int step;
  int row;
  int rows;
  SRN_DEVICE Grid(int units) {
    const int tid = thread_index();
    if (units >= kConsumers) {
      first = tid;
      step = kConsumers;
      row = 0;
      rows = 1;
    } else {
      row = tid / units;
      rows = kConsumers / units;
      first = row < rows ? tid - row * units : units;  // the rest is idle
      step = units;
    }
  }
};

// Calls f(element in memory order, row, column in memory order) for a slab of any layout, along
// memory.
template <class F>
SRN_DEVICE void for_each_in_slab(const Record& r, int index, F&& f) {
  const int begin = index * r.slab_rows, n = slab_rows(r, index);
  const int span = n * r.inner;  // contiguous
  const int total = n * r.columns;
  for (int i = thread_index(); i < total; i += kConsumers) {
    const int a = i / span, p = i - a * span;
    const int row = p / r.inner, b = p - row * r.inner;
    f((int64_t(a) * r.rows + begin) * r.inner + p, begin + row, a * r.inner + b);
  }
}

}  // namespace srn::cuda
