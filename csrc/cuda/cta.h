// A CTA: the last warp produces (takes tickets, waits for counters, starts the copies into slots of
// shared memory), the others consume (all arithmetic). The producer runs ahead by up to kQueue
// tiles and as many bytes as the slots hold, so that copies are always in flight. Torch-free.
//
// Tickets make it safe for any number of CTAs: a tile waits only for tiles with smaller tickets,
// and a CTA works on its tickets in order, so the smallest unfinished one never waits.
//
// Beyond 400 lines: producer and consumer are two halves of one protocol, to be read together.
#pragma once

#include "device.h"

namespace srn::cuda {

// The slots of the stream in turn, and which fill of a slot it is: no division.
struct Cursor {
  uint32_t at;  // the slot, and above it the parity of the fill
  SRN_DEVICE int slot() const { return int(at & 0xffff); }
  SRN_DEVICE uint32_t parity() const { return at >> 16; }
  SRN_DEVICE void advance(const Common& c) {
    ++at;
    if (slot() == c.stream_slots) at = (at & 0x10000) ^ 0x10000;
  }
};

struct Control {
  Barrier full[kMaxSlots];   // a slot's copies have landed
  Barrier empty[kMaxSlots];  // all consumer warps are done with a slot
  Barrier entry_full[kQueue];
  Barrier entry_empty[kQueue];
  Entry queue[kQueue];
  ResidentSlab resident[kMaxSlots];  // the producer's; a ring
  int32_t before;                    // arrivals before this CTA's
  uint32_t parity[kWarps];           // of each consumer warp: which fill of a resident slot is next
  Cursor taken[kWarps], given[kWarps];  // and which slot of the stream it takes, gives back next
  int32_t done[kWarps];                 // and how many entries it has worked on
};

template <class A>
struct Shared {
  Control* control;
  A* parts;         // [kChunk][kWarps]: warps' shares of a few rows' dot products
  A* dots;          // [kWarps][kChunk]: the dot products of each group's rows
  A* sums;          // [kConsumers * 4]: of slabs; u of the rows of a tile
  double* doubles;  // [4 * kWarps]
  char* slots;

  static constexpr int64_t kBytes = line(sizeof(Control)) + 2 * line(kChunk * kWarps * sizeof(A)) +
                                    line(kConsumers * 4 * sizeof(A)) +
                                    line(4 * kWarps * sizeof(double));
  SRN_DEVICE static Shared carve(char* at) {
    Shared s;
    s.control = reinterpret_cast<Control*>(at);
    at += line(sizeof(Control));
    s.parts = reinterpret_cast<A*>(at);
    at += line(kChunk * kWarps * sizeof(A));
    s.dots = reinterpret_cast<A*>(at);
    at += line(kChunk * kWarps * sizeof(A));
    s.sums = reinterpret_cast<A*>(at);
    at += line(kConsumers * 4 * sizeof(A));
    s.doubles = reinterpret_cast<double*>(at);
    at += line(4 * kWarps * sizeof(double));
    s.slots = at;
    return s;
  }
};

// A layer's counter lies on its own line.
SRN_DEVICE int32_t* counter_of(const Common& c, int layer) {
  return c.counters + int64_t(kFirstCounter + layer) * kCounterStride;
}

SRN_DEVICE int take_ticket(const Common& c, int lane) {
  int ticket = 0;
  if (lane == 0) ticket = add_relaxed(c.counters + kTicket * kCounterStride, 1);
  return ticket;  // lane 0 has it; broadcast when it is needed, since it takes long to arrive
}

// Which rows and columns of its layer a piece is.
struct Piece {
  int row;
  int rows;
  int column;
  int columns;
};

SRN_DEVICE int slab_rows(const Record& r, int index) {
  const int left = r.rows - index * r.slab_rows;
  return left < r.slab_rows ? left : r.slab_rows;
}

SRN_DEVICE int pieces_of(const Record& r, int index) {
  if (r.path == kDirect) return 0;
  return (slab_rows(r, index) + r.piece_rows - 1) / r.piece_rows * r.row_pieces;
}

SRN_DEVICE Piece piece_of(const Record& r, int index, int k) {
  int block = k, part = 0;
  if (r.row_pieces > 1) {
    block = k / r.row_pieces;
    part = k - block * r.row_pieces;
  }
  const int first = block * r.piece_rows, left = slab_rows(r, index) - first;
  Piece p;
  p.row = index * r.slab_rows + first;
  p.rows = left < r.piece_rows ? left : r.piece_rows;
  p.column = part * r.piece_columns;
  p.columns = r.columns - p.column < r.piece_columns ? r.columns - p.column : r.piece_columns;
  return p;
}

// The j-th piece that is worked on. Where rows come in parts and nothing needs all of a row at a
// time, panel by panel: a thread's part of v changes rarely then.
SRN_DEVICE int panel_order(const Record& r, int pieces, int j) {
  if (r.row_pieces == 1) return j;
  const int rows = pieces / r.row_pieces, part = j / rows;
  return (j - part * rows) * r.row_pieces + part;
}

// The pieces of an entry that stay in shared memory.
SRN_DEVICE uint32_t kept_of(const Entry& e, int pieces) {
  uint32_t kept = 0;
#pragma unroll 1
  for (int k = 0; k < pieces; ++k) kept |= (e.where[k] >= 0 ? 1u : 0u) << k;
  return kept;
}

SRN_DEVICE uint32_t all_of(int pieces) { return pieces >= 32 ? ~0u : (1u << pieces) - 1; }

// Where in its slot a span starts: as far from a 16-byte line as in global memory.
SRN_DEVICE int shift_of(const char* source) { return int(uintptr_t(source) & 15); }

// Starts copying `bytes` from anywhere: whole lines asynchronously, the ends, at most 15 bytes
// each, by ordinary stores.
template <class Word>
SRN_DEVICE void fetch_span(Barrier* full, char* slot, const char* source, int bytes, int lane,
                           bool keep) {
  const int shift = shift_of(source);
  char* to = slot + shift;
  int head = (16 - shift) & 15;
  if (head > bytes) head = bytes;
  const int lines = (bytes - head) & ~15;
  const int tail = bytes - head - lines;
  const int words = head / int(sizeof(Word)), more = tail / int(sizeof(Word));
  if (lane < words + more) {
    const int at =
        lane < words ? lane * int(sizeof(Word)) : head + lines + (lane - words) * int(sizeof(Word));
    *reinterpret_cast<Word*>(to + at) = *reinterpret_cast<const Word*>(source + at);
  }
  if (lines > 0) fetch_lines(full, to + head, source + head, lines, lane, keep);
}

SRN_DEVICE void fetch_elements(Barrier* full, char* slot, const void* tensor, int type,
                               const Record& r, const Piece& p, int lane, bool keep) {
  const int64_t size = element_bytes(type);
  const char* source =
      static_cast<const char*>(tensor) + (int64_t(p.row) * r.columns + p.column) * size;
  const int bytes = int(p.rows * int64_t(p.columns) * size);
  if (size == 2)
    fetch_span<uint16_t>(full, slot, source, bytes, lane, keep);
  else
    fetch_span<uint32_t>(full, slot, source, bytes, lane, keep);
}

// The producer's loop. Direction::fetch starts the copies of one piece into one slot.
template <class Direction>
class Producer {
 public:
  SRN_DEVICE Producer(const Common& common, const typename Direction::Pointers* layers,
                      Control* control, char* slots)
      : c(common), layers(layers), control(control), slots(slots), lane(thread_index() % kWarp) {}

  SRN_DEVICE void run() {
    for (;;) {
      offer_residents(false);
      // Not ahead of need: a ticket that is held while its CTA waits delays those who wait for it.
      const int ticket = from_leader(take_ticket(c, lane));
      if (ticket >= c.n_tiles) break;
      prepare(c.tiles[ticket]);
    }
    offer_residents(true);
    claim_entry();
    if (lane == 0) entry()->op = kExit;
    publish();
  }

 private:
  const Common& c;
  const typename Direction::Pointers* layers;
  Control* control;
  char* slots;
  int lane;
  int entries = 0;  // published so far
  Cursor stream{0};
  bool wrapped = false;           // whether the stream came round: slots must be waited for
  uint32_t used = 0, parity = 0;  // resident slots: ever filled; parity of their next release
  int first_resident = 0, residents = 0;

  SRN_DEVICE Entry* entry() { return &control->queue[entries % kQueue]; }
  SRN_DEVICE void claim_entry() {
    if (entries >= kQueue)
      wait(&control->entry_empty[entries % kQueue], uint32_t(entries / kQueue - 1) & 1);
    sync_warp();
  }
  SRN_DEVICE void publish() {
    sync_warp();
    if (lane == 0) arrive(&control->entry_full[entries % kQueue]);
    ++entries;
  }

  SRN_DEVICE bool reached(int layer, int value) {
    int seen = 0;
    if (lane == 0) seen = load_acquire(counter_of(c, layer)) >= value;
    return from_leader(seen);
  }

  SRN_DEVICE void await(int layer, int value) {
    while (!reached(layer, value)) {
      offer_residents(false);
      pause();
    }
  }

  // Slabs that stayed in shared memory are rescaled as soon as their layer is finished.
  SRN_DEVICE void offer_residents(bool all) {
    while (residents > 0) {
      const ResidentSlab& s = control->resident[first_resident];
      const int layer = s.layer, until = s.wait;
      while (!reached(layer, until)) {
        if (!all) return;
        pause();
      }
      claim_entry();
      if (lane == 0) {
        Entry* e = entry();
        e->op = kResident;
        e->layer = layer;
        e->index = s.index;
        e->mask = s.mask;
      }
      entry()->where[lane] = s.where[lane];
      publish();
      first_resident = (first_resident + 1) % kMaxSlots;
      --residents;
    }
  }

  // A resident slot that is free, or -1.
  SRN_DEVICE int free_slot(uint32_t taken) {
    for (int i = 0; i < c.resident_slots; ++i) {
      const uint32_t bit = 1u << i;
      if (taken & bit) continue;
      if (!(used & bit)) return i;
      int free = 0;
      if (lane == 0) free = passed(&control->empty[c.stream_slots + i], (parity & bit) != 0);
      if (from_leader(free)) {
        parity ^= bit;
        used &= ~bit;
        return i;
      }
    }
    return -1;
  }

  SRN_DEVICE void prepare(const Tile& tile) {
    const Record& r = c.records[tile.layer];
    const int pieces = tile.op == kColumns ? 0 : pieces_of(r, tile.index);
    const bool slab = tile.op == kSlab;
    uint32_t mask = all_of(pieces);
    const Workspace<float> ws(r, c.scratch);  // flags lie where they do for any type
    if (tile.op != kSlab && tile.wait > 0) {
      await(tile.layer, tile.wait);
      if (tile.op == kRescale && pieces > 0) {
        int kept = 0;
        if (lane == 0) kept = int(load_shared_by_ctas(ws.flags + tile.index));
        mask &= ~uint32_t(from_leader(kept));
      }
      if (tile.op == kRescale && pieces > 0 && mask == 0) return;
    }
    // Keep what fits: its layer's last pass is the last time the slab would be read before.
    const int done = r.passes * r.arrivals;
    uint32_t kept = 0, taken = 0;
    int where = -1;  // of piece `lane`
    if (slab && tile.wait + r.arrivals == done && residents < kMaxSlots) {
      for (int k = 0; k < pieces; ++k) {
        const int slot = free_slot(taken);
        if (slot < 0) break;
        taken |= 1u << slot;
        kept |= 1u << k;
        if (lane == k) where = c.stream_slots + slot;
      }
    }
    claim_entry();
    Entry* e = entry();
    e->where[lane] = int8_t(where);
    if (lane == 0) {
      e->op = tile.op;
      e->layer = tile.layer;
      e->index = tile.index;
      e->mask = mask;
    }
    if (kept) {
      ResidentSlab& s = control->resident[(first_resident + residents) % kMaxSlots];
      s.where[lane] = int8_t(where);
      if (lane == 0) {
        s.layer = tile.layer;
        s.index = tile.index;
        s.wait = done;
        s.mask = kept;
      }
      ++residents;
    }
    // A slab of a later pass needs the v of the pass before, but its weight can be on its way.
    const bool early = slab && tile.wait > 0;
    if (!early) publish();
    bool waiting = early;
    const bool keep = slab && tile.index >= r.first_protected;
    const bool by_panel = Direction::kByPanel || !slab;
    for (int j = 0; j < pieces; ++j) {
      const int k = by_panel ? panel_order(r, pieces, j) : j;
      if (!(mask >> k & 1)) continue;
      int slot;
      if (kept >> k & 1) {
        slot = e_where(where, k);
        used |= 1u << (slot - c.stream_slots);
      } else {
        // Before a slot is waited for, what may free it must have been handed over.
        if (waiting && wrapped) {
          await_published(tile);
          waiting = false;
        }
        slot = stream.slot();
        if (wrapped) wait(&control->empty[slot], stream.parity() ^ 1);
        stream.advance(c);
        wrapped |= stream.slot() == 0;
      }
      sync_warp();
      Barrier* full = &control->full[slot];
      const bool again = keep && !(kept >> k & 1);  // L2 is asked for only what is read again
      Direction::fetch(r, layers[tile.layer], full, slots + int64_t(slot) * c.slot_bytes,
                       piece_of(r, tile.index, k), lane, again);
      fetch_started(full);
    }
    if (waiting) await_published(tile);
  }

  SRN_DEVICE int e_where(int where, int k) {
    // Only lane k knows; the others ask through the entry, which lane k wrote.
    sync_warp();
    return control->resident[(first_resident + residents - 1) % kMaxSlots].where[k];
  }

  SRN_DEVICE void await_published(const Tile& tile) {
    while (!reached(tile.layer, tile.wait)) pause();
    publish();
  }
};

// Consumer side: the entries and pieces that the producer hands over. Pieces are taken, and given
// back, in order.
class Consumer {
 public:
  SRN_DEVICE Consumer(const Common& common, Control* control, char* slots)
      : c(common), control(control), slots(slots) {}

  // The next entry. Which one is kept in shared memory: registers are full of v and t.
  SRN_DEVICE const Entry& entry() {
    const int n = control->done[thread_index() / kWarp];
    wait(&control->entry_full[n % kQueue], uint32_t(n / kQueue) & 1);
    return control->queue[n % kQueue];
  }
  SRN_DEVICE void finished() {
    sync_warp();
    if (thread_index() % kWarp == 0) {
      int32_t& done = control->done[thread_index() / kWarp];
      arrive(&control->entry_empty[done % kQueue]);
      ++done;
    }
    sync_warp();
  }

  // The slot of an entry's piece, its copies complete.
  SRN_DEVICE const char* take(const Entry& e, int k) {
    int slot = e.where[k];
    if (e.op == kResident) return slots + slot * c.slot_bytes;
    uint32_t parity;
    if (slot < 0) {
      Cursor& mine = control->taken[thread_index() / kWarp];
      const Cursor next = mine;
      slot = next.slot();
      parity = next.parity();
      sync_warp();
      if (thread_index() % kWarp == 0) mine.advance(c);
      sync_warp();
    } else {
      parity = control->parity[thread_index() / kWarp] >> (slot - c.stream_slots) & 1;
    }
    wait(&control->full[slot], parity);
    return slots + slot * c.slot_bytes;
  }
  // This warp is done with a piece; the last warp frees its slot. A slab's resident pieces stay.
  SRN_DEVICE void give_back(const Entry& e, int k) {
    sync_warp();
    if (thread_index() % kWarp == 0) {
      const int slot = e.where[k], warp = thread_index() / kWarp;
      if (slot < 0) {
        arrive(&control->empty[control->given[warp].slot()]);
        control->given[warp].advance(c);
      } else if (e.op == kResident) {
        arrive(&control->empty[slot]);
      } else {
        control->parity[warp] ^= 1u << (slot - c.stream_slots);
      }
    }
    sync_warp();
  }

 private:
  const Common& c;
  Control* control;
  char* slots;
};

SRN_DEVICE void set_up_barriers(const Common& c, Control* control) {
  if (thread_index() < kWarps) {
    control->parity[thread_index()] = 0;
    control->taken[thread_index()] = control->given[thread_index()] = {0};
    control->done[thread_index()] = 0;
  }
  if (thread_index() == 0) {
    for (int i = 0; i < c.stream_slots + c.resident_slots; ++i) {
      init(&control->full[i], kFetchArrivals);
      init(&control->empty[i], kWarps);
    }
    for (int i = 0; i < kQueue; ++i) {
      init(&control->entry_full[i], 1);
      init(&control->entry_empty[i], kWarps);
    }
    publish_barriers();
  }
  sync_all();
}

// The last CTA to leave cleans all counters for the next launch.
SRN_DEVICE void leave(const Common& c, Control* control) {
  const int tid = thread_index();
  sync_all();
  if (tid == 0) control->before = add_release_acquire(c.counters + kExits * kCounterStride, 1);
  sync_all();
  if (control->before != cta_count() - 1) return;
  for (int i = tid; i < kFirstCounter + c.n_layers; i += kThreads)
    c.counters[int64_t(i) * kCounterStride] = 0;
}

// Publishes what this CTA's consumers wrote; returns the layer's arrivals before.
SRN_DEVICE int arrive_at(const Common& c, Control* control, int layer) {
  sync_consumers();
  if (thread_index() == 0) control->before = add_release_acquire(counter_of(c, layer), 1);
  sync_consumers();
  return control->before;
}

// Sums over the consumers, in an order that depends on nothing but their number. Thread 0 gets it.
template <int N>
SRN_DEVICE void sum_over_consumers(double (&x)[N], double* shared) {
  const int tid = thread_index();
  sync_consumers();
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const double sum = warp_sum(x[i]);
    if (tid % kWarp == 0) shared[i * kWarps + tid / kWarp] = sum;
  }
  sync_consumers();
  if (tid >= kWarp) return;
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = warp_sum(tid < kWarps ? shared[i * kWarps + tid] : 0.0);
}

// All get it.
template <int N>
SRN_DEVICE void sum_for_consumers(double (&x)[N], double* shared) {
  sum_over_consumers(x, shared);
  sync_consumers();
  if (thread_index() == 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) shared[i] = x[i];
  }
  sync_consumers();
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = shared[i];
}

}  // namespace srn::cuda
