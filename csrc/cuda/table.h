// Plans: all that stays the same between calls with equal shapes, strides, dtypes, alignment,
// iterations and places in the round's state. Torch-free.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <unordered_map>
#include <vector>

#include "launch.h"
#include "plan.h"
#include "runtime.h"

namespace srn::cuda {

using Key = std::vector<int64_t>;

struct KeyHash {
  size_t operator()(const Key& key) const {
    uint64_t h = 0x9e3779b97f4a7c15;
    for (int64_t x : key) h = (h ^ uint64_t(x)) * 0xff51afd7ed558ccd, h ^= h >> 32;
    return size_t(h);
  }
};

// What planning.py makes of some layers.
struct Blueprint {
  std::vector<Record> records;  // `scratch` is set here
  std::vector<Tile> tiles;
  std::vector<int32_t> columns;
  int slot_bytes = 0, stream_slots = 0, resident_slots = 0, ctas = 1;
};

class Plan : public std::enable_shared_from_this<Plan> {
 public:
  Plan(Blueprint b, int device, bool backward, bool float64)
      : device(device), float64(float64), ctas(b.ctas) {
    check(b, backward, float64);
    for (Record& r : b.records) {
      r.scratch = scratch_bytes;
      scratch_bytes +=
          float64 ? Workspace<double>::bytes(r, backward) : Workspace<float>::bytes(r, backward);
    }
    std::vector<char> blob;
    const size_t records = append(&blob, b.records), tiles = append(&blob, b.tiles),
                 columns = append(&blob, b.columns);
    memory = Memory(blob.data(), blob.size(), device);
    common = {};
    common.records = reinterpret_cast<const Record*>(memory.data() + records);
    common.tiles = reinterpret_cast<const Tile*>(memory.data() + tiles);
    common.columns = reinterpret_cast<const int32_t*>(memory.data() + columns);
    common.n_tiles = int32_t(b.tiles.size());
    common.n_layers = int32_t(b.records.size());
    common.slot_bytes = b.slot_bytes;
    common.stream_slots = b.stream_slots;
    common.resident_slots = b.resident_slots;
  }
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  // A kernel leaves its counters at zero, so launches of one stream share them. A graph may run
  // beside any stream: it has its own, and keeps them and this plan for as long as it lives.
  int32_t* counters_for(void* stream) {
    if (capturing(stream)) {
      auto owned = std::make_unique<Captured>(Captured{shared_from_this(), new_counters()});
      auto* counters = words(owned->counters);
      keep_for_graph(stream, owned.release(), &Captured::forget);
      return counters;
    }
    const std::lock_guard<std::mutex> lock(mutex);
    Memory& counters = by_stream[stream_id(stream)];
    if (!counters.data()) counters = new_counters();
    return words(counters);
  }
  bool counters_are_clean() const {  // on the host only
    for (auto& [stream, counters] : by_stream)
      for (size_t i = 0; i < counter_words(); ++i)
        if (words(counters)[i] != 0) return false;
    return true;
  }
  // Frees what graphs that are gone kept: their own end may not call the device.
  static void sweep() { Captured::sweep(); }

  const int device;
  const bool float64;
  const int ctas;
  int64_t scratch_bytes = 0;
  Common common;

 private:
  struct Captured {
    std::shared_ptr<Plan> plan;
    Memory counters;

    static void forget(void* object) {
      const std::lock_guard<std::mutex> lock(forgotten().mutex);
      forgotten().objects.emplace_back(static_cast<Captured*>(object));
    }
    static void sweep() {
      std::vector<std::unique_ptr<Captured>> gone;
      const std::lock_guard<std::mutex> lock(forgotten().mutex);
      gone.swap(forgotten().objects);
    }

   private:
    struct Forgotten {
      std::mutex mutex;
      std::vector<std::unique_ptr<Captured>> objects;
    };
    static Forgotten& forgotten() {  // never destroyed, as all plans
      static auto* all = new Forgotten;
      return *all;
    }
  };

  Memory memory;
  std::mutex mutex;
  std::map<uint64_t, Memory> by_stream;

  static int32_t* words(const Memory& m) { return reinterpret_cast<int32_t*>(m.data()); }
  size_t counter_words() const { return size_t(kFirstCounter + common.n_layers) * kCounterStride; }
  Memory new_counters() const { return Memory(nullptr, counter_words() * sizeof(int32_t), device); }
  template <class T>
  static size_t append(std::vector<char>* blob, const std::vector<T>& values) {
    const size_t at = size_t(line(int64_t(blob->size())));
    blob->resize(at + values.size() * sizeof(T));
    if (!values.empty()) std::memcpy(blob->data() + at, values.data(), values.size() * sizeof(T));
    return at;
  }
  // What the kernels take for granted.
  static void check(const Blueprint& b, bool backward, bool float64) {
    const auto require = [](bool good, const char* what) {
      if (!good) throw std::invalid_argument(std::string("srn_kernels: a plan with ") + what);
    };
    require(b.ctas > 0 && b.stream_slots > 0, "no CTA or slot");
    require(b.stream_slots + b.resident_slots <= kMaxSlots, "too many slots");
    require(b.slot_bytes % 128 == 0, "slots that are not aligned");
    for (const Record& r : b.records) {
      if (r.path == kDirect) continue;
      const int64_t pieces = round_up(r.slab_rows, r.piece_rows) / r.piece_rows * r.row_pieces;
      const int width = r.path == kScalars ? 1 : float64 ? 2 : 4;
      const int64_t units = r.columns / width, across = int64_t(r.group_warps) * kWarp;
      require(r.rows == 0 || r.inner == r.columns, "staged rows that are not contiguous");
      require(pieces <= kMaxPieces, "too many pieces in a slab");
      require(r.slab_rows <= kConsumers * 4, "too many rows in a slab");
      require(r.columns % width == 0 && r.piece_columns % width == 0,
              "vectors that do not fill a row");
      require(r.row_pieces == 1 || r.piece_rows == 1, "parts of several rows");
      require(r.group_warps >= 1 && r.group_warps <= kWarps, "groups of too many warps");
      const int64_t whole = backward ? r.piece_columns / width : units;
      const int64_t end = backward ? units - (r.row_pieces - 1) * whole : units;
      require(whole <= r.vectors * across && (r.vectors - 1) * across <= end && end > 0,
              "units that do not suit the threads");
      require(r.vectors <= kPartVectors || (!backward && r.row_pieces > 1),
              "more vectors than a panel has");
      require(backward || r.row_pieces == 1 ||
                  (r.row_pieces * kPartVectors == r.vectors && r.row_pieces <= b.stream_slots &&
                   r.piece_columns == kPartVectors * across * width),
              "parts that do not suit the threads");
    }
    for (const Tile& t : b.tiles)
      require(t.layer >= 0 && t.layer < int(b.records.size()), "a tile of no layer");
  }
};

}  // namespace srn::cuda
