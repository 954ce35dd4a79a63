// Backward of all layers with u and v held constant: one pass over G and W for the two inner
// products <G, W> and u^T G v, one to write dL/dW = scale (G + weight W) + outer u v^T.
#include "jobs.h"

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
  static int64_t touched(const BackwardLayer& l) {
    return l.layout.rows * l.layout.columns() *
           (element_size(l.weight_type) + element_size(l.grad_type));
  }
  static int64_t written(const BackwardLayer& l) {
    return l.layout.rows * l.layout.columns() * element_size(l.weight_type);
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
  to_memory_order(l.layout, static_cast<const A*>(l.round_v), job->v);
}

template <class A>
void run_inner(BackwardJob<A>& job, int64_t index) {
  static thread_local std::vector<A> left, right;
  const BackwardLayer& l = *job.layer;
  const Layout& layout = l.layout;
  const Range range = elementwise_range(layout, job.slabs, index);
  InnerProducts sum{0.0, 0.0};
  if (layout.outer == 1) {
    const int64_t first = range.begin * layout.inner;
    sum = job.k->inner_rows[l.grad_type][l.weight_type](
        at(l.grad, first, l.grad_type), at(l.weight, first, l.weight_type), range.end - range.begin,
        layout.inner, job.u + range.begin, job.v);
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
  job.layer->grad_gain = job.scalars.gain;
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
    const int64_t first = range.begin * layout.inner;
    job.k->combine_rows[l.grad_type][l.weight_type](
        at(l.grad, first, l.grad_type), at(l.weight, first, l.weight_type),
        at(l.grad_weight, first, l.weight_type), range.end - range.begin, layout.inner, scale,
        weight, outer, job.u + range.begin, job.v, job.stream);
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

template <class A>
JobShape shape_of(const BackwardJob<A>& job) {
  const auto tiles = int32_t(elementwise_tiles(job.layer->layout, job.slabs));
  return {2, tiles, tiles, 0, false};
}

template <class A>
void run(BackwardJob<A>& job, int phase, int64_t index) {
  phase == 0 ? run_inner(job, index) : run_combine(job, index);
}

template <class A>
void finish(BackwardJob<A>& job, int phase) {
  if (phase == 0) finish_inner(job);
}

}  // namespace

void normalize_backward(std::vector<BackwardLayer>& layers, int64_t threads,
                        const ParallelFor& parallel) {
  run_jobs<BackwardJob>(layers, 2 * kWholeBytes, 128 << 10, threads, parallel);
}

}  // namespace srn
