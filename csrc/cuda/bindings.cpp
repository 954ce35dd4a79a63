// The Python module of the CUDA backend: checks, plans by key, pointers, launches. No call waits
// for the device.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <string>
#include <vector>

#include "table.h"
#ifdef SRN_SHIM
#include "shim/runtime.h"
#endif

namespace srn::cuda {
namespace {

namespace py = pybind11;
using Tensors = std::vector<at::Tensor>;
using Ints = std::vector<int64_t>;
using Doubles = std::vector<double>;

Type type_of(const at::Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return kFloat32;
    case at::kBFloat16:
      return kBFloat16;
    case at::kHalf:
      return kFloat16;
    case at::kDouble:
      return kFloat64;
    default:
      TORCH_CHECK_TYPE(false, "srn_kernels: ", name, " has the unsupported dtype ",
                       t.scalar_type());
  }
}

void check_place(const at::Tensor& t, const at::Tensor& first, const char* name) {
  TORCH_CHECK_VALUE(serves(first.is_cuda()),
                    "srn_kernels: the cuda backend serves weights on a GPU, got one on ",
                    first.device());
  TORCH_CHECK_VALUE(t.device() == first.device(), "srn_kernels: the cuda backend got ", name,
                    " on ", t.device(), ", expected ", first.device(), " as the first weight");
}

void check_vector(const at::Tensor& t, const char* name, int64_t size, at::ScalarType type,
                  const at::Tensor& first) {
  check_place(t, first, name);
  TORCH_CHECK_VALUE(
      t.dim() == 1 && t.numel() == size && t.is_contiguous() && t.scalar_type() == type,
      "srn_kernels: ", name, " must be a contiguous ", type, " tensor of size ", size);
}

void check_same_memory(const at::Tensor& t, const at::Tensor& weight, const char* name) {
  check_place(t, weight, name);
  TORCH_CHECK_VALUE(t.sizes() == weight.sizes() && t.strides() == weight.strides(),
                    "srn_kernels: ", name, " must have the sizes and strides of its weight");
}

char* data(const at::Tensor& t) { return static_cast<char*>(t.data_ptr()); }

// Whether vectors of four elements start at multiples of their size.
bool aligned(const void* p, Type type) { return uintptr_t(p) % (4 * element_bytes(type)) == 0; }

void check_round(const at::Tensor& round_state, const at::Tensor& stats, at::ScalarType type,
                 const at::Tensor& first) {
  check_place(round_state, first, "round_state");
  check_place(stats, first, "stats");
  TORCH_CHECK_VALUE(round_state.is_contiguous() && round_state.scalar_type() == type,
                    "srn_kernels: round_state must be contiguous and ", type);
  TORCH_CHECK_VALUE(stats.is_contiguous() && stats.dim() == 2 &&
                        stats.scalar_type() == at::kDouble && stats.size(1) == kStatsColumns,
                    "srn_kernels: stats must be a float64 tensor of (layers, 8)");
}

// Adds all that a layer's tiles depend on; the words that planning.py reads.
void describe(Key* key, const at::Tensor& w, int64_t dim, Type type, Type other, bool is_aligned,
              int64_t iterations, int64_t offset, int64_t row) {
  TORCH_CHECK_VALUE(dim >= 0 && dim < w.dim(), "srn_kernels: dim ", dim, " of a ", w.dim(),
                    "-dimensional weight");
  key->insert(key->end(), {w.dim(), dim, type, other, is_aligned, iterations, offset, row});
  key->insert(key->end(), w.sizes().begin(), w.sizes().end());
  key->insert(key->end(), w.strides().begin(), w.strides().end());
}

class Plans {
 public:
  void set_planner(py::object function) {
    planner = std::move(function);
    clear();
  }
  void clear() { plans.clear(); }  // graphs keep theirs
  size_t size() const { return plans.size(); }
  bool counters_are_clean() const {
    return std::all_of(plans.begin(), plans.end(),
                       [](const auto& p) { return p.second.plan->counters_are_clean(); });
  }

  // `key` holds [device, backward, float64] and then the layers. The caller holds the GIL.
  std::shared_ptr<Plan> find(const Key& key) {
    Plan::sweep();
    auto found = plans.find(key);
    if (found == plans.end()) {
      TORCH_CHECK(!planner.is_none(), "srn_kernels: the cuda backend has no planner");
      const auto plan =
          std::make_shared<Plan>(blueprint(planner(key)), int(key[0]), key[1] != 0, key[2] != 0);
      // Python may have let another thread make the same plan meanwhile: that one stays.
      found = plans.emplace(key, Kept{plan, 0}).first;
      found->second.used = ++calls;
      if (plans.size() > kMostPlans) plans.erase(oldest());  // models come and go
    }
    found->second.used = ++calls;
    return found->second.plan;
  }

 private:
  struct Kept {
    std::shared_ptr<Plan> plan;
    uint64_t used;  // by which call last
  };
  static constexpr size_t kMostPlans = 256;
  py::object planner = py::none();
  std::unordered_map<Key, Kept, KeyHash> plans;
  uint64_t calls = 0;

  std::unordered_map<Key, Kept, KeyHash>::const_iterator oldest() const {
    return std::min_element(plans.begin(), plans.end(), [](const auto& a, const auto& b) {
      return a.second.used < b.second.used;
    });
  }

  template <class T>
  static std::vector<T> unpacked(const py::handle& bytes) {
    const std::string raw = py::cast<std::string>(bytes);
    TORCH_CHECK(raw.size() % sizeof(T) == 0, "srn_kernels: planning.py and plan.h disagree");
    std::vector<T> values(raw.size() / sizeof(T));
    std::memcpy(values.data(), raw.data(), raw.size());
    return values;
  }
  static Blueprint blueprint(const py::object& made) {
    Blueprint b;
    b.records = unpacked<Record>(made.attr("records"));
    b.tiles = unpacked<Tile>(made.attr("tiles"));
    b.columns = unpacked<int32_t>(made.attr("columns"));
    b.slot_bytes = py::cast<int>(made.attr("slot_bytes"));
    b.stream_slots = py::cast<int>(made.attr("stream_slots"));
    b.resident_slots = py::cast<int>(made.attr("resident_slots"));
    b.ctas = py::cast<int>(made.attr("ctas"));
    return b;
  }
};

// Never destroyed: at exit there is no device left to give memory back to.
Plans& plans() {
  static auto* all = new Plans;
  return *all;
}

int device_index(const at::Tensor& t) { return t.is_cuda() ? t.get_device() : 0; }

// The workspace of a launch, from torch's allocator: it follows the stream, also into a graph.
at::Tensor workspace(const Plan& plan, const at::Tensor& like) {
  return at::empty({plan.scratch_bytes + 128}, like.options().dtype(at::kByte));
}
char* line_start(const at::Tensor& t) {
  return reinterpret_cast<char*>(round_up(int64_t(uintptr_t(t.data_ptr())), 128));
}

int64_t launches = 0;

// Launches consecutive layers, as many at a time as the kernel's parameters hold.
template <class Pointers, class Describe, class Launch>
void run(const Tensors& weights, const at::Tensor& round_state, const at::Tensor& stats,
         bool backward, const std::vector<Pointers>& pointers, int64_t capacity,
         Describe&& describe_layer, Launch&& launch) {
  const int device = device_index(weights[0]);
  const DeviceGuard guard(device);
  void* stream = current_stream(device);
  const int64_t n = int64_t(weights.size());
  const bool float64 = weights[0].scalar_type() == at::kDouble;
  if (float64) capacity = std::min<int64_t>(capacity, kSmall<Pointers>);  // see kernels.cu
  Key key;
  key.reserve(3 + 16 * size_t(std::min(n, capacity)));
  for (int64_t begin = 0; begin < n; begin += capacity) {
    const int64_t end = std::min(n, begin + capacity);
    key.assign({device, backward, float64});
    for (int64_t i = begin; i < end; ++i) describe_layer(&key, size_t(i));
    const std::shared_ptr<Plan> plan = plans().find(key);
    const at::Tensor scratch = workspace(*plan, weights[0]);
    Common common = plan->common;
    common.counters = plan->counters_for(stream);
    common.scratch = line_start(scratch);
    common.round_state = round_state.data_ptr();
    common.stats = reinterpret_cast<LayerStats*>(stats.data_ptr());
    ++launches;
    const py::gil_scoped_release no_gil;
    launch(common, pointers.data() + begin, plan->float64, plan->ctas, stream);
  }
}

int64_t forward_capacity = kLarge<ForwardPointers>, backward_capacity = kLarge<BackwardPointers>;

void normalize(const Tensors& weights, const Tensors& us, const Tensors& vs, const Tensors& outs,
               const at::Tensor& round_state, const at::Tensor& stats, const Ints& offsets,
               const Doubles& target_ranks, const Ints& iterations, const Ints& dims,
               const Doubles& eps) {
  const size_t n = weights.size();
  TORCH_CHECK_VALUE(us.size() == n && vs.size() == n && outs.size() == n && offsets.size() == n &&
                        target_ranks.size() == n && iterations.size() == n && dims.size() == n &&
                        eps.size() == n,
                    "srn_kernels: normalize got lists of different lengths");
  if (n == 0) return;
  const at::Tensor& first = weights[0];
  const bool float64 = first.scalar_type() == at::kDouble;
  const at::ScalarType state = float64 ? at::kDouble : at::kFloat;
  check_round(round_state, stats, state, first);
  TORCH_CHECK_VALUE(stats.size(0) >= int64_t(n), "srn_kernels: stats has too few rows");
  std::vector<ForwardPointers> pointers(n);
  for (size_t i = 0; i < n; ++i) {
    const at::Tensor& w = weights[i];
    check_place(w, first, "a weight");
    TORCH_CHECK_VALUE((w.scalar_type() == at::kDouble) == float64,
                      "srn_kernels: float64 weights need a call of their own");
    TORCH_CHECK_VALUE(dims[i] >= 0 && dims[i] < w.dim(), "srn_kernels: dim ", dims[i], " of a ",
                      w.dim(), "-dimensional weight");
    const int64_t rows = w.size(dims[i]), columns = w.numel() / std::max<int64_t>(rows, 1);
    check_vector(us[i], "u", rows, state, first);
    check_vector(vs[i], "v", columns, state, first);
    check_same_memory(outs[i], w, "out");
    TORCH_CHECK_TYPE(outs[i].scalar_type() != at::kDouble || float64,
                     "srn_kernels: float64 output needs a float64 weight");
    TORCH_CHECK_VALUE(
        offsets[i] >= 0 && offsets[i] + round_up(rows, kStatePad) + columns <= round_state.numel(),
        "srn_kernels: round_state is too small");
    pointers[i] = {data(w), data(outs[i]), data(us[i]), data(vs[i]), target_ranks[i], eps[i]};
  }
  run(
      weights, round_state, stats, false, pointers, forward_capacity,
      [&](Key* key, size_t i) {
        const Type type = type_of(weights[i], "a weight"), other = type_of(outs[i], "out");
        const bool vectors = aligned(pointers[i].weight, type) && aligned(pointers[i].out, other);
        describe(key, weights[i], dims[i], type, other, vectors,
                 std::max<int64_t>(iterations[i], -1), offsets[i], int64_t(i));
      },
      launch_normalize);
}

void normalize_backward(const Tensors& grads, const Tensors& weights, const at::Tensor& round_state,
                        const at::Tensor& stats, const Tensors& grad_weights, const Ints& rows,
                        const Ints& offsets, const Ints& dims) {
  const size_t n = weights.size();
  TORCH_CHECK_VALUE(grads.size() == n && grad_weights.size() == n && rows.size() == n &&
                        offsets.size() == n && dims.size() == n,
                    "srn_kernels: normalize_backward got lists of different lengths");
  if (n == 0) return;
  const at::Tensor& first = weights[0];
  const bool float64 = first.scalar_type() == at::kDouble;
  check_round(round_state, stats, float64 ? at::kDouble : at::kFloat, first);
  std::vector<BackwardPointers> pointers(n);
  for (size_t i = 0; i < n; ++i) {
    const at::Tensor& w = weights[i];
    check_place(w, first, "a weight");
    TORCH_CHECK_VALUE((w.scalar_type() == at::kDouble) == float64,
                      "srn_kernels: float64 weights need a call of their own");
    check_same_memory(grads[i], w, "grad");
    check_same_memory(grad_weights[i], w, "grad_weight");
    TORCH_CHECK_TYPE(grad_weights[i].scalar_type() == w.scalar_type(),
                     "srn_kernels: grad_weight must have its weight's dtype");
    TORCH_CHECK_TYPE(grads[i].scalar_type() != at::kDouble || float64,
                     "srn_kernels: a float64 gradient needs a float64 weight");
    TORCH_CHECK_VALUE(dims[i] >= 0 && dims[i] < w.dim(), "srn_kernels: dim ", dims[i], " of a ",
                      w.dim(), "-dimensional weight");
    const int64_t n_rows = w.size(dims[i]), columns = w.numel() / std::max<int64_t>(n_rows, 1);
    TORCH_CHECK_VALUE(rows[i] >= 0 && rows[i] < stats.size(0), "srn_kernels: row ", rows[i], " of ",
                      stats.size(0), " layers");
    TORCH_CHECK_VALUE(offsets[i] >= 0 &&
                          offsets[i] + round_up(n_rows, kStatePad) + columns <= round_state.numel(),
                      "srn_kernels: round_state is too small");
    pointers[i] = {data(grads[i]), data(w), data(grad_weights[i])};
  }
  run(
      weights, round_state, stats, true, pointers, backward_capacity,
      [&](Key* key, size_t i) {
        const Type type = type_of(weights[i], "a weight"), other = type_of(grads[i], "grad");
        const BackwardPointers& p = pointers[i];
        const bool vectors =
            aligned(p.grad, other) && aligned(p.weight, type) && aligned(p.grad_weight, type);
        describe(key, weights[i], dims[i], type, other, vectors, 1, offsets[i], rows[i]);
      },
      launch_backward);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "CUDA kernels of srn_kernels";
  m.def("normalize", &normalize);
  m.def("normalize_backward", &normalize_backward);
  m.def("set_planner", [](py::object f) { plans().set_planner(std::move(f)); });
  m.def("clear_plans", [] { plans().clear(); });
  m.def("plan_count", [] { return plans().size(); });
  m.def("launch_count", [] { return launches; });
  // Layers of one launch at most; lower only in tests.
  m.def("capacities", [] { return std::make_pair(forward_capacity, backward_capacity); });
  m.def("set_capacities", [](int64_t forward, int64_t backward) {
    TORCH_CHECK_VALUE(forward > 0 && forward <= kLarge<ForwardPointers> && backward > 0 &&
                          backward <= kLarge<BackwardPointers>,
                      "srn_kernels: capacities are from 1 to ", kLarge<ForwardPointers>, " and ",
                      kLarge<BackwardPointers>);
    forward_capacity = forward;
    backward_capacity = backward;
  });
  m.def("control_bytes", &control_bytes);
  m.def("layout", [] {
    py::dict d;
    d["record_bytes"] = sizeof(Record);
    d["parameter_bytes"] = kParameterBytes;
    d["forward_pointer_bytes"] = sizeof(ForwardPointers);
    d["backward_pointer_bytes"] = sizeof(BackwardPointers);
    d["common_bytes"] = sizeof(Common);
    d["small_forward"] = int(kSmall<ForwardPointers>);
    d["small_backward"] = int(kSmall<BackwardPointers>);
    d["consumer_warps"] = kWarps;
    d["vectors"] = std::vector<int>(std::begin(kVectorCounts), std::end(kVectorCounts));
    d["scalars"] = std::vector<int>(std::begin(kScalarCounts), std::end(kScalarCounts));
    d["part_vectors"] = kPartVectors;
    d["most_rows"] = kConsumers * 4;
    d["max_slots"] = kMaxSlots;
    d["max_pieces"] = kMaxPieces;
    return d;
  });
  m.def("unloadable", &unloadable);
#ifdef SRN_SHIM
  m.def("counters_are_clean", [] { return plans().counters_are_clean(); });
  m.def("allocations", [] { return Plan::sweep(), shim::allocations(); });
  m.def("fail_uploads", &shim::fail_uploads);
  m.def("set_stream", &shim::set_stream);
  m.def("set_capturing", &shim::set_capturing);
  m.def("destroy_graphs", &shim::destroy_graphs);
#endif
}

}  // namespace srn::cuda
