// Checks of the tensors that a call hands to a backend, for the bindings of all of them. Errors
// name the list; srn_kernels/core/ops.py says what each list means.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <vector>

#include "scalars.h"

namespace srn {

using Tensors = std::vector<at::Tensor>;
using Ints = std::vector<int64_t>;
using Doubles = std::vector<double>;
using Bools = std::vector<bool>;

// The dtypes of weights, W_hat and gradients, by the constants of one backend.
template <class Type, Type float32, Type bfloat16, Type float16, Type float64>
Type type_of(const at::Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return float32;
    case at::kBFloat16:
      return bfloat16;
    case at::kHalf:
      return float16;
    case at::kDouble:
      return float64;
    default:
      TORCH_CHECK_TYPE(false, "srn_kernels: ", name, " has the unsupported dtype ",
                       t.scalar_type());
  }
}

// The dtype of u, v and the round's state.
inline at::ScalarType state_type(const at::Tensor& weight) {
  return weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline char* data(const at::Tensor& t) { return static_cast<char*>(t.data_ptr()); }

// The backend's own question: is a tensor where its kernels can read it?
template <class Place>
struct Checks {
  Place place;  // (tensor, name of the list); raises

  void vector(const at::Tensor& t, const char* name, int64_t size, at::ScalarType type) const {
    place(t, name);
    TORCH_CHECK_VALUE(
        t.dim() == 1 && t.numel() == size && t.is_contiguous() && t.scalar_type() == type,
        "srn_kernels: ", name, " must be a contiguous ", type, " tensor of size ", size);
  }

  void same_memory(const at::Tensor& t, const at::Tensor& weight, const char* name) const {
    place(t, name);
    TORCH_CHECK_VALUE(t.sizes() == weight.sizes() && t.strides() == weight.strides(),
                      "srn_kernels: ", name, " must have the sizes and strides of its weight");
  }

  void round(const at::Tensor& round_state, const at::Tensor& stats, at::ScalarType type) const {
    place(round_state, "round_state");
    place(stats, "stats");
    TORCH_CHECK_VALUE(round_state.is_contiguous() && round_state.scalar_type() == type,
                      "srn_kernels: round_state must be contiguous and ", type);
    TORCH_CHECK_VALUE(stats.is_contiguous() && stats.dim() == 2 &&
                          stats.scalar_type() == at::kDouble && stats.size(1) == kStatsColumns,
                      "srn_kernels: stats must be a float64 tensor of (layers, ", kStatsColumns,
                      ")");
  }

  // A weight, before anything of it is read: its output dimension is one of its own.
  void weight(const at::Tensor& w, int64_t dim) const {
    place(w, "a weight");
    TORCH_CHECK_VALUE(dim >= 0 && dim < w.dim(), "srn_kernels: dim ", dim, " of a ", w.dim(),
                      "-dimensional weight");
  }

  void out(const at::Tensor& out, const at::Tensor& weight) const {
    same_memory(out, weight, "out");
    TORCH_CHECK_TYPE(out.scalar_type() != at::kDouble || weight.scalar_type() == at::kDouble,
                     "srn_kernels: float64 output needs a float64 weight");
  }

  void gradients(const at::Tensor& grad, const at::Tensor& grad_weight,
                 const at::Tensor& weight) const {
    same_memory(grad, weight, "grad");
    same_memory(grad_weight, weight, "grad_weight");
    TORCH_CHECK_TYPE(grad_weight.scalar_type() == weight.scalar_type(),
                     "srn_kernels: grad_weight must have its weight's dtype");
    TORCH_CHECK_TYPE(grad.scalar_type() != at::kDouble || weight.scalar_type() == at::kDouble,
                     "srn_kernels: a float64 gradient needs a float64 weight");
  }
};

template <class Place>
Checks(Place) -> Checks<Place>;

// Where a layer of (rows, columns) keeps its u and v in the round's state, and its row of stats.
inline void check_places(const at::Tensor& round_state, int64_t offset, int64_t rows,
                         int64_t columns, const at::Tensor& stats, int64_t row) {
  TORCH_CHECK_VALUE(offset >= 0 && offset + padded(rows) + columns <= round_state.numel(),
                    "srn_kernels: round_state is too small");
  TORCH_CHECK_VALUE(row >= 0 && row < stats.size(0), "srn_kernels: row ", row, " of ",
                    stats.size(0), " layers");
}

// All lists of a call have one entry a layer.
template <class... Lists>
void check_lengths(const char* op, size_t n, const Lists&... lists) {
  TORCH_CHECK_VALUE(((lists.size() == n) && ...), "srn_kernels: ", op,
                    " got lists of different lengths");
}

// Those of gains and soft bounds may be empty too, where no layer has any.
template <class... Lists>
void check_optional(const char* op, size_t n, const Lists&... lists) {
  TORCH_CHECK_VALUE(((lists.empty() || lists.size() == n) && ...), "srn_kernels: ", op,
                    " got lists of different lengths");
}

// A layer's soft bound; its gain is a tensor.
inline Scaling bound_of(const Doubles& sigma_max, const Bools& through, size_t i) {
  Scaling scaling;
  if (!sigma_max.empty()) scaling.sigma_max = sigma_max[i];
  if (!through.empty()) scaling.through = through[i];
  return scaling;
}

// The gain of a layer, or where its gradient goes; nullptr: there is none.
template <class Place>
const at::Tensor* gain_of(const Checks<Place>& checks, const Tensors& gains, const Ints& gained,
                          size_t i) {
  if (gained.empty() || gained[i] < 0) return nullptr;
  TORCH_CHECK_VALUE(size_t(gained[i]) < gains.size(), "srn_kernels: gain ", gained[i], " of ",
                    gains.size());
  const at::Tensor& gain = gains[size_t(gained[i])];
  checks.place(gain, "a gain");
  TORCH_CHECK_TYPE(at::isFloatingType(gain.scalar_type()),
                   "srn_kernels: a gain has the unsupported dtype ", gain.scalar_type());
  TORCH_CHECK_VALUE(gain.numel() == 1, "srn_kernels: a gain must have one element");
  return &gain;
}

}  // namespace srn
