// The Python module of the CUDA backend: checks, plans by key, pointers, launches. No call waits
// for the device.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <string>
#include <vector>

#include "../checks.h"
#include "../verbs.h"
#include "table.h"
#ifdef SRN_SHIM
#include "shim/runtime.h"
#endif

namespace srn::cuda {
namespace {

namespace py = pybind11;

constexpr auto type_of = srn::type_of<Type, kFloat32, kBFloat16, kFloat16, kFloat64>;

// Tensors of a call lie with its first weight.
auto checks_beside(const at::Tensor& first) {
  return Checks{[device = first.device(), served = serves(first.is_cuda())](const at::Tensor& t,
                                                                            const char* name) {
    TORCH_CHECK_VALUE(served, "srn_kernels: the cuda backend serves weights on a GPU, got one on ",
                      device);
    TORCH_CHECK_VALUE(t.device() == device, "srn_kernels: the cuda backend got ", name, " on ",
                      t.device(), ", expected ", device, " as the first weight");
  }};
}

// Whether vectors of four elements start at multiples of their size.
bool aligned(const void* p, Type type) { return uintptr_t(p) % (4 * element_bytes(type)) == 0; }

// A layer's gain, or where its gradient goes, and what the kernels' records say of it.
struct GainOf {
  char* data = nullptr;
  Type type = kFloat32;
  bool through = true;

  GainOf() = default;
  explicit GainOf(const at::Tensor* gain) {
    if (!gain) return;
    data = srn::data(*gain);
    type = type_of(*gain, "a gain");
  }
};

int64_t columns_of(const at::Tensor& w, int64_t dim) {
  return w.numel() / std::max<int64_t>(w.size(dim), 1);
}

// Adds all that a layer's tiles depend on; the words that planning.py reads.
void describe(Key* key, const at::Tensor& w, int64_t dim, Type type, Type other, bool is_aligned,
              int64_t iterations, int64_t offset, int64_t row, const GainOf& gain) {
  key->insert(key->end(), {w.dim(), dim, type, other, is_aligned, iterations, offset, row,
                           gain.type, gain.through});
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

// Checks a weight and where its u, v and statistics lie.
template <class C>
void check_layer(const C& checks, const at::Tensor& w, const at::Tensor& first, int64_t dim,
                 const at::Tensor& round_state, int64_t offset, const at::Tensor& stats,
                 int64_t row) {
  checks.weight(w, dim);
  TORCH_CHECK_VALUE((w.scalar_type() == at::kDouble) == (first.scalar_type() == at::kDouble),
                    "srn_kernels: float64 weights need a call of their own");
  check_places(round_state, offset, w.size(dim), columns_of(w, dim), stats, row);
}

void normalize(const Tensors& weights, const Tensors& us, const Tensors& vs, const Tensors& outs,
               const at::Tensor& round_state, const at::Tensor& stats, const Ints& offsets,
               const Doubles& target_ranks, const Ints& iterations, const Ints& dims,
               const Doubles& eps, const Tensors& gains, const Ints& gained,
               const Doubles& sigma_max, const Bools& through) {
  const size_t n = weights.size();
  check_lengths("normalize", n, us, vs, outs, offsets, target_ranks, iterations, dims, eps);
  check_optional("normalize", n, gained, sigma_max, through);
  if (n == 0) return;
  const at::Tensor& first = weights[0];
  const auto checks = checks_beside(first);
  const at::ScalarType state = state_type(first);
  checks.round(round_state, stats, state);
  std::vector<ForwardPointers> pointers(n);
  std::vector<GainOf> gain(n);
  for (size_t i = 0; i < n; ++i) {
    const at::Tensor& w = weights[i];
    check_layer(checks, w, first, dims[i], round_state, offsets[i], stats, int64_t(i));
    checks.vector(us[i], "u", w.size(dims[i]), state);
    checks.vector(vs[i], "v", columns_of(w, dims[i]), state);
    checks.out(outs[i], w);
    gain[i] = GainOf(gain_of(checks, gains, gained, i));
    const Scaling bound = bound_of(sigma_max, through, i);
    gain[i].through = bound.through;
    pointers[i] = {data(w),         data(outs[i]), data(us[i]),  data(vs[i]),
                   target_ranks[i], eps[i],        gain[i].data, bound.sigma_max};
  }
  run(
      weights, round_state, stats, false, pointers, forward_capacity,
      [&](Key* key, size_t i) {
        const Type type = type_of(weights[i], "a weight"), other = type_of(outs[i], "out");
        const bool vectors = aligned(pointers[i].weight, type) && aligned(pointers[i].out, other);
        describe(key, weights[i], dims[i], type, other, vectors,
                 std::max<int64_t>(iterations[i], -1), offsets[i], int64_t(i), gain[i]);
      },
      launch_normalize);
}

void normalize_backward(const Tensors& grads, const Tensors& weights, const at::Tensor& round_state,
                        const at::Tensor& stats, const Tensors& grad_weights, const Ints& rows,
                        const Ints& offsets, const Ints& dims, const Tensors& grad_gains,
                        const Ints& gained) {
  const size_t n = weights.size();
  check_lengths("normalize_backward", n, grads, grad_weights, rows, offsets, dims);
  check_optional("normalize_backward", n, gained);
  if (n == 0) return;
  const at::Tensor& first = weights[0];
  const auto checks = checks_beside(first);
  checks.round(round_state, stats, state_type(first));
  std::vector<BackwardPointers> pointers(n);
  std::vector<GainOf> gain(n);
  for (size_t i = 0; i < n; ++i) {
    const at::Tensor& w = weights[i];
    check_layer(checks, w, first, dims[i], round_state, offsets[i], stats, rows[i]);
    checks.gradients(grads[i], grad_weights[i], w);
    gain[i] = GainOf(gain_of(checks, grad_gains, gained, i));
    pointers[i] = {data(grads[i]), data(w), data(grad_weights[i]), gain[i].data};
  }
  run(
      weights, round_state, stats, true, pointers, backward_capacity,
      [&](Key* key, size_t i) {
        const Type type = type_of(weights[i], "a weight"), other = type_of(grads[i], "grad");
        const BackwardPointers& p = pointers[i];
        const bool vectors =
            aligned(p.grad, other) && aligned(p.weight, type) && aligned(p.grad_weight, type);
        describe(key, weights[i], dims[i], type, other, vectors, 1, offsets[i], rows[i], gain[i]);
      },
      launch_backward);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "CUDA kernels of srn_kernels";
  define_verbs(m, normalize, normalize_backward);
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
