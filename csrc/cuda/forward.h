// Forward of all layers: power iterations, statistics, and W_hat = a W + b u v^T. Torch-free.
//
// A slab's rows give their part of s = W v and, from the same bytes in shared memory, the slab's
// share of t = W^T s and of |W|_F^2. Column tiles add the shares in fixed order; whoever brings the
// layer's counter to the end of a pass finishes it: sigma = |t| / |s|, u, v, and the statistics.
#pragma once

#include "elements.h"

namespace srn::cuda {

struct ForwardDirection {
  using Pointers = ForwardPointers;
  SRN_DEVICE static void fetch(const Record& r, const Pointers& p, Barrier* full, char* slot,
                               const Piece& piece, int lane, bool keep) {
    fetch_elements(full, slot, p.weight, r.type, r, piece, lane, keep);
  }
};

template <class A>
class Forward;

// One staged slab; see Forward::staged.
template <class A, class E, int kWidth, int kVectors>
SRN_DEVICE void staged_slab(const Common* c, const ForwardPointers* layers, const Entry* e) {
  Forward<A>(*c, layers).template staged<E, kWidth, kVectors>(*e);
}

template <class A>
class Forward {
 public:
  SRN_DEVICE Forward(const Common& common, const ForwardPointers* layers)
      : c(common),
        layers(layers),
        sh(Shared<A>::carve(c, shared_memory())),
        consumer(c, sh.control, sh.slots),
        tid(thread_index()),
        lane(tid % kWarp),
        warp(tid / kWarp) {}

  SRN_DEVICE void run(const Entry& e) {
    const Record& r = c.records[e.layer];
    const ForwardPointers& p = layers[e.layer];
    if (e.op == kRescale || e.op == kResident) {
      rescale(e, r, p);
      return;
    }
    if (e.op == kColumns)
      add_shares(r, Workspace<A>(r, c.scratch), e.index * r.column_width,
                 (e.index + 1) * r.column_width);
    else
      slab(e, r, p);
    const int before = arrive_at(c, sh.control, e.layer);
    const Workspace<A> ws(r, c.scratch);  // not before: it would hold registers all through a slab
    const int arrivals = r.arrivals;
    if (before % arrivals != arrivals - 2) return;
    if (r.column_tiles == 0 && r.iterations > 0) {
      add_shares(r, ws, 0, r.columns);
      sync_consumers();
    }
    finish_pass(r, p, ws, before / arrivals + 1 >= r.iterations);
    arrive_at(c, sh.control, e.layer);
  }

 private:
  const Common& c;
  const ForwardPointers* layers;
  const Shared<A> sh;
  Consumer consumer;
  const int tid, lane, warp;

  // Whether v is the stored one, not that of the pass before, which is in memory order.
  SRN_DEVICE bool first_pass(const Record& r) const {
    return r.iterations <= 1 || load_acquire(counter_of(c, int(&r - c.records))) < r.arrivals;
  }

  SRN_DEVICE void slab(const Entry& e, const Record& r, const ForwardPointers& p) {
    if constexpr (sizeof(A) == 4) {
      if (r.path == kScalars) return staged_slab<A, Any, 1, kScalarVectors>(&c, layers, &e);
      if (r.path == kVectors) {
        if (r.type == kFloat32) return staged_as<float>(e, r);
        if (r.type == kBFloat16) return staged_as<bfloat16>(e, r);
        return staged_as<float16>(e, r);
      }
    }
    direct(e, r, p, Workspace<A>(r, c.scratch), first_pass(r));
  }

  template <class E>
  SRN_DEVICE void staged_as(const Entry& e, const Record& r) {
    if (r.vectors == kFewVectors) return staged_slab<A, E, 4, kFewVectors>(&c, layers, &e);
    staged_slab<A, E, 4, kManyVectors>(&c, layers, &e);
  }

 public:
  // Groups of warps take a row each; a thread has kVectors vectors of kWidth columns of it, and
  // keeps their v and t in registers.
  template <class E, int kWidth, int kVectors>
  SRN_DEVICE void staged(const Entry& e) {
    const Record& r = c.records[e.layer];
    const ForwardPointers& p = layers[e.layer];
    const Workspace<A> ws(r, c.scratch);
    const bool first = first_pass(r);
    constexpr int kBatch = kVectors == kFewVectors ? 4
                           : kVectors == kScalarVectors
                               ? 2
                               : 1;  // rows of a group between two barriers
    const int columns = r.columns, units = columns / kWidth;
    const int group_warps = r.group_warps, groups = kWarps / group_warps;
    const int group = warp / group_warps, across = group_warps * kWarp;
    const int mine = group < groups ? tid - group * across : units;
    const bool iterate = r.iterations > 0;

    // Few vectors of v stay in registers, many in shared memory.
    constexpr bool kInRegisters = kVectors != kManyVectors;
    A v[kInRegisters ? kVectors : 1][kWidth], t[kVectors][kWidth] = {};
    const A* source = first ? static_cast<const A*>(p.v) : ws.t;
    const int32_t* table = first && r.column_of >= 0 ? c.columns + r.column_of : nullptr;
    const auto v_at = [&](int j) { return load_shared_by_ctas(source + (table ? table[j] : j)); };
    if constexpr (kInRegisters) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int unit = mine + i * across;
#pragma unroll
        for (int k = 0; k < kWidth; ++k) v[i][k] = unit < units ? v_at(unit * kWidth + k) : A(0);
      }
    } else {
#pragma unroll 4
      for (int j = tid; j < columns; j += kConsumers) sh.v[j] = v_at(j);
      sync_consumers();
    }

    double squares[1] = {0};
    int turn = 0;
    const int pieces = pieces_of(r, e.index);
    for (int piece = 0; piece < pieces; ++piece) {
      const Piece part = piece_of(r, e.index, piece);
      const char* begin =
          static_cast<const char*>(p.weight) + int64_t(part.row) * columns * element_bytes(r.type);
      const char* data = consumer.take(e, piece) + shift_of(begin);
      A f = 0;
      for (int from = 0; from < part.rows; from += groups * kBatch) {
        A dot[kBatch];
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          dot[b] = 0;
          const int row = from + b * groups + group;
          if (row >= part.rows) continue;
#pragma unroll
          for (int i = 0; i < kVectors; ++i) {
            const int unit = mine + i * across;
            if (unit >= units) continue;
            A w[kWidth];
            load_as<E>(data, r.type, row * columns + unit * kWidth, w);
            A x[kWidth];
            if constexpr (kInRegisters) {
#pragma unroll
              for (int k = 0; k < kWidth; ++k) x[k] = v[i][k];
            } else {
              load<A>(sh.v, unit * kWidth, x);
            }
#pragma unroll
            for (int k = 0; k < kWidth; ++k) {
              dot[b] += w[k] * x[k];
              const A small = w[k] * A(kShrink);
              f += small * small;
            }
          }
        }
#pragma unroll
        for (int b = 0; b < kBatch; ++b) dot[b] = warp_sum(dot[b]);
        if (group_warps > 1) {
          A* parts = sh.parts + turn * Shared<A>::kPartRows * kWarps;
          if (lane == 0) {
#pragma unroll
            for (int b = 0; b < kBatch; ++b) parts[b * kWarps + warp] = dot[b];
          }
          sync_consumers();
          turn ^= 1;  // the next batch writes elsewhere: no second barrier
          if (group < groups) {
#pragma unroll
            for (int b = 0; b < kBatch; ++b) {
              dot[b] = 0;
#pragma unroll 2
              for (int i = 0; i < group_warps; ++i)
                dot[b] += parts[b * kWarps + group * group_warps + i];
            }
          }
        }
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          const int row = from + b * groups + group;
          if (row >= part.rows || group >= groups) continue;
          if (mine == 0) ws.s[part.row + row] = dot[b];
          if (!iterate) continue;
          const A s = dot[b] * A(kShrinkSq);
#pragma unroll
          for (int i = 0; i < kVectors; ++i) {
            const int unit = mine + i * across;
            if (unit >= units) continue;
            A w[kWidth];
            load_as<E>(data, r.type, row * columns + unit * kWidth, w);
#pragma unroll
            for (int k = 0; k < kWidth; ++k) t[i][k] += w[k] * s;
          }
        }
      }
      squares[0] += double(f);
      consumer.give_back(e, piece);
    }

    sum_over_consumers(squares, sh.doubles);
    if (tid == 0) finish_slab(e, pieces, ws, squares[0]);
    if (!iterate) return;
    A* share = ws.shares + int64_t(e.index) * ws.pitch;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int unit = mine + i * across;
      if (groups > 1) {
        sync_consumers();
#pragma unroll
        for (int k = 0; k < kWidth; ++k) sh.sums[k * kConsumers + tid] = t[i][k];
        sync_consumers();
      }
      if (group > 0 || unit >= units) continue;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        A sum = t[i][k];
#pragma unroll 1
        for (int g = 1; g < groups; ++g) sum += sh.sums[k * kConsumers + tid + g * across];
        share[unit * kWidth + k] = sum;
      }
    }
  }

 private:
  // The slab's |W|_F^2, and which of its pieces this CTA keeps.
  SRN_DEVICE void finish_slab(const Entry& e, int pieces, const Workspace<A>& ws, double squares) {
    ws.sums[e.index] = squares;
    ws.flags[e.index] = kept_of(e, pieces);
  }

  // Any layout and width: the slab is read from memory for s, and again from L2 for t.
  SRN_DEVICE void direct(const Entry& e, const Record& r, const ForwardPointers& p,
                         const Workspace<A>& ws, bool first) {
    const int begin = e.index * r.slab_rows, n = slab_rows(r, e.index);
    double squares[1] = {0};
    if (r.inner >= kWarp || n * r.inner > kConsumers) {
      // A warp takes a row: neighbouring lanes have neighbouring elements.
      for (int row = warp; row < n; row += kWarps) {
        A dot = 0, f = 0;
        for (int j = lane; j < r.columns; j += kWarp)
          accumulate(r, p, ws, first, begin + row, j, dot, f);
        dot = warp_sum(dot);
        squares[0] += double(f);
        if (lane == 0) ws.s[begin + row] = dot;
      }
    } else {
      // Rows are close together in memory: lanes go along them, then along the columns.
      const int span = n * r.inner, across = kConsumers / span;
      const int p_in = tid % span, first_a = tid / span;
      A dot = 0, f = 0;
      if (first_a < across) {
        const int outer = r.columns / r.inner;
        for (int a = first_a; a < outer; a += across)
          accumulate(r, p, ws, first, begin + p_in / r.inner, a * r.inner + p_in % r.inner, dot, f);
      }
      squares[0] += double(f);
      sync_consumers();
      sh.sums[tid] = dot;
      sync_consumers();
      if (tid < n) {
        A sum = 0;
        for (int a = 0; a < across; ++a)
#pragma unroll 1
          for (int b = 0; b < r.inner; ++b) sum += sh.sums[a * span + tid * r.inner + b];
        ws.s[begin + tid] = sum;
      }
    }
    sum_over_consumers(squares, sh.doubles);  // a barrier too: s is complete
    if (tid == 0) finish_slab(e, 0, ws, squares[0]);
    if (r.iterations <= 0) return;
    A* share = ws.shares + int64_t(e.index) * ws.pitch;
    for (int j = tid; j < r.columns; j += kConsumers) {
      A t = 0;
      const int64_t at = offset_of(r, begin, j);
      for (int row = 0; row < n; ++row) {
        A w[1];
        load_any(p.weight, r.type, at + int64_t(row) * r.inner, w);
        t += w[0] * (ws.s[begin + row] * A(kShrinkSq));
      }
      share[j] = t;
    }
  }

  SRN_DEVICE void accumulate(const Record& r, const ForwardPointers& p, const Workspace<A>& ws,
                             bool first, int row, int column, A& dot, A& f) {
    A w[1];
    load_any(p.weight, r.type, offset_of(r, row, column), w);
    const A v = first ? static_cast<const A*>(p.v)[matrix_column(c, r, column)]
                      : load_shared_by_ctas(ws.t + column);
    dot += w[0] * v;
    const A small = w[0] * A(kShrink);
    f += small * small;
  }

  // t = W^T s of some columns: the slabs' shares, added in fixed order.
  SRN_DEVICE void add_shares(const Record& r, const Workspace<A>& ws, int begin, int end) {
    constexpr int kDown = kWarps % 5 == 0 ? 5 : 2, kAcross = kConsumers / kDown;
    if (end > r.columns) end = r.columns;
    const int down = tid / kAcross, across = tid % kAcross;
    for (int from = begin; from < end; from += kAcross) {
      const int j = from + across;
      A sum = 0;
      if (j < end) {
#pragma unroll 4
        for (int k = down; k < r.slabs; k += kDown)
          sum += load_shared_by_ctas(ws.shares + int64_t(k) * ws.pitch + j);
      }
      sync_consumers();
      sh.sums[tid] = sum;
      sync_consumers();
      if (down == 0 && j < end) {
        double total = 0;
        for (int d = 0; d < kDown; ++d) total += double(sh.sums[d * kAcross + across]);
        ws.t[j] = A(total);
      }
    }
  }

  // sigma, then u and v; after the last pass the statistics and the state too.
  SRN_DEVICE void finish_pass(const Record& r, const ForwardPointers& p, const Workspace<A>& ws,
                              bool last) {
    const bool iterate = r.iterations > 0;
    A* u_state = static_cast<A*>(p.u);
    A* v_state = static_cast<A*>(p.v);
    // Training: u ~ s, v ~ t, sigma = |t| / |s|. Evaluation: u and v as stored, sigma = u^T s.
    double x[4] = {0, 0, 0, 0};  // u.s, |u|^2, |v|^2, |W|_F^2
#pragma unroll 4
    for (int i = tid; i < r.rows; i += kConsumers) {
      const double s = load_shared_by_ctas(ws.s + i), u = iterate ? s : double(u_state[i]);
      x[0] += u * s;
      x[1] += u * u;
    }
#pragma unroll 4
    for (int j = tid; j < r.columns; j += kConsumers) {
      const double v =
          iterate ? double(load_shared_by_ctas(ws.t + j)) : double(v_state[matrix_column(c, r, j)]);
      x[2] += v * v;
    }
    for (int k = tid; k < r.slabs; k += kConsumers) x[3] += load_shared_by_ctas(ws.sums + k);
    sum_over_consumers(x, sh.doubles);
    double u_norm = sqrt(x[1]), v_norm = sqrt(x[2]), sigma;
    if (iterate) {
      sigma = u_norm > 0 ? v_norm / u_norm * kGrowSq : u_norm;
    } else {
      sigma = x[0] / u_norm / v_norm;
    }
    if (!last) {
      // t = 0 (a zero weight) stays 0, so that the next sigma is 0 and not NaN.
      if (v_norm == 0) v_norm = 1;
      for (int j = tid; j < r.columns; j += kConsumers)
        ws.t[j] = A(double(load_shared_by_ctas(ws.t + j)) / v_norm);
      return;
    }
    const LayerStats stats = forward_scalars(sigma, x[3] * kGrowSq, p.target_rank, p.eps);
    if (tid == 0) c.stats[r.stats_row] = stats;
    // A zero or non-finite weight leaves the state as it was, so that training can go on.
    const bool keep = iterate && int(stats.branch) >= kPassThrough;
    A* u_out = round_u<A>(c, r);
    A* v_out = round_v<A>(c, r);
    for (int i = tid; i < r.rows; i += kConsumers) {
      const double u = iterate ? double(load_shared_by_ctas(ws.s + i)) : double(u_state[i]);
      const A unit = keep ? u_state[i] : A(u / u_norm);
      u_out[i] = unit;
      if (iterate && !keep) u_state[i] = unit;
    }
    for (int k = tid; k < r.columns; k += kConsumers) {
      const int64_t j = matrix_column(c, r, k);
      const double v = iterate ? double(load_shared_by_ctas(ws.t + k)) : double(v_state[j]);
      const A unit = keep ? v_state[j] : A(v / v_norm);
      v_out[j] = unit;
      if (iterate && !keep) v_state[j] = unit;
    }
  }

  // W_hat = a W + b u v^T, from the slab's pieces or, for other layouts, from memory.
  SRN_DEVICE void rescale(const Entry& e, const Record& r, const ForwardPointers& p) {
    const A a = A(load_shared_by_ctas(&c.stats[r.stats_row].a));
    const A b = A(load_shared_by_ctas(&c.stats[r.stats_row].b));
    const A* u = round_u<A>(c, r);
    const A* v = round_v<A>(c, r);
    if (r.path == kDirect) {
      for_each_in_slab(r, e.index, [&](int64_t at, int row, int column) {
        A w[1], x[1];
        load_any(p.weight, r.type, at, w);
        load_v(c, r, v, column, x);
        x[0] = a * w[0] + load_shared_by_ctas(u + row) * (b * x[0]);
        store_any(p.out, r.other_type, at, x);
      });
      return;
    }
    if (r.path == kVectors)
      rescale_staged<4>(e, r, p, a, b, u, v);
    else
      rescale_staged<1>(e, r, p, a, b, u, v);
  }

  template <int kWidth>
  SRN_DEVICE void rescale_staged(const Entry& e, const Record& r, const ForwardPointers& p, A a,
                                 A b, const A* u, const A* v) {
    const int columns = r.columns, units = columns / kWidth;
    const Grid grid(units);
    const int64_t size = element_bytes(r.type);
    A kept_v[kWidth];  // of the only unit, if there is one: then it is loaded once
    if (units <= kConsumers && grid.first < units) load_v(c, r, v, grid.first * kWidth, kept_v);
    const int pieces = pieces_of(r, e.index);
    for (int k = 0; k < pieces; ++k) {
      if (!(e.mask >> k & 1)) continue;
      const Piece part = piece_of(r, e.index, k);
      const char* begin = static_cast<const char*>(p.weight) + int64_t(part.row) * columns * size;
      const char* data = consumer.take(e, k) + shift_of(begin);
      for (int unit = grid.first; unit < units; unit += grid.step) {
        A x[kWidth];
        if (units <= kConsumers) {
#pragma unroll
          for (int i = 0; i < kWidth; ++i) x[i] = b * kept_v[i];
        } else {
          load_v(c, r, v, unit * kWidth, x);
#pragma unroll
          for (int i = 0; i < kWidth; ++i) x[i] *= b;
        }
        for (int row = grid.row; row < part.rows; row += grid.rows) {
          A w[kWidth], y[kWidth];
          load_any(data, r.type, row * columns + unit * kWidth, w);
          const A left = load_shared_by_ctas(u + part.row + row);
#pragma unroll
          for (int i = 0; i < kWidth; ++i) y[i] = a * w[i] + left * x[i];
          store_any(p.out, r.other_type, int64_t(part.row + row) * columns + unit * kWidth, y);
        }
        if (units <= kConsumers) break;
      }
      consumer.give_back(e, k);
    }
  }
};

}  // namespace srn::cuda
