// Tiles of all layers in dependency order, taken by any number of threads with one ticket each.
//
// A job (layer) is a chain of phases; the tiles of a phase may start when the phase before is
// finished. A tile only ever waits for tiles with smaller tickets, which running threads hold, so
// the list finishes for any number of threads, one included. Torch-free.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

namespace srn {

struct Tile {
  int32_t job;
  int32_t phase;  // kWholeJob: every phase of the job in one tile, no waiting
  int32_t index;
};
constexpr int32_t kWholeJob = -1;

struct JobShape {
  int32_t phases;
  int32_t first, last;  // tiles in each phase, and in the last one
  int64_t tile_bytes;   // bytes that one tile touches
  bool whole;
  int32_t tiles(int32_t phase) const { return phase + 1 < phases ? first : last; }
};

// The next phase of a job is listed once `lookahead` bytes of other tiles stand between, so that
// it need not wait and still finds its bytes in the cache.
inline std::vector<Tile> order_tiles(const std::vector<JobShape>& jobs, int64_t lookahead) {
  struct Pending {
    int32_t job, phase;
    int64_t ready_at;
  };
  std::vector<Tile> order;
  std::deque<Pending> pending;
  int64_t listed = 0;
  const auto list_phase = [&](int32_t job, int32_t phase) {
    const JobShape& shape = jobs[job];
    for (int32_t i = 0; i < shape.tiles(phase); ++i) order.push_back({job, phase, i});
    if (phase + 1 < shape.phases) pending.push_back({job, phase + 1, listed + lookahead});
  };
  const auto drain = [&](bool all) {
    while (!pending.empty() && (all || pending.front().ready_at <= listed)) {
      const Pending next = pending.front();
      pending.pop_front();
      list_phase(next.job, next.phase);
    }
  };
  for (int32_t job = 0; job < int32_t(jobs.size()); ++job) {
    if (jobs[job].whole) {
      order.push_back({job, kWholeJob, 0});
      listed += jobs[job].tile_bytes;
      drain(false);
      continue;
    }
    for (int32_t i = 0; i < jobs[job].tiles(0); ++i) {
      order.push_back({job, 0, i});
      listed += jobs[job].tile_bytes;
      drain(false);
    }
    if (jobs[job].phases > 1) pending.push_back({job, 1, listed + lookahead});
    drain(false);
  }
  drain(true);
  return order;
}

using ParallelFor = std::function<void(int64_t, const std::function<void(int64_t)>&)>;

// Runs `order` on `workers` threads. run(job, phase, index) does a tile; finish(job, phase) is
// called once, by the thread that completes the phase, before any tile of the next one starts.
template <class Run, class Finish>
void run_tiles(const std::vector<JobShape>& jobs, const std::vector<Tile>& order, int64_t workers,
               const ParallelFor& parallel, const Run& run, const Finish& finish) {
  struct alignas(64) Progress {
    std::atomic<int32_t> remaining{0};
    std::atomic<int32_t> finished{0};  // phases completed
  };
  std::unique_ptr<Progress[]> progress(new Progress[jobs.size()]);
  for (size_t j = 0; j < jobs.size(); ++j) progress[j].remaining = jobs[j].tiles(0);
  std::atomic<int64_t> ticket{0};

  parallel(workers, [&](int64_t) {
    for (int64_t t; (t = ticket.fetch_add(1, std::memory_order_relaxed)) < int64_t(order.size());) {
      const Tile tile = order[t];
      const JobShape& shape = jobs[tile.job];
      if (tile.phase == kWholeJob) {
        for (int32_t phase = 0; phase < shape.phases; ++phase) {
          for (int32_t i = 0; i < shape.tiles(phase); ++i) run(tile.job, phase, i);
          finish(tile.job, phase);
        }
        continue;
      }
      Progress& p = progress[tile.job];
      for (int spins = 0; p.finished.load(std::memory_order_acquire) < tile.phase; ++spins)
        if (spins > 1000) std::this_thread::yield();
      run(tile.job, tile.phase, tile.index);
      if (p.remaining.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        finish(tile.job, tile.phase);
        if (tile.phase + 1 < shape.phases)
          p.remaining.store(shape.tiles(tile.phase + 1), std::memory_order_relaxed);
        p.finished.store(tile.phase + 1, std::memory_order_release);
      }
    }
  });
}

}  // namespace srn
