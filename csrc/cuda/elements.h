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
  if constexpr (std::is_same_v<E, bfloat16> && N == 4 && sizeof(A) == 4) {
    // By hand: an instruction an element.
    const auto raw = *reinterpret_cast<const uint2*>(static_cast<const E*>(p) + i);
    to[0] = float_of_bits(raw.x << 16);
    to[1] = float_of_bits(raw.x & 0xffff0000);
    to[2] = float_of_bits(raw.y << 16);
    to[3] = float_of_bits(raw.y & 0xffff0000);
    return;
  }
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

// A type that is compiled in, or Any: whatever `type` says.
struct Any {};
template <class E, int N, class A>
SRN_DEVICE void load_as(const void* p, int type, int64_t i, A (&to)[N]) {
  if constexpr (std::is_same_v<E, Any>)
    load_any(p, type, i, to);
  else
    load<E>(p, i, to);
}
template <class E, int N, class A>
SRN_DEVICE void store_as(void* p, int type, int64_t i, const A (&from)[N]) {
  if constexpr (std::is_same_v<E, Any>)
    store_any(p, type, i, from);
  else
    store<E>(p, i, from);
}
template <class E>
SRN_DEVICE int bytes_of(int type) {
  if constexpr (std::is_same_v<E, Any>)
    return int(element_bytes(type));
  else
    return int(sizeof(E));
}

template <class E>
struct As {
  using Type = E;
};
template <int N>
struct Count {
  static constexpr int kValue = N;
};

// f(As<E>()) for a type of the elements that A computes with.
template <class A, class F>
SRN_DEVICE void with_type(int type, F&& f) {
  if constexpr (sizeof(A) == 8) {
    f(As<double>());
  } else {
    if (type == kFloat32) return f(As<float>());
    if (type == kBFloat16) return f(As<bfloat16>());
    f(As<float16>());
  }
}
// f(As<E>(), As<O>()) for two types. The planner leaves other pairs to the paths of Any.
template <class A, class F>
SRN_DEVICE void with_types(int type, int other, F&& f) {
  if constexpr (sizeof(A) == 8) {
    f(As<double>(), As<double>());
  } else if (type == kFloat32) {
    with_type<A>(other, [&](auto o) { f(As<float>(), o); });
  } else if (type == kBFloat16) {
    f(As<bfloat16>(), As<bfloat16>());
  } else {
    f(As<float16>(), As<float16>());
  }
}
// f(Count<N>()) for the count among `Counts` that a record names.
template <int... Counts, class F>
SRN_DEVICE void with_count(int count, F&& f) {
  ((count == Counts && (f(Count<Counts>()), true)) || ...);
}

// Of a panel: a row, or a part of it.
template <class E, class F>
SRN_DEVICE void with_panel_count(int vectors, F&& f) {
  if (vectors == 1) return f(Count<1>());
  if constexpr (!std::is_same_v<E, Any>) {
    if (vectors == 2) return f(Count<2>());
  }
  f(Count<kPartVectors>());
}
// How slabs are read by panels: types of the weight and of the other tensor, elements of a unit,
// and units of a thread.
template <class E, class O, int kUnit, int kUnits>
struct Panel {
  using Weight = E;
  using Other = O;
  static constexpr int kWidth = kUnit, kVectors = kUnits;
};
// f(Panel<...>()) as a record says; false where nothing is staged.
template <class A, class F>
SRN_DEVICE bool with_panel(const Record& r, F&& f) {
  if (r.path == kScalars) {
    with_panel_count<Any>(r.vectors, [&](auto n) { f(Panel<Any, Any, 1, n.kValue>()); });
  } else if (r.path == kVectors) {
    with_types<A>(r.type, r.other_type, [&](auto type, auto other) {
      with_panel_count<void>(r.vectors, [&](auto n) {
        f(Panel<typename decltype(type)::Type, typename decltype(other)::Type, kVectorWidth<A>,
                n.kValue>());
      });
    });
  }
  return r.path != kDirect;
}
// Rows of a thread that are in flight: with a type of Any the code is large as it is.
template <class E>
constexpr int kRowsInFlight = std::is_same_v<E, Any> ? 1 : 2;

// Which columns of a row are a thread's: kVectors units of kWidth neighbours, `across` units apart,
// the same of each row. Groups of warps take rows in turn. All but the last unit exist for every
// thread of a group; a thread whose last one lies beyond the row reads another of its own instead,
// so that loads stand behind no branch.
template <int kWidth, int kVectors>
struct Own {
  int across, groups, group;
  int mine;   // the thread's first unit
  bool last;  // whether its last unit exists

  SRN_DEVICE Own(const Record& r, int units) {
    const int tid = thread_index();
    across = r.group_warps * kWarp;
    groups = kWarps / r.group_warps;
    group = tid / across;
    mine = tid - group * across;
    last = group < groups && mine + (kVectors - 1) * across < units;
  }
  SRN_DEVICE bool active() const { return group < groups; }
  // Of a thread that is active.
  SRN_DEVICE bool has(int i) const { return i < kVectors - 1 || last; }
  // The i-th unit; one that exists.
  SRN_DEVICE int unit(int i) const {
    return i < kVectors - 1 || last ? mine + i * across : kVectors > 1 ? mine : 0;
  }
  // And where it lies in the part of a row that it belongs to, in units.
  SRN_DEVICE int in_part(int i) const {
    const int k = i % kPartVectors;
    return i < kVectors - 1 || last ? mine + k * across : k > 0 ? mine : 0;
  }
  SRN_DEVICE void sync(int warps) const {
    if (warps == 1)
      sync_warp();
    else if (active())
      sync_group(group, across);
  }
};

// A thread's part of a vector that is listed by matrix column, zeros where the row has ended.
template <int kWidth, int kVectors, class A>
SRN_DEVICE void load_own(const Own<kWidth, kVectors>& own, const A* source, const int32_t* table,
                         A (&to)[kVectors][kWidth]) {
  const bool lines = kWidth * sizeof(A) == 16 && !table && uintptr_t(source) % 16 == 0;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int at = own.unit(i) * kWidth;
    if constexpr (kWidth * sizeof(A) == 16) {
      if (lines) {
        const auto pack = load_lines_shared_by_ctas<Pack<A, kWidth>>(source + at);
#pragma unroll
        for (int k = 0; k < kWidth; ++k) to[i][k] = own.active() && own.has(i) ? pack.x[k] : A(0);
        continue;
      }
    }
#pragma unroll
    for (int k = 0; k < kWidth; ++k)
      to[i][k] = own.active() && own.has(i)
                     ? load_shared_by_ctas(source + (table ? table[at + k] : at + k))
                     : A(0);
  }
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

SRN_DEVICE const int32_t* column_table(const Common& c, const Record& r) {
  return r.column_of < 0 ? nullptr : c.columns + r.column_of;
}

// The unit u and v of the round.
template <class A>
SRN_DEVICE A* round_u(const Common& c, const Record& r) {
  return static_cast<A*>(c.round_state) + r.round;
}
template <class A>
SRN_DEVICE A* round_v(const Common& c, const Record& r) {
  return round_u<A>(c, r) + padded(r.rows);
}

// The same of the round's v, from a column on.
template <int kWidth, int kVectors, class A>
SRN_DEVICE void load_own_of_round(const Common& c, const Record& r,
                                  const Own<kWidth, kVectors>& own, int column,
                                  A (&to)[kVectors][kWidth]) {
  const int32_t* table = column_table(c, r);
  load_own(own, round_v<A>(c, r) + (table ? 0 : column), table ? table + column : nullptr, to);
}

// Calls f(element in memory order, row, column in memory order) for a slab of any layout, along
// memory.
template <class F>
SRN_DEVICE void for_each_in_slab(const Record& r, int index, F&& f) {
  const int begin = index * r.slab_rows, n = slab_rows(r, index);
  const int span = n * r.inner;  // contiguous
  const int64_t total = int64_t(n) * r.columns;
  for (int64_t i = thread_index(); i < total; i += kConsumers) {
    const int a = int(i / span), p = int(i - int64_t(a) * span);
    const int row = p / r.inner, b = p - row * r.inner;
    f((int64_t(a) * r.rows + begin) * r.inner + p, begin + row, a * r.inner + b);
  }
}

// u of a slab's rows times a factor, into shared memory.
template <class A>
SRN_DEVICE void stage_u(const Common& c, const Record& r, int index, A factor, A* to) {
  const A* u = round_u<A>(c, r) + index * r.slab_rows;
  const int n = slab_rows(r, index);
  sync_consumers();  // whoever read what was there
  for (int i = thread_index(); i < n; i += kConsumers) to[i] = factor * load_shared_by_ctas(u + i);
  sync_consumers();
}

}  // namespace srn::cuda
