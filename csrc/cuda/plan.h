// What a launch is told: static tables in device memory, and the pointers that change from call to
// call by value in the kernel's parameters. Torch-free, for host and device.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../scalars.h"

namespace srn::cuda {

// How a layer's slabs are read.
enum Path : int32_t {
  kDirect = 0,   // from global memory, twice: any layout, any width
  kScalars = 1,  // staged in shared memory, an element at a time: odd rows, unaligned pointers
  kVectors = 2,  // staged, four elements at a time, of float64 two
};

enum Type : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

// The phases of schedule.py, and what the producer adds.
enum Op : int32_t { kSlab = 0, kColumns = 1, kRescale = 2, kResident = 3, kExit = 4 };

struct Tile {
  int32_t layer;
  int32_t op;
  int32_t index;
  int32_t wait;  // value that the layer's counter must have reached
};

// All that stays the same between calls, one for each layer. planning.py writes it; the layer's
// element (a, r, b) lies at (a * rows + r) * inner + b, and r is the matrix row.
struct Record {
  int64_t round;    // offset of u in the round's state
  int64_t scratch;  // offset of the layer's workspace, in bytes
  int32_t rows;
  int32_t columns;
  int32_t inner;
  int32_t column_of;  // where the layer's table of matrix columns starts among all tables, or -1
  int32_t slab_rows;
  int32_t slabs;
  int32_t column_width;
  int32_t column_tiles;
  int32_t arrivals;  // what a pass adds to the counter
  int32_t passes;
  int32_t iterations;
  int32_t stats_row;
  int32_t type;        // of the weight
  int32_t other_type;  // of W_hat; in backward of the gradient
  int32_t path;
  int32_t vectors;      // of columns of a thread: one of kVectorCounts
  int32_t group_warps;  // warps that share a row, or a part of one in backward
  int32_t piece_rows;   // what is staged at a time: rows, or one of row_pieces parts of one row
  int32_t row_pieces;
  int32_t piece_columns;
  int32_t other_offset;  // backward: of the gradient in a slot
  int32_t first_protected;
  int32_t gain_type;  // of the gain or its gradient, where there is one
  int32_t through;    // see Scaling
};

struct ForwardPointers {
  const void* weight;
  void* out;
  void* u;
  void* v;
  double target_rank;
  double eps;
  const void* gain;  // or nullptr
  double sigma_max;  // 0: none
};

struct BackwardPointers {
  const void* grad;
  const void* weight;
  void* grad_weight;
  void* grad_gain;  // or nullptr
};

// The part of the parameters that does not depend on the direction.
struct Common {
  const Record* records;
  const Tile* tiles;
  const int32_t* columns;  // the tables of matrix columns
  int32_t* counters;       // see kTicket
  char* scratch;
  void* round_state;
  LayerStats* stats;
  int32_t n_tiles;
  int32_t n_layers;
  int32_t slot_bytes;
  int32_t stream_slots;
  int32_t resident_slots;
};

// CUDA passes at most this much by value.
constexpr size_t kParameterBytes = 32764;

template <class Pointers, int kCapacity>
struct Parameters {
  Common common;
  Pointers layers[kCapacity];
};

template <class Pointers>
constexpr int capacity_of(size_t bytes) {
  return int((bytes - sizeof(Common)) / sizeof(Pointers));
}

// Most models fit the small block, and the host copies it with every launch.
template <class Pointers>
constexpr int kSmall = capacity_of<Pointers>(4096);
template <class Pointers>
constexpr int kLarge = capacity_of<Pointers>(kParameterBytes / 8 * 8);

static_assert(sizeof(ForwardPointers) == 64 && sizeof(BackwardPointers) == 32);
static_assert(sizeof(Parameters<ForwardPointers, kLarge<ForwardPointers>>) <= kParameterBytes);
static_assert(sizeof(Parameters<BackwardPointers, kLarge<BackwardPointers>>) <= kParameterBytes);
static_assert(sizeof(LayerStats) == kStatsColumns * sizeof(double));
static_assert(sizeof(Tile) == 16, "read as one vector");

constexpr int kWarp = 32;
#ifndef SRN_CONSUMER_WARPS     // fewer in tests on the host
#define SRN_CONSUMER_WARPS 15  // 16 warps in all leave each thread 128 registers
#endif
constexpr int kWarps = SRN_CONSUMER_WARPS;
constexpr int kConsumers = kWarps * kWarp;
constexpr int kThreads = kConsumers + kWarp;  // the last warp is the producer

constexpr int kMaxSlots = 16;
constexpr int kMaxPieces = 32;  // of a tile
constexpr int kQueue = 4;       // tiles that the producer may be ahead
constexpr int kChunk = 8;       // rows of a group between two pairs of barriers

// Record::vectors. Only a thread's last vector may lie beyond the row: see Own. More than
// kPartVectors are those of a row that comes in parts of so many.
constexpr int kVectorCounts[] = {1, 2, 3, 6, 9};
constexpr int kScalarCounts[] = {1, 3, 6};
constexpr int kPartVectors = 3;

// Elements that are moved together: 16 bytes of what a layer computes in.
template <class A>
constexpr int kVectorWidth = 16 / int(sizeof(A));

// Counters lie 128 bytes apart: tickets, CTAs that have left, then one for each layer.
constexpr int kCounterStride = 32;
constexpr int kTicket = 0, kExits = 1, kFirstCounter = 2;

// Products leave float32 for weights of 1e18: these are exact, and keep the squares of weights
// of 1e-11 among the normal numbers.
constexpr double kShrink = 0x1p-20, kShrinkSq = 0x1p-40, kGrowSq = 0x1p40;

SRN_HD constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
SRN_HD constexpr int64_t element_bytes(int32_t type) {
  return type == kFloat32 ? 4 : type == kFloat64 ? 8 : 2;
}
// Every array of the workspace starts a 128-byte line.
SRN_HD constexpr int64_t line(int64_t bytes) { return round_up(bytes, 128); }

// A layer's workspace. Forward: squares (a double a slab), flags (which pieces of a slab stay in
// shared memory), s, t and the slabs' shares of t. Backward: three scalars, flags, two doubles a
// slab.
template <class A>
struct Workspace {
  double* sums;
  uint32_t* flags;
  A* s;
  A* t;
  A* shares;
  int64_t pitch;

  SRN_HD static int64_t pitch_of(int64_t columns) {
    return line(columns * int64_t(sizeof(A))) / int64_t(sizeof(A));
  }
  SRN_HD Workspace(const Record& r, char* scratch) : pitch(pitch_of(r.columns)) {
    char* at = scratch + r.scratch;
    sums = reinterpret_cast<double*>(at);
    at += line((4 + 2 * int64_t(r.slabs)) * int64_t(sizeof(double)));
    flags = reinterpret_cast<uint32_t*>(at);
    at += line(r.slabs * int64_t(sizeof(uint32_t)));
    s = reinterpret_cast<A*>(at);
    at += line(r.rows * int64_t(sizeof(A)));
    t = reinterpret_cast<A*>(at);
    shares = t + pitch;
  }
  static int64_t bytes(const Record& r, bool backward) {
    int64_t n = line((4 + 2 * int64_t(r.slabs)) * int64_t(sizeof(double))) +
                line(r.slabs * int64_t(sizeof(uint32_t)));
    if (backward) return n;
    n += line(r.rows * int64_t(sizeof(A))) + pitch_of(r.columns) * int64_t(sizeof(A));
    return n + (r.iterations > 0 ? r.slabs * pitch_of(r.columns) * int64_t(sizeof(A)) : 0);
  }
};

// Shared memory of a CTA: control, sums, then the slots.
struct Entry {
  int32_t op;
  int32_t layer;
  int32_t index;
  uint32_t mask;             // the pieces to work on
  int8_t where[kMaxPieces];  // resident slot of a piece; -1: the next one of the stream
};
struct ResidentSlab {
  int32_t layer;
  int32_t index;
  int32_t wait;
  uint32_t mask;
  int8_t where[kMaxPieces];
};

}  // namespace srn::cuda
