// A dense weight of any memory order as (outer, rows, inner): element (a, r, b) lies at
// (a * rows + r) * inner + b, row r is the matrix row, and column (a, b) is the matrix column
// column_of[a * inner + b] (empty: a * inner + b itself). Torch-free.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace srn {

struct Layout {
  int64_t outer = 1;
  int64_t rows = 1;
  int64_t inner = 1;
  std::vector<int32_t> column_of;
  int64_t columns() const { return outer * inner; }
};

// False when the strides do not describe a dense, non-overlapping tensor.
inline bool make_layout(const int64_t* sizes, const int64_t* strides, int ndim, int dim,
                        Layout* layout) {
  *layout = Layout{};
  int64_t size = 1;
  bool ordered = dim == 0;
  for (int d = ndim - 1; ordered && d >= 0; --d) {
    ordered = sizes[d] == 1 || strides[d] == size;
    size *= sizes[d];
  }
  if (ordered && size > 0) {  // the usual case, without the memory below
    layout->rows = sizes[0];
    layout->inner = size / sizes[0];
    return true;
  }
  std::vector<int> order;
  for (int d = 0; d < ndim; ++d)
    if (sizes[d] != 1) order.push_back(d);
  std::stable_sort(order.begin(), order.end(),
                   [&](int x, int y) { return strides[x] > strides[y]; });
  int64_t expected = 1;
  for (auto it = order.rbegin(); it != order.rend(); ++it) {
    if (strides[*it] != expected) return false;
    expected *= sizes[*it];
  }
  layout->rows = sizes[dim];
  bool after = false;
  std::vector<int> memory;  // column dimensions in memory order, outermost first
  for (int d : order) {
    if (d == dim) {
      after = true;
      continue;
    }
    (after ? layout->inner : layout->outer) *= sizes[d];
    memory.push_back(d);
  }
  if (sizes[dim] == 1) std::swap(layout->outer, layout->inner);  // a single row is contiguous
  if (std::is_sorted(memory.begin(), memory.end())) return true;

  // The matrix numbers its columns by the dimensions in their own order, C-style.
  std::vector<int64_t> column_stride(ndim, 0);
  int64_t step = 1;
  for (int d = ndim - 1; d >= 0; --d)
    if (d != dim) {
      column_stride[d] = step;
      step *= sizes[d];
    }
  layout->column_of.assign(1, 0);
  for (int d : memory) {
    std::vector<int32_t> next;
    next.reserve(layout->column_of.size() * sizes[d]);
    for (int32_t base : layout->column_of)
      for (int64_t i = 0; i < sizes[d]; ++i) next.push_back(int32_t(base + i * column_stride[d]));
    layout->column_of.swap(next);
  }
  return true;
}

// v, whose elements the matrix numbers in its own way, in the order of the columns in memory.
template <class A>
void to_memory_order(const Layout& l, const A* v, A* out) {
  if (l.column_of.empty()) {
    std::copy_n(v, l.columns(), out);
    return;
  }
  for (int64_t j = 0; j < l.columns(); ++j) out[j] = v[l.column_of[j]];
}

// And back.
template <class A>
void to_matrix_order(const Layout& l, const A* v, A* out) {
  if (l.column_of.empty()) {
    std::copy_n(v, l.columns(), out);
    return;
  }
  for (int64_t j = 0; j < l.columns(); ++j) out[l.column_of[j]] = v[j];
}

}  // namespace srn
