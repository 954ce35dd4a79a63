// Backward of all layers, u and v held constant: slabs gather <G, W> and u^T G v, rescale tiles
// write dL/dW = scale (G + weight W) + outer u v^T. Torch-free.
#pragma once

#include "elements.h"

namespace srn::cuda {

struct BackwardDirection {
  using Pointers = BackwardPointers;
  static constexpr bool kByPanel = true;  // slabs too
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
        sh(Shared<A>::carve(shared_memory())),
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
      for_each(e, r, p, outer, Write{scale, weight});
      return;
    }
    Gather gather;
    for_each(e, r, p, A(1), gather);
    sum_over_consumers(gather.sums, sh.doubles);
    if (tid == 0) {
      ws.flags[e.index] = kept_of(e, pieces_of(r, e.index));
      ws.sums[4 + 2 * e.index] = gather.sums[0];
      ws.sums[5 + 2 * e.index] = gather.sums[1];
    }
    if (arrive_at(c, sh.control, e.layer) != r.slabs - 1) return;
    finish(r, p, ws);
    arrive_at(c, sh.control, e.layer);
  }

 private:
  const Common& c;
  const BackwardPointers* layers;
  const Shared<A> sh;
  Consumer consumer;
  const int tid;

  // What is done with some neighbours of G and W: x[] = G, and for Write the gradient to store.
  struct Write {
    static constexpr bool kStores = true;
    A scale, weight;
    template <int kWidth>
    SRN_DEVICE void operator()(A (&x)[kWidth], const A (&w)[kWidth], A u, const A (&v)[kWidth],
                               bool) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) x[i] = scale * (x[i] + weight * w[i]) + u * v[i];
    }
    SRN_DEVICE void flush() {}
  };
  struct Gather {
    static constexpr bool kStores = false;
    double sums[2] = {0, 0};  // <G, W> and u^T G v: short sums in A, long ones in float64
    A g_w = 0, g_e = 0;
    template <int kWidth>
    SRN_DEVICE void operator()(A (&g)[kWidth], const A (&w)[kWidth], A u, const A (&v)[kWidth],
                               bool counts) {
      A with_w = 0, with_v = 0;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        with_w += g[i] * w[i];
        with_v += g[i] * v[i];
      }
      g_w += counts ? with_w : A(0);
      g_e += counts ? u * with_v : A(0);
    }
    SRN_DEVICE void flush() {
      sums[0] += double(g_w);
      sums[1] += double(g_e);
      g_w = g_e = 0;
    }
  };

  SRN_DEVICE void finish(const Record& r, const BackwardPointers& p, const Workspace<A>& ws) {
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
    if (p.grad_gain) {
      const double gain[1] = {scalars.gain};
      store_any(p.grad_gain, r.gain_type, 0, gain);
    }
  }

  // What `work` does, over the entry's part of the slab; u comes times `factor`.
  template <class Work>
  SRN_DEVICE void for_each(const Entry& e, const Record& r, const BackwardPointers& p, A factor,
                           Work&& work) {
    if (r.path != kDirect) stage_u(c, r, e.index, factor, sh.sums);
    if (!with_panel<A>(r, [&](auto panel) { staged<decltype(panel)>(e, r, p, work); })) {
      const A* u = round_u<A>(c, r);
      const A* v = round_v<A>(c, r);
      int added = 0;
      for_each_in_slab(r, e.index, [&](int64_t at, int row, int column) {
        A g[1], w[1];
        const A x[1] = {load_shared_by_ctas(v + matrix_column(c, r, column))};
        load_any(p.grad, r.other_type, at, g);
        load_any(p.weight, r.type, at, w);
        work(g, w, factor * load_shared_by_ctas(u + row), x, true);
        if constexpr (std::remove_reference_t<Work>::kStores)
          store_any(p.grad_weight, r.type, at, g);
        else if (++added % 32 == 0)
          work.flush();
      });
      work.flush();
    }
  }

  // u of the slab's rows lies in shared memory, a thread's part of v of a panel in registers.
  template <class P, class Work>
  SRN_DEVICE void staged(const Entry& e, const Record& r, const BackwardPointers& p, Work& work) {
    using E = typename P::Weight;
    using O = typename P::Other;
    constexpr int kWidth = P::kWidth, kVectors = P::kVectors;
    constexpr int kRows = kRowsInFlight<E>;
    const int columns = r.columns, type = r.type, other = r.other_type, offset = r.other_offset;
    const int size = bytes_of<E>(type), grad_size = bytes_of<O>(other);
    const int begin = e.index * r.slab_rows;
    const int pieces = pieces_of(r, e.index), in_panel = pieces / r.row_pieces;
    const auto *weights = static_cast<const char*>(p.weight),
               *grads = static_cast<const char*>(p.grad);
    char* out = static_cast<char*>(p.grad_weight);
    for (int j = 0; j < pieces;) {
      const int panel_end = j + in_panel;
      Piece where = piece_of(r, e.index, panel_order(r, pieces, j));
      const Own<kWidth, kVectors> own(r, where.columns / kWidth);
      const int groups = own.groups, pitch = where.columns;  // of a piece in its slot
      A v[kVectors][kWidth];
      load_own_of_round(c, r, own, where.column, v);
      int next = own.active() ? begin + own.group : r.rows;
      for (; j < panel_end; ++j) {
        const int piece = panel_order(r, pieces, j);
        where = piece_of(r, e.index, piece);
        const int end = where.row + where.rows;
        if (!(e.mask >> piece & 1)) {
          while (next < end) next += groups;
          continue;
        }
        const char* slot = consumer.take(e, piece);
        const int64_t first = int64_t(where.row) * columns + where.column;
        const char* weight = slot + shift_of(weights + first * size);
        const char* grad = slot + offset + shift_of(grads + first * grad_size);
        const int step = groups * pitch;
        const int64_t out_step = int64_t(groups) * columns * size;
        weight += (next - where.row) * pitch * size;
        grad += (next - where.row) * pitch * grad_size;
        char* to = out + (int64_t(next) * columns + where.column) * size;
        const A* left = sh.sums + (next - begin);
#pragma unroll 1
        for (int row = next; row < end; row += kRows * groups) {
          const bool more = row + groups < end;
          A g[kRows][kVectors][kWidth];
#pragma unroll
          for (int b = 0; b < kRows; ++b) {
            const int at = b == 0 || !more ? 0 : step;
            const A factor = left[b == 0 || !more ? 0 : groups];
#pragma unroll
            for (int i = 0; i < kVectors; ++i) {
              A w[kWidth];
              load_as<O>(grad + (at + own.unit(i) * kWidth) * grad_size, other, 0, g[b][i]);
              load_as<E>(weight + (at + own.unit(i) * kWidth) * size, type, 0, w);
              work(g[b][i], w, factor, v[i], (b == 0 || more) && own.has(i));
            }
          }
          if constexpr (Work::kStores) {
#pragma unroll
            for (int b = 0; b < kRows; ++b) {
#pragma unroll
              for (int i = 0; i < kVectors; ++i)
                if ((b == 0 || more) && own.has(i))
                  store_as<E>(to + b * out_step + own.unit(i) * kWidth * size, type, 0, g[b][i]);
            }
          }
          weight += kRows * step * size;
          grad += kRows * step * grad_size;
          to += kRows * out_step;
          left += kRows * groups;
        }
        while (next < end) next += groups;
        work.flush();
        consumer.give_back(e, piece);
      }
    }
  }
};

}  // namespace srn::cuda
