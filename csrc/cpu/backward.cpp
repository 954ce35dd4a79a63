// Backward of all layers with u and v held constant: one pass over G and W for the two inner
// products <G, W> and u^T G v, one to write dL/dW = scale (G + weight W + outer u v^T).
#include "layer.h"

namespace srn {
namespace {

template <class A>
struct BackwardJob {
  BackwardLayer* layer;
  const Kernels<A>* k;
  Slabs slabs;
  const A* u;
  A* v;                     // columns in memory order
  InnerProducts* partials;  // one per tile
  BackwardScalars scalars;
  bool stream;  // write dL/dW past the cache
  void (*fence)();

  static int64_t bytes(const BackwardLayer& l, const Slabs& slabs) {
    return l.layout.columns() * int64_t(sizeof(A)) + slabs.count * int64_t(sizeof(InnerProducts)) +
           2 * 64;
  }
};

template <class A>
void set_up(BackwardLayer& l, const KernelTables& tables, bool stream, Workspace& ws,
            BackwardJob<A>* job) {
  const int64_t columns = l.layout.columns();
  job->layer = &l;
  job->k = &kernels_for(tables, A());
  job->slabs = make_slabs(l.layout.rows, columns, element_size(l.weight_type));
  job->stream = stream;
  job->fence = tables.fence;
  job->u = static_cast<const A*>(l.round_u);
  job->v = ws.take_array<A>(columns);
  job->partials = ws.take_array<InnerProducts>(job->slabs.count);
  const A* v = static_cast<const A*>(l.round_v);
  const auto& column_of = l.layout.column_of;
  for (int64_t j = 0; j < columns; ++j) job->v[j] = v[column_of.empty() ? j : column_of[j]];
}

template <class A>
void run_inner(BackwardJob<A>& job, int64_t index) {
  static thread_local std::vector<A> left, right;
  const BackwardLayer& l = *job.layer;
  const Layout& layout = l.layout;
  const Range range = elementwise_range(layout, job.slabs, index);
  InnerProducts sum{0.0, 0.0};
  if (layout.outer == 1) {
    const auto inner = job.k->inner_row[l.grad_type][l.weight_type];
    for (int64_t r = range.begin; r < range.end; ++r) {
      const InnerProducts row =
          inner(at(l.grad, r * layout.inner, l.grad_type),
                at(l.weight, r * layout.inner, l.weight_type), layout.inner, job.v);
      sum.g_w += row.g_w;
      sum.g_e += row.g_e * double(job.u[r]);
    }
  } else {
    const auto inner = job.k->inner_flat[l.grad_type][l.weight_type];
    const int64_t slice = layout.rows * layout.inner;
    spread_rows(job.u, layout.rows, layout.inner, &left);
    for (int64_t i = range.begin; i < range.end; ++i) {
      wrap_slice(job.v + i * layout.inner, layout.inner, &right);
      const InnerProducts part =
          inner(at(l.grad, i * slice, l.grad_type), at(l.weight, i * slice, l.weight_type), slice,
                left.data(), right.data(), layout.inner);
      sum.g_w += part.g_w;
      sum.g_e += part.g_e;
    }
  }
  job.partials[index] = sum;
}

template <class A>
void finish_inner(BackwardJob<A>& job) {
  InnerProducts sum{0.0, 0.0};
  for (int64_t i = 0; i < elementwise_tiles(job.layer->layout, job.slabs); ++i) {
    sum.g_w += job.partials[i].g_w;
    sum.g_e += job.partials[i].g_e;
  }
  job.scalars = backward_scalars(*job.layer->stats, sum.g_w, sum.g_e);
}

template <class A>
void run_combine(BackwardJob<A>& job, int64_t index) {
  static thread_local std::vector<A> left, right;
  const BackwardLayer& l = *job.layer;
  const Layout& layout = l.layout;
  const Range range =
      elementwise_range(layout, job.slabs, elementwise_tiles(layout, job.slabs) - 1 - index);
  const A scale = A(job.scalars.scale), weight = A(job.scalars.weight),
          outer = A(job.scalars.outer);
  if (layout.outer == 1) {
    const auto combine = job.k->combine_row[l.grad_type][l.weight_type];
    for (int64_t r = range.begin; r < range.end; ++r) {
      const int64_t o = r * layout.inner;
      combine(at(l.grad, o, l.grad_type), at(l.weight, o, l.weight_type),
              at(l.grad_weight, o, l.weight_type), layout.inner, scale, weight, outer * job.u[r],
              job.v, job.stream);
    }
    if (job.stream) job.fence();
    return;
  }
  const auto combine = job.k->combine_flat[l.grad_type][l.weight_type];
  const int64_t slice = layout.rows * layout.inner;
  spread_rows(job.u, layout.rows, layout.inner, &left);
  for (int64_t i = range.begin; i < range.end; ++i) {
    wrap_slice(job.v + i * layout.inner, layout.inner, &right);
    combine(at(l.grad, i * slice, l.grad_type), at(l.weight, i * slice, l.weight_type),
            at(l.grad_weight, i * slice, l.weight_type), slice, scale, weight, outer, left.data(),
            right.data(), layout.inner);
  }
}

struct AnyJob {
  bool wide;
  BackwardJob<float> f32;
  BackwardJob<double> f64;
  template <class F>
  void visit(F&& f) {
    wide ? f(f64) : f(f32);
  }
};

}  // namespace

void normalize_backward(std::vector<BackwardLayer>& layers, int64_t threads,
                        const ParallelFor& parallel) {
  const KernelTables& tables = kernels();
  std::vector<AnyJob> jobs(layers.size());
  std::vector<JobShape> shapes(layers.size());
  Workspace ws;
  int64_t scratch = 0, written = 0;
  for (auto& l : layers) {
    const Slabs s = make_slabs(l.layout.rows, l.layout.columns(), element_size(l.weight_type));
    scratch += l.weight_type == kFloat64 ? BackwardJob<double>::bytes(l, s)
                                         : BackwardJob<float>::bytes(l, s);
    written += l.layout.rows * l.layout.columns() * element_size(l.weight_type);
  }
  const bool stream = written > kStreamBytes;
  ws.reserve(scratch);
  int64_t lookahead = 0, total = 0;
  for (size_t i = 0; i < layers.size(); ++i) {
    BackwardLayer& l = layers[i];
    jobs[i].wide = l.weight_type == kFloat64;
    jobs[i].visit([&](auto& job) {
      set_up(l, tables, stream, ws, &job);
      const int64_t bytes = l.layout.rows * l.layout.columns() *
                            (element_size(l.weight_type) + element_size(l.grad_type));
      const int32_t tiles = int32_t(elementwise_tiles(l.layout, job.slabs));
      JobShape& shape = shapes[i];
      shape.tiles = {tiles, tiles};
      shape.whole = bytes <= 2 * kWholeBytes;
      shape.tile_bytes = shape.whole ? bytes : bytes / tiles;
      lookahead = std::max(lookahead, shape.tile_bytes);
      total += bytes;
    });
  }
  const int64_t workers = std::max<int64_t>(1, std::min(threads, total / (128 << 10)));
  lookahead = workers == 1 ? 0 : lookahead * workers;
  run_tiles(
      shapes, order_tiles(shapes, lookahead), workers, parallel,
      [&](int32_t j, int32_t phase, int32_t index) {
        jobs[j].visit(
            [&](auto& job) { phase == 0 ? run_inner(job, index) : run_combine(job, index); });
      },
      [&](int32_t j, int32_t phase) {
        jobs[j].visit([&](auto& job) {
          if (phase == 0) finish_inner(job);
        });
      });
}

}  // namespace srn
