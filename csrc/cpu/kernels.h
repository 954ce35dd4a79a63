// The inner loops of the CPU backend as a table of functions, one table per instruction set.
// Torch-free.
//
// A is the accumulation type: float for float32, bfloat16 and float16 weights, double for float64.
// "rows" functions see matrix rows that are contiguous in memory, one after the other. "flat"
// functions see one outer slice of a layout (outer, rows, inner) with outer > 1: its rows * inner
// elements are contiguous, `left` holds u_r for every element and `right` repeats the slice's part
// of v with `period` elements, followed by one vector's worth of wrap-around. `stream` writes past
// the cache.
#pragma once

#include <cstdint>
#include <string>

namespace srn {

enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };
constexpr int kDTypes = 4;
inline int64_t element_size(DType t) { return t == kFloat64 ? 8 : t == kFloat32 ? 4 : 2; }

struct bf16 {
  uint16_t x;
};
struct half {
  uint16_t x;
};

constexpr int kRowBlock = 8;   // rows taken together: v is loaded once, t updated once
constexpr int kMaxLanes = 16;  // wrap-around that `right` needs beyond its period

struct InnerProducts {
  double g_w;  // <G, W>
  double g_e;  // <G, u v^T>
};

template <class A>
struct Kernels {
  // Equation s = W v for `rows` <= kRowBlock rows, `pitch` elements apart; returns the sum of
  // squares.
  using Dot = double (*)(const void* w, int64_t pitch, int rows, int64_t columns, const A* v, A* s);
  // t += W^T s over the same rows; fetches as many rows from `next` for the coming dot.
  using Accumulate = void (*)(const void* w, int64_t pitch, int rows, int64_t columns, const A* s,
                              A* t, const void* next);
  // out = a w + b u_r v for rows of n
  using ScaleRows = void (*)(const void* w, void* out, int64_t rows, int64_t n, A a, A b,
                             const A* u, const A* v, bool stream);
  using ScaleFlat = void (*)(const void* w, void* out, int64_t n, A a, A b, const A* left,
                             const A* right, int64_t period);
  using InnerRows = InnerProducts (*)(const void* g, const void* w, int64_t rows, int64_t n,
                                      const A* u, const A* v);
  using InnerFlat = InnerProducts (*)(const void* g, const void* w, int64_t n, const A* left,
                                      const A* right, int64_t period);
  // out = scale (g + weight w) + outer u_r v for rows of n
  using CombineRows = void (*)(const void* g, const void* w, void* out, int64_t rows, int64_t n,
                               A scale, A weight, A outer, const A* u, const A* v, bool stream);
  using CombineFlat = void (*)(const void* g, const void* w, void* out, int64_t n, A scale,
                               A weight, A outer, const A* left, const A* right, int64_t period);
  // total[j] = sum over slabs, in order, of factors[slab] * partials[slab * columns + j]; returns
  // the sum of its squares
  using Reduce = double (*)(const A* partials, const double* factors, int64_t slabs,
                            int64_t columns, double* total);
  // In double: the sum of squares, the inner product, out = x / divisor.
  using SquareSum = double (*)(const A* x, int64_t n);
  using Inner = double (*)(const A* x, const A* y, int64_t n);
  using Divide = void (*)(const A* x, double divisor, int64_t n, A* out);
  using DivideWide = void (*)(const double* x, double divisor, int64_t n, A* out);

  Dot dot[kDTypes];
  Accumulate accumulate[kDTypes];
  ScaleRows scale_rows[kDTypes][kDTypes];  // [weight][output]
  ScaleFlat scale_flat[kDTypes][kDTypes];
  InnerRows inner_rows[kDTypes][kDTypes];  // [gradient][weight]
  InnerFlat inner_flat[kDTypes][kDTypes];
  CombineRows combine_rows[kDTypes][kDTypes];  // [gradient][weight]; the result: the weight's type
  CombineFlat combine_flat[kDTypes][kDTypes];
  Reduce reduce;
  SquareSum square_sum;
  Inner inner;
  Divide divide;
  DivideWide divide_wide;
};

struct KernelTables {
  const char* isa;
  void (*fence)();  // after streamed stores, before anybody may read them
  Kernels<float> f32;
  Kernels<double> f64;
};

// The table in use: the best that this processor can run, unless select_kernels chose another.
const KernelTables& kernels();

// "auto", "avx512", "avx2" or "baseline"; false if this processor cannot run it. For tests.
bool select_kernels(const std::string& isa);

}  // namespace srn
