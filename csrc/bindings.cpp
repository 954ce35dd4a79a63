// Tensors to plain pointers, and the Python module of the CPU backend. The ops themselves are
// registered in srn_kernels/core/ops.py, whose schemas say what each list means.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/extension.h>

#include <string>
#include <vector>

#include "checks.h"
#include "cpu/layer.h"
#include "cpu/pace.h"
#include "cpu/recycler.h"
#include "host.h"
#include "verbs.h"

namespace {

using srn::Bools, srn::data, srn::Doubles, srn::Ints, srn::Tensors;

constexpr auto dtype_of =
    srn::type_of<srn::DType, srn::kFloat32, srn::kBFloat16, srn::kFloat16, srn::kFloat64>;

const srn::Checks checks{[](const at::Tensor& t, const char* name) {
  TORCH_CHECK_VALUE(t.is_cpu(), "srn_kernels: the cpu backend got ", name, " on ", t.device());
}};

srn::Layout layout_of(const at::Tensor& t, int64_t dim) {
  checks.weight(t, dim);
  srn::Layout layout;
  TORCH_CHECK_VALUE(
      srn::make_layout(t.sizes().data(), t.strides().data(), int(t.dim()), int(dim), &layout),
      "srn_kernels: a weight's memory is not dense");
  return layout;
}

void parallel(int64_t workers, const std::function<void(int64_t)>& body) {
  at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

// What a round keeps of one layer.
struct Kept {
  char* u;
  char* v;
  srn::LayerStats* stats;
};

Kept kept(const at::Tensor& round_state, int64_t offset, const srn::Layout& l,
          const at::Tensor& stats, int64_t row) {
  srn::check_places(round_state, offset, l.rows, l.columns(), stats, row);
  const int64_t size = round_state.element_size();
  return {data(round_state) + offset * size,
          data(round_state) + (offset + srn::padded(l.rows)) * size,
          reinterpret_cast<srn::LayerStats*>(stats.data_ptr<double>()) + row};
}

void normalize(const Tensors& weights, const Tensors& us, const Tensors& vs, const Tensors& outs,
               const at::Tensor& round_state, const at::Tensor& stats, const Ints& offsets,
               const Doubles& target_ranks, const Ints& iterations, const Ints& dims,
               const Doubles& eps, const Tensors& gains, const Ints& gained,
               const Doubles& sigma_max, const Bools& through) {
  const size_t n = weights.size();
  srn::check_lengths("normalize", n, us, vs, outs, offsets, target_ranks, iterations, dims, eps);
  srn::check_optional("normalize", n, gained, sigma_max, through);
  std::vector<srn::NormalizeLayer> layers(n);
  for (size_t i = 0; i < n; ++i) {
    const at::Tensor& w = weights[i];
    const at::ScalarType state = srn::state_type(w);
    srn::NormalizeLayer& l = layers[i];
    l.layout = layout_of(w, dims[i]);
    checks.vector(us[i], "u", l.layout.rows, state);
    checks.vector(vs[i], "v", l.layout.columns(), state);
    checks.out(outs[i], w);
    checks.round(round_state, stats, state);
    const Kept k = kept(round_state, offsets[i], l.layout, stats, int64_t(i));
    l.weight_type = dtype_of(w, "a weight");
    l.out_type = dtype_of(outs[i], "out");
    l.weight = data(w);
    l.out = data(outs[i]);
    l.u = data(us[i]);
    l.v = data(vs[i]);
    l.round_u = k.u;
    l.round_v = k.v;
    l.stats = k.stats;
    l.target_rank = target_ranks[i];
    l.eps = eps[i];
    l.iterations = int(iterations[i]);
    l.scaling = srn::bound_of(sigma_max, through, i);
    if (const at::Tensor* gain = srn::gain_of(checks, gains, gained, i))
      l.scaling.gain = gain->item().toDouble();
  }
  srn::normalize(layers, at::get_num_threads(), parallel);
}

// To the one element of a tensor.
void write(const at::Tensor& t, double value) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, t.scalar_type(), "gain",
                                  [&] { *t.data_ptr<scalar_t>() = scalar_t(value); });
}

void normalize_backward(const Tensors& grads, const Tensors& weights, const at::Tensor& round_state,
                        const at::Tensor& stats, const Tensors& grad_weights, const Ints& rows,
                        const Ints& offsets, const Ints& dims, const Tensors& grad_gains,
                        const Ints& gained) {
  const size_t n = weights.size();
  srn::check_lengths("normalize_backward", n, grads, grad_weights, rows, offsets, dims);
  srn::check_optional("normalize_backward", n, gained);
  std::vector<srn::BackwardLayer> layers(n);
  std::vector<const at::Tensor*> gain_outs(n);
  for (size_t i = 0; i < n; ++i) {
    const at::Tensor& w = weights[i];
    srn::BackwardLayer& l = layers[i];
    l.layout = layout_of(w, dims[i]);
    checks.gradients(grads[i], grad_weights[i], w);
    checks.round(round_state, stats, srn::state_type(w));
    const Kept k = kept(round_state, offsets[i], l.layout, stats, rows[i]);
    l.grad_type = dtype_of(grads[i], "grad");
    l.weight_type = dtype_of(w, "a weight");
    l.grad = data(grads[i]);
    l.weight = data(w);
    l.grad_weight = data(grad_weights[i]);
    l.round_u = k.u;
    l.round_v = k.v;
    l.stats = k.stats;
    gain_outs[i] = srn::gain_of(checks, grad_gains, gained, i);
  }
  srn::normalize_backward(layers, at::get_num_threads(), parallel);
  for (size_t i = 0; i < n; ++i)
    if (gain_outs[i]) write(*gain_outs[i], layers[i].grad_gain);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  namespace py = pybind11;
  using NoGil = py::call_guard<py::gil_scoped_release>;
  m.doc() = "CPU kernels of srn_kernels, and the loops of its rounds";
  srn::define_verbs(m, normalize, normalize_backward, NoGil());
  m.def("take_like",
        [](const Tensors& like, at::ScalarType type) { return srn::take_like(like, type); });
  m.def("take_like", [](const Tensors& like) { return srn::take_like(like); });
  py::class_<srn::Pace>(m, "Pace")  // for tests
      .def(py::init<>())
      .def("parallel", &srn::Pace::parallel)
      .def("took", &srn::Pace::took);
  srn::define_host(m);
  m.def("empty_recycler", &srn::empty_recycler);
  m.def("instruction_set", [] { return std::string(srn::kernels().isa); });
  m.def("select_instruction_set", &srn::select_kernels);
}
