// Backward of all layers, u and v held constant: slabs gather <G, W> and u^T G v, rescale tiles
// write dL/dW = scale (G + weight W + outer u v^T). Torch-free.
#pragma once

#include "elements.h"

namespace srn::cuda {

struct BackwardDirection {
  using Pointers = BackwardPointers;
  SRN_DEVICE static void fetch(const Record& r, const Pointers& p, Barrier* full, char* slot,
                               const Piece& piece, int lane, bool keep) {
    fetch_elements(full, slot, p.weight, r.type, r, piece, lane, keep);
    fetch_elements(full, slot + r.other_offset, p.grad, r.other_type, r, piece, lane, keep);
  }
};

template <class A>
class Backward {
 public:
  SRN_DEVICE Backward(const Common& common, const BackwardPointers* layers)
      : c(common),
        layers(layers),
        sh(Shared<A>::carve(c, shared_memory())),
        consumer(c, sh.control, sh.slots),
        tid(thread_index()) {}

  SRN_DEVICE void run(const Entry& e) {
    const Record& r = c.records[e.layer];
    const BackwardPointers& p = layers[e.layer];
    const Workspace<A> ws(r, c.scratch);
    if (e.op != kSlab) {
      const A scale = A(load_shared_by_ctas(ws.sums));
      const A weight = A(load_shared_by_ctas(ws.sums + 1));
      const A outer = A(load_shared_by_ctas(ws.sums + 2));
      for_each(e, r, p,
               [&](auto width, const auto& g, const auto& w, A u, const auto& v, int64_t at) {
                 constexpr int kWidth = decltype(width)::kValue;
                 A x[kWidth];
#pragma unroll
                 for (int i = 0; i < kWidth; ++i)
                   x[i] = scale * (g[i] + weight * w[i] + outer * (u * v[i]));
                 store_any(p.grad_weight, r.type, at, x);
               });
      return;
    }
    double sums[2] = {0, 0};
    A g_w = 0, g_e = 0;
    int added = 0;
    for_each(e, r, p, [&](auto width, const auto& g, const auto& w, A u, const auto& v, int64_t) {
      constexpr int kWidth = decltype(width)::kValue;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        g_w += g[i] * w[i];
        g_e += g[i] * (u * v[i]);
      }
      if (++added % 32 == 0) {  // short sums in A, long ones in float64
        sums[0] += double(g_w);
        sums[1] += double(g_e);
        g_w = g_e = 0;
      }
    });
    sums[0] += double(g_w);
    sums[1] += double(g_e);
    sum_over_consumers(sums, sh.doubles);
    if (tid == 0) {
      ws.flags[e.index] = kept_of(e, pieces_of(r, e.index));
      ws.sums[4 + 2 * e.index] = sums[0];
      ws.sums[5 + 2 * e.index] = sums[1];
    }
    if (arrive_at(c, sh.control, e.layer) != r.slabs - 1) return;
    finish(r, ws);
    arrive_at(c, sh.control, e.layer);
  }

 private:
  const Common& c;
  const BackwardPointers* layers;
  const Shared<A> sh;
  Consumer consumer;
  const int tid;

  template <int N>
  struct Width {
    static constexpr int kValue = N;
  };

  SRN_DEVICE void finish(const Record& r, const Workspace<A>& ws) {
    double x[2] = {0, 0};
    for (int k = tid; k < r.slabs; k += kConsumers) {
      x[0] += load_shared_by_ctas(ws.sums + 4 + 2 * k);
      x[1] += load_shared_by_ctas(ws.sums + 5 + 2 * k);
    }
    sum_over_consumers(x, sh.doubles);
    if (tid > 0) return;
    const BackwardScalars scalars = backward_scalars(c.stats[r.stats_row], x[0], x[1]);
    ws.sums[0] = scalars.scale;
    ws.sums[1] = scalars.weight;
    ws.sums[2] = scalars.outer;
  }

  // f(width, G, W, u, v, element) over the entry's part of the slab.
  template <class F>
  SRN_DEVICE void for_each(const Entry& e, const Record& r, const BackwardPointers& p, F&& f) {
    const A* u = round_u<A>(c, r);
    const A* v = round_v<A>(c, r);
    if (r.path == kDirect) {
      for_each_in_slab(r, e.index, [&](int64_t at, int row, int column) {
        A g[1], w[1], x[1];
        load_any(p.grad, r.other_type, at, g);
        load_any(p.weight, r.type, at, w);
        load_v(c, r, v, column, x);
        f(Width<1>(), g, w, u[row], x, at);
      });
    } else if (r.path == kVectors) {
      for_each_staged<4>(e, r, p, u, v, f);
    } else {
      for_each_staged<1>(e, r, p, u, v, f);
    }
  }

  template <int kWidth, class F>
  SRN_DEVICE void for_each_staged(const Entry& e, const Record& r, const BackwardPointers& p,
                                  const A* u, const A* v, F&& f) {
    const int pieces = pieces_of(r, e.index);
    const bool whole = r.row_pieces == 1 && r.columns / kWidth <= kConsumers;
    A kept_v[kWidth];
    if (whole) {
      const Grid grid(r.columns / kWidth);
      if (grid.first < r.columns / kWidth) load_v(c, r, v, grid.first * kWidth, kept_v);
    }
    for (int k = 0; k < pieces; ++k) {
      if (!(e.mask >> k & 1)) continue;
      const Piece part = piece_of(r, e.index, k);
      const int64_t first = int64_t(part.row) * r.columns + part.column;
      const int units = part.columns / kWidth;
      const Grid grid(units);
      const char* slot = consumer.take(e, k);
      const char* weight =
          slot + shift_of(static_cast<const char*>(p.weight) + first * element_bytes(r.type));
      const char* grad =
          slot + r.other_offset +
          shift_of(static_cast<const char*>(p.grad) + first * element_bytes(r.other_type));
      for (int unit = grid.first; unit < units; unit += grid.step) {
        A x[kWidth];
        if (whole) {
#pragma unroll
          for (int i = 0; i < kWidth; ++i) x[i] = kept_v[i];
        } else {
          load_v(c, r, v, part.column + unit * kWidth, x);
        }
        for (int row = grid.row; row < part.rows; row += grid.rows) {
          const int at = row * part.columns + unit * kWidth;
          A g[kWidth], w[kWidth];
          load_any(grad, r.other_type, at, g);
          load_any(weight, r.type, at, w);
          f(Width<kWidth>(), g, w, u[part.row + row], x, first + at);
        }
        if (whole) break;
      }
      consumer.give_back(e, k);
    }
  }
};

}  // namespace srn::cuda
