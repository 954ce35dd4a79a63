// All layers of one call as jobs of either accumulation type, run over one list of tiles.
//
// A Job<A> has bytes(layer, slabs), its scratch, touched(layer), what one pass of it reads, and
// written(layer); beside it stand set_up(layer, tables, stream, workspace, &job), shape_of(job), in
// each phase, run(job, phase, index) and finish(job, phase). Torch-free.
#pragma once

#include <algorithm>
#include <vector>

#include "layer.h"
#include "pace.h"

namespace srn {

template <template <class> class Job>
struct AnyJob {
  bool wide;
  Job<float> f32;
  Job<double> f64;
  template <class F>
  void visit(F&& f) {
    wide ? f(f64) : f(f32);
  }
};

constexpr int64_t kSteadyBytes = 64 << 20;  // rounds beyond this take all threads

// whole_bytes: a layer that touches up to so many is one tile of one thread.
// worker_bytes: that a thread must find to be worth waking.
template <template <class> class Job, class Layer>
void run_jobs(std::vector<Layer>& layers, int64_t whole_bytes, int64_t worker_bytes,
              int64_t threads, const ParallelFor& parallel) {
  const KernelTables& tables = kernels();
  std::vector<AnyJob<Job>> jobs(layers.size());
  std::vector<JobShape> shapes(layers.size());
  Workspace ws;
  int64_t scratch = 0, written = 0;
  for (auto& l : layers) {
    const Slabs s = make_slabs(l.layout.rows, l.layout.columns(), element_size(l.weight_type));
    scratch += l.weight_type == kFloat64 ? Job<double>::bytes(l, s) : Job<float>::bytes(l, s);
    written += Job<float>::written(l);
  }
  ws.reserve(scratch);
  int64_t lookahead = 0, total = 0;
  for (size_t i = 0; i < layers.size(); ++i) {
    jobs[i].wide = layers[i].weight_type == kFloat64;
    jobs[i].visit([&](auto& job) {
      set_up(layers[i], tables, written > kStreamBytes, ws, &job);
      const int64_t bytes = job.touched(layers[i]);
      JobShape& shape = shapes[i];
      shape = shape_of(job);
      shape.whole = bytes <= whole_bytes;
      shape.tile_bytes = shape.whole ? bytes : bytes / shape.tiles(0);
      lookahead = std::max(lookahead, shape.tile_bytes);
      total += bytes;
    });
  }
  int64_t workers = std::max<int64_t>(1, std::min(threads, total / worker_bytes));
  static Paces* const paces = new Paces;  // of this verb; never destroyed
  const Paces::Kind kind{int64_t(layers.size()), total, workers};
  const bool learns = workers > 1 && total < kSteadyBytes;
  if (learns && !paces->parallel(kind)) workers = 1;
  const Stopwatch watch;
  run_tiles(
      shapes, order_tiles(shapes, workers == 1 ? 0 : lookahead * workers), workers, parallel,
      [&](int32_t j, int32_t phase, int32_t index) {
        jobs[j].visit([&](auto& job) { run(job, phase, index); });
      },
      [&](int32_t j, int32_t phase) { jobs[j].visit([&](auto& job) { finish(job, phase); }); });
  if (learns) paces->took(kind, watch.seconds());
}

}  // namespace srn
