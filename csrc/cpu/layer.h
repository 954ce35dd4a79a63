// What the CPU drivers know of one layer, and the parts that forward and backward share.
// Torch-free.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "../scalars.h"
#include "kernels.h"
#include "layout.h"
#include "schedule.h"

namespace srn {

// Forward: out = factor W_hat. All pointers belong to the caller; `out` may be `weight`
// (projection).
struct NormalizeLayer {
  Layout layout;
  DType weight_type, out_type;
  const void* weight;
  void* out;
  void* u;  // state: float64 for float64 weights, else float32; written when iterations > 0
  void* v;
  void* round_u;  // the unit u, v of this round, which backward needs
  void* round_v;
  LayerStats* stats;
  double target_rank;
  double eps;
  int iterations;  // 0: evaluation; -1: repeat the round whose u, v and statistics are given
  Scaling scaling;
};

// Backward: grad_weight = dL/dW from grad = dL/d(factor W_hat).
struct BackwardLayer {
  Layout layout;
  DType grad_type, weight_type;
  const void* grad;
  const void* weight;
  void* grad_weight;
  const void* round_u;
  const void* round_v;
  const LayerStats* stats;
  double grad_gain;  // dL/dgain, for the caller
};

void normalize(std::vector<NormalizeLayer>& layers, int64_t threads, const ParallelFor& parallel);
void normalize_backward(std::vector<BackwardLayer>& layers, int64_t threads,
                        const ParallelFor& parallel);

// Slabs follow from the shape alone, so that results do not depend on the number of threads.
struct Slabs {
  int64_t rows_each;
  int64_t count;
};

constexpr int64_t kSlabBytes = 256 << 10;
constexpr int64_t kMaxSlabs = 96;
constexpr int64_t kStreamBytes = 8 << 20;   // outputs of a call beyond this leave the cache anyway
constexpr int64_t kWholeBytes = 192 << 10;  // a layer up to here is one tile of one thread

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

inline Slabs make_slabs(int64_t rows, int64_t columns, int64_t element_bytes) {
  const int64_t row_bytes = std::max<int64_t>(1, columns * element_bytes);
  int64_t each = std::max<int64_t>(32, kSlabBytes / row_bytes);
  each = std::max(each, (rows + kMaxSlabs - 1) / kMaxSlabs);
  each = round_up(each, kRowBlock);
  return {each, std::max<int64_t>(1, (rows + each - 1) / each)};
}

inline const Kernels<float>& kernels_for(const KernelTables& t, float) { return t.f32; }
inline const Kernels<double>& kernels_for(const KernelTables& t, double) { return t.f64; }

inline const char* at(const void* base, int64_t index, DType type) {
  return static_cast<const char*>(base) + index * element_size(type);
}
inline char* at(void* base, int64_t index, DType type) {
  return static_cast<char*>(base) + index * element_size(type);
}

// `right` of the flat kernels: one outer slice's part of v and its wrap-around.
template <class A>
void wrap_slice(const A* v, int64_t period, std::vector<A>* right) {
  right->resize(period + kMaxLanes);
  for (int64_t i = 0; i < period + kMaxLanes; ++i) (*right)[i] = v[i % period];
}

// `left` of the flat kernels: u_r for each of the slice's rows * inner elements.
template <class A>
void spread_rows(const A* u, int64_t rows, int64_t inner, std::vector<A>* left) {
  left->resize(rows * inner);
  for (int64_t r = 0; r < rows; ++r) std::fill_n(left->begin() + r * inner, inner, u[r]);
}

// The tiles of an elementwise pass: row ranges (outer == 1) or ranges of outer slices.
struct Range {
  int64_t begin, end;
};
inline int64_t elementwise_tiles(const Layout& l, const Slabs& slabs) {
  return l.outer == 1 ? slabs.count : std::min(l.outer, slabs.count);
}
inline Range elementwise_range(const Layout& l, const Slabs& slabs, int64_t index) {
  if (l.outer == 1)
    return {index * slabs.rows_each, std::min(l.rows, (index + 1) * slabs.rows_each)};
  const int64_t tiles = elementwise_tiles(l, slabs);
  return {l.outer * index / tiles, l.outer * (index + 1) / tiles};
}

// Scratch kept between calls: fresh pages would cost more than the arithmetic.
class Workspace {
 public:
  Workspace();
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  void* take(int64_t bytes);  // 64-byte aligned; valid until this object goes
  template <class A>
  A* take_array(int64_t n) {
    return static_cast<A*>(take(n * int64_t(sizeof(A))));
  }
  void reserve(int64_t bytes);  // before the first take

 private:
  std::vector<char> storage_;
  int64_t used_ = 0;
};

}  // namespace srn
