// Checks, conversion of tensors to plain pointers, and the Python module of the CPU backend. The
// ops themselves are registered in srn_kernels/ops.py, whose schemas say what each list means.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/extension.h>

#include <string>
#include <vector>

#include "cpu/layer.h"
#include "cpu/recycler.h"

namespace {

using Tensors = std::vector<at::Tensor>;
using Ints = std::vector<int64_t>;
using Doubles = std::vector<double>;

srn::DType dtype_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return srn::kFloat32;
    case at::kBFloat16:
      return srn::kBFloat16;
    case at::kHalf:
      return srn::kFloat16;
    case at::kDouble:
      return srn::kFloat64;
    default:
      TORCH_CHECK_TYPE(false, "srn_kernels: unsupported dtype ", t.scalar_type());
  }
}

srn::Layout layout_of(const at::Tensor& t, int64_t dim) {
  srn::Layout layout;
  TORCH_CHECK_VALUE(t.is_cpu(), "srn_kernels: the cpu backend got a tensor on ", t.device());
  TORCH_CHECK_VALUE(dim >= 0 && dim < t.dim(), "srn_kernels: dim ", dim, " of a ", t.dim(),
                    "-dimensional weight");
  TORCH_CHECK_VALUE(
      srn::make_layout(t.sizes().data(), t.strides().data(), int(t.dim()), int(dim), &layout),
      "srn_kernels: a weight's memory is not dense");
  return layout;
}

void check_vector(const at::Tensor& t, const char* name, int64_t size, at::ScalarType type) {
  TORCH_CHECK_VALUE(t.is_cpu() && t.dim() == 1 && t.numel() == size && t.is_contiguous() &&
                        t.scalar_type() == type,
                    "srn_kernels: ", name, " must be a contiguous ", type, " CPU tensor of size ",
                    size);
}

void check_same_memory(const at::Tensor& t, const at::Tensor& weight, const char* name) {
  TORCH_CHECK_VALUE(t.is_cpu() && t.sizes() == weight.sizes() && t.strides() == weight.strides(),
                    "srn_kernels: ", name, " must have the sizes and strides of its weight");
}

at::ScalarType state_type(const at::Tensor& weight) {
  return weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// The number of elements that a vector takes in the round's state; ops.py has the same rule.
int64_t padded(int64_t n) { return srn::round_up(n, 16); }

void parallel(int64_t workers, const std::function<void(int64_t)>& body) {
  at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

char* data(const at::Tensor& t) { return static_cast<char*>(t.data_ptr()); }

struct State {
  char* u;
  char* v;
};

State state_at(const at::Tensor& round_state, int64_t offset, const srn::Layout& l,
               at::ScalarType type) {
  TORCH_CHECK_VALUE(round_state.is_cpu() && round_state.is_contiguous() &&
                        round_state.scalar_type() == type && offset >= 0 &&
                        offset + padded(l.rows) + l.columns() <= round_state.numel(),
                    "srn_kernels: round_state is too small or of the wrong type");
  const int64_t size = round_state.element_size();
  return {data(round_state) + offset * size, data(round_state) + (offset + padded(l.rows)) * size};
}

srn::LayerStats* stats_at(const at::Tensor& stats, int64_t row) {
  TORCH_CHECK_VALUE(stats.is_cpu() && stats.is_contiguous() && stats.dim() == 2 &&
                        stats.scalar_type() == at::kDouble && stats.size(1) == srn::kStatsColumns &&
                        row >= 0 && row < stats.size(0),
                    "srn_kernels: stats must be a float64 tensor of (layers, 8)");
  return reinterpret_cast<srn::LayerStats*>(stats.data_ptr<double>()) + row;
}

void normalize(const Tensors& weights, const Tensors& us, const Tensors& vs, const Tensors& outs,
               const at::Tensor& round_state, const at::Tensor& stats, const Ints& offsets,
               const Doubles& target_ranks, const Ints& iterations, const Ints& dims,
               const Doubles& eps) {
  const size_t n = weights.size();
  TORCH_CHECK_VALUE(us.size() == n && vs.size() == n && outs.size() == n && offsets.size() == n &&
                        target_ranks.size() == n && iterations.size() == n && dims.size() == n &&
                        eps.size() == n,
                    "srn_kernels: normalize got lists of different lengths");
  std::vector<srn::NormalizeLayer> layers(n);
  for (size_t i = 0; i < n; ++i) {
    const at::Tensor& w = weights[i];
    srn::NormalizeLayer& l = layers[i];
    l.layout = layout_of(w, dims[i]);
    check_vector(us[i], "u", l.layout.rows, state_type(w));
    check_vector(vs[i], "v", l.layout.columns(), state_type(w));
    check_same_memory(outs[i], w, "out");
    l.weight_type = dtype_of(w);
    l.out_type = dtype_of(outs[i]);
    TORCH_CHECK_TYPE(l.out_type != srn::kFloat64 || l.weight_type == srn::kFloat64,
                     "srn_kernels: float64 output needs a float64 weight");
    const State s = state_at(round_state, offsets[i], l.layout, state_type(w));
    l.weight = data(w);
    l.out = data(outs[i]);
    l.u = data(us[i]);
    l.v = data(vs[i]);
    l.round_u = s.u;
    l.round_v = s.v;
    l.stats = stats_at(stats, int64_t(i));
    l.target_rank = target_ranks[i];
    l.eps = eps[i];
    l.iterations = int(iterations[i]);
  }
  srn::normalize(layers, at::get_num_threads(), parallel);
}

void normalize_backward(const Tensors& grads, const Tensors& weights, const at::Tensor& round_state,
                        const at::Tensor& stats, const Tensors& grad_weights, const Ints& rows,
                        const Ints& offsets, const Ints& dims) {
  const size_t n = weights.size();
  TORCH_CHECK_VALUE(grads.size() == n && grad_weights.size() == n && rows.size() == n &&
                        offsets.size() == n && dims.size() == n,
                    "srn_kernels: normalize_backward got lists of different lengths");
  std::vector<srn::BackwardLayer> layers(n);
  for (size_t i = 0; i < n; ++i) {
    const at::Tensor& w = weights[i];
    srn::BackwardLayer& l = layers[i];
    l.layout = layout_of(w, dims[i]);
    check_same_memory(grads[i], w, "grad");
    check_same_memory(grad_weights[i], w, "grad_weight");
    TORCH_CHECK_TYPE(grad_weights[i].scalar_type() == w.scalar_type(),
                     "srn_kernels: grad_weight must have its weight's dtype");
    l.grad_type = dtype_of(grads[i]);
    l.weight_type = dtype_of(w);
    TORCH_CHECK_TYPE(l.grad_type != srn::kFloat64 || l.weight_type == srn::kFloat64,
                     "srn_kernels: a float64 gradient needs a float64 weight");
    const State s = state_at(round_state, offsets[i], l.layout, state_type(w));
    l.grad = data(grads[i]);
    l.weight = data(w);
    l.grad_weight = data(grad_weights[i]);
    l.round_u = s.u;
    l.round_v = s.v;
    l.stats = stats_at(stats, rows[i]);
  }
  srn::normalize_backward(layers, at::get_num_threads(), parallel);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  namespace py = pybind11;
  using NoGil = py::call_guard<py::gil_scoped_release>;
  m.doc() = "CPU kernels of srn_kernels";
  m.def("normalize", &normalize, NoGil());
  m.def("normalize_backward", &normalize_backward, NoGil());
  m.def("take_like",
        [](const Tensors& like, at::ScalarType type) { return srn::take_like(like, type); });
  m.def("take_like", [](const Tensors& like) { return srn::take_like(like); });
  m.def("empty_recycler", &srn::empty_recycler);
  m.def("instruction_set", [] { return std::string(srn::kernels().isa); });
  m.def("select_instruction_set", &srn::select_kernels);
}
