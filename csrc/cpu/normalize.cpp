// Forward of all layers: power iterations, statistics, and W_hat = a W + b u v^T.
// Each power iteration reads the weight once: a block of rows gives s = W v and, while still in
// the cache, its share of t = W^T s and of |W|_F^2; sigma = u^T W v = |t| / |s| needs no third
// product.
#include <cmath>
#include <cstring>
#include <limits>

#include "jobs.h"

namespace srn {
namespace {

template <class A>
struct ForwardJob {
  NormalizeLayer* layer;
  const Kernels<A>* k;
  Slabs slabs;
  int passes;       // over the weight before the rescale
  A* v;             // working v, columns in memory order
  A* u;             // working u
  A* s;             // W v of this pass
  A* partials;      // slabs x columns: each slab's share of W^T s
  double* factors;  // each slab's share is partials * factors
  double* squares;  // each slab's share of |W|_F^2
  double* total;    // W^T s
  LayerStats stats;
  bool stream;  // write W_hat past the cache
  void (*fence)();

  static int64_t bytes(const NormalizeLayer& l, const Slabs& slabs) {
    const int64_t r = l.layout.rows, c = l.layout.columns(), n = slabs.count;
    return (c + 2 * r + n * c) * int64_t(sizeof(A)) + (2 * n + c) * 8 + 7 * 64;
  }
  static int64_t touched(const NormalizeLayer& l) {
    return l.layout.rows * l.layout.columns() * element_size(l.weight_type);
  }
  static int64_t written(const NormalizeLayer& l) {
    return l.layout.rows * l.layout.columns() * element_size(l.out_type);
  }
};

constexpr int64_t kPackRows = 16;
constexpr int kLargestExponent = 1000;  // its power of two is a finite double

// x of unit length; a vector of zeros stays one.
template <class A>
void make_unit(const Kernels<A>& k, A* x, int64_t n) {
  const double size = std::sqrt(k.square_sum(x, n));
  if (size != 0.0) k.divide(x, size, n, x);
}

template <class A>
void set_up(NormalizeLayer& l, const KernelTables& tables, bool stream, Workspace& ws,
            ForwardJob<A>* job) {
  const int64_t rows = l.layout.rows, columns = l.layout.columns();
  job->layer = &l;
  job->k = &kernels_for(tables, A());
  job->slabs = make_slabs(rows, columns, element_size(l.weight_type));
  job->stream = stream;
  job->fence = tables.fence;
  job->passes = l.iterations < 0 ? 0 : std::max(1, l.iterations);
  const int64_t n = job->slabs.count;
  job->v = ws.take_array<A>(columns);
  job->u = ws.take_array<A>(rows);
  job->s = ws.take_array<A>(rows);
  job->partials = ws.take_array<A>(n * columns);
  job->factors = ws.take_array<double>(n);
  job->squares = ws.take_array<double>(n);
  job->total = ws.take_array<double>(columns);

  const bool repeat = l.iterations < 0;
  const A* v = static_cast<const A*>(repeat ? l.round_v : l.v);
  const A* u = static_cast<const A*>(repeat ? l.round_u : l.u);
  to_memory_order(l.layout, v, job->v);
  std::copy_n(u, rows, job->u);
  if (l.iterations == 0) {  // an average of unit vectors is shorter than one
    make_unit(*job->k, job->u, rows);
    make_unit(*job->k, job->v, columns);
  }
  if (repeat) {
    set_factor(l.stats, l.scaling);
    job->stats = *l.stats;
  }
}

// Copies rows [begin, begin + n) of a layout with outer > 1 side by side, columns in memory order.
template <class E>
void pack_rows(const Layout& l, const E* w, int64_t begin, int64_t n, E* packed) {
  const int64_t columns = l.columns();
  for (int64_t a = 0; a < l.outer; ++a) {
    const E* source = w + (a * l.rows + begin) * l.inner;
    for (int64_t r = 0; r < n; ++r)
      for (int64_t b = 0; b < l.inner; ++b)
        packed[r * columns + a * l.inner + b] = source[r * l.inner + b];
  }
}

void pack(const NormalizeLayer& l, int64_t begin, int64_t n, std::vector<char>* packed) {
  packed->resize(n * l.layout.columns() * element_size(l.weight_type));
  switch (element_size(l.weight_type)) {
    case 2:
      return pack_rows(l.layout, static_cast<const uint16_t*>(l.weight), begin, n,
                       reinterpret_cast<uint16_t*>(packed->data()));
    case 4:
      return pack_rows(l.layout, static_cast<const uint32_t*>(l.weight), begin, n,
                       reinterpret_cast<uint32_t*>(packed->data()));
    default:
      return pack_rows(l.layout, static_cast<const uint64_t*>(l.weight), begin, n,
                       reinterpret_cast<uint64_t*>(packed->data()));
  }
}

// One slab of one pass: s = W v for its rows, its share of |W|_F^2 and of t = W^T s.
template <class A>
void run_slab(ForwardJob<A>& job, int64_t slab) {
  static thread_local std::vector<char> packed;
  const NormalizeLayer& l = *job.layer;
  const int64_t columns = l.layout.columns();
  const int64_t begin = slab * job.slabs.rows_each;
  const int64_t end = std::min(l.layout.rows, begin + job.slabs.rows_each);
  const bool iterate = l.iterations > 0;
  A* t = job.partials + slab * columns;
  if (iterate) std::fill_n(t, columns, A(0));
  double squares = 0.0;
  int exponent = std::numeric_limits<int>::min();  // t holds the share times 2^-exponent

  for (int64_t r = begin; r < end; r += kRowBlock) {
    const int n = int(std::min<int64_t>(kRowBlock, end - r));
    const void* w = at(l.weight, r * columns, l.weight_type);
    if (l.layout.outer > 1) {
      if ((r - begin) % kPackRows == 0) pack(l, r, std::min(kPackRows, end - r), &packed);
      w = at(packed.data(), (r - begin) % kPackRows * columns, l.weight_type);
    }
    A* s = job.s + r;
    squares += job.k->dot[l.weight_type](w, columns, n, columns, job.v, s);
    if (!iterate) continue;
    // t grows as sigma^2, which may leave float32: scale s by a power of two, which is exact.
    A largest = 0, scaled[kRowBlock];
    for (int i = 0; i < n; ++i) largest = std::max(largest, std::fabs(s[i]));
    const int here = largest > 0 && largest <= std::numeric_limits<A>::max()
                         ? std::max(std::ilogb(largest), -kLargestExponent)
                         : 0;
    if (exponent == std::numeric_limits<int>::min()) {
      exponent = here;
    } else if (here > exponent + 40) {
      const A shrink = A(std::ldexp(1.0, exponent - here));
      for (int64_t j = 0; j < columns; ++j) t[j] *= shrink;
      exponent = here;
    }
    const double unit = std::ldexp(1.0, -exponent);
    for (int i = 0; i < n; ++i) scaled[i] = A(double(s[i]) * unit);
    // In a packed block the rows that follow are not in memory yet; any address will do.
    const bool ahead = l.layout.outer == 1 && r + 2 * kRowBlock <= l.layout.rows;
    const void* next = ahead ? at(l.weight, (r + kRowBlock) * columns, l.weight_type) : w;
    job.k->accumulate[l.weight_type](w, columns, n, columns, scaled, t, next);
  }
  job.squares[slab] = squares;
  if (iterate) job.factors[slab] = std::ldexp(1.0, exponent);
}

template <class A>
void finish_pass(ForwardJob<A>& job, int pass) {
  NormalizeLayer& l = *job.layer;
  const int64_t rows = l.layout.rows, columns = l.layout.columns(), n = job.slabs.count;
  double frobenius_sq = 0.0, sigma = 0.0;
  for (int64_t k = 0; k < n; ++k) frobenius_sq += job.squares[k];
  if (l.iterations > 0) {
    const double s_norm = std::sqrt(job.k->square_sum(job.s, rows));
    const double t_norm =
        std::sqrt(job.k->reduce(job.partials, job.factors, n, columns, job.total));
    sigma = s_norm > 0.0 ? t_norm / s_norm : s_norm;
    if (sigma > 0.0) {
      job.k->divide(job.s, s_norm, rows, job.u);
      job.k->divide_wide(job.total, t_norm, columns, job.v);
    }
  } else {
    sigma = job.k->inner(job.u, job.s, rows);
  }
  if (pass + 1 < job.passes) return;

  job.stats = forward_scalars(sigma, frobenius_sq, l.target_rank, l.eps);
  set_factor(&job.stats, l.scaling);
  *l.stats = job.stats;
  A* round_u = static_cast<A*>(l.round_u);
  A* round_v = static_cast<A*>(l.round_v);
  A* u = static_cast<A*>(l.u);
  A* v = static_cast<A*>(l.v);
  if (int(job.stats.branch) >= kPassThrough && l.iterations > 0) {
    // A zero or non-finite weight leaves the state as it was, so that training can go on.
    std::copy_n(u, rows, round_u);
    std::copy_n(v, columns, round_v);
    return;
  }
  std::copy_n(job.u, rows, round_u);
  to_matrix_order(l.layout, job.v, round_v);
  if (l.iterations > 0) {
    std::copy_n(round_u, rows, u);
    std::copy_n(round_v, columns, v);
  }
}

// The factor of W_hat = a W + b u v^T; the last tile first, which the cache still holds.
template <class A>
void run_rescale(ForwardJob<A>& job, int64_t index) {
  static thread_local std::vector<A> left, right;
  const NormalizeLayer& l = *job.layer;
  const Layout& layout = l.layout;
  const int64_t tiles = elementwise_tiles(layout, job.slabs);
  const Range range = elementwise_range(layout, job.slabs, tiles - 1 - index);
  const A a = A(job.stats.factor * job.stats.a), b = A(job.stats.factor * job.stats.b);
  if (layout.outer == 1) {
    const int64_t first = range.begin * layout.inner;
    job.k->scale_rows[l.weight_type][l.out_type](
        at(l.weight, first, l.weight_type), at(l.out, first, l.out_type), range.end - range.begin,
        layout.inner, a, b, job.u + range.begin, job.v, job.stream);
    if (job.stream) job.fence();
    return;
  }
  const auto scale = job.k->scale_flat[l.weight_type][l.out_type];
  const int64_t slice = layout.rows * layout.inner;
  spread_rows(job.u, layout.rows, layout.inner, &left);
  for (int64_t i = range.begin; i < range.end; ++i) {
    wrap_slice(job.v + i * layout.inner, layout.inner, &right);
    scale(at(l.weight, i * slice, l.weight_type), at(l.out, i * slice, l.out_type), slice, a, b,
          left.data(), right.data(), layout.inner);
  }
}

template <class A>
JobShape shape_of(const ForwardJob<A>& job) {
  const auto rescale = int32_t(elementwise_tiles(job.layer->layout, job.slabs));
  return {job.passes + 1, int32_t(job.slabs.count), rescale, 0, false};
}

template <class A>
void run(ForwardJob<A>& job, int phase, int64_t index) {
  phase < job.passes ? run_slab(job, index) : run_rescale(job, index);
}

template <class A>
void finish(ForwardJob<A>& job, int phase) {
  if (phase < job.passes) finish_pass(job, phase);
}

}  // namespace

void normalize(std::vector<NormalizeLayer>& layers, int64_t threads, const ParallelFor& parallel) {
  run_jobs<ForwardJob>(layers, kWholeBytes, 64 << 10, threads, parallel);
}

}  // namespace srn
