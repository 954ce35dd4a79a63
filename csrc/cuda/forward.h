// Forward of all layers: power iterations, statistics, and the factor of W_hat = a W + b u v^T.
// Torch-free.
//
// A slab's rows give their part of s = W v and, from the same bytes in shared memory, the slab's
// share of t = W^T s and of |W|_F^2. Column tiles add the shares in fixed order; whoever brings the
// layer's counter to the end of a pass finishes it: sigma = |t| / |s|, u, v, and the statistics.
//
// Beyond 400 lines: its phases hand shared memory to one another, and stand in their order.
#pragma once

#include "elements.h"

namespace srn::cuda {

struct ForwardDirection {
  using Pointers = ForwardPointers;
  static constexpr bool kByPanel = false;  // a slab's rows are needed whole
  SRN_DEVICE static void fetch(const Record& r, const Pointers& p, Barrier* full, char* slot,
                               const Piece& piece, int lane, bool keep) {
    fetch_elements(full, slot, p.weight, r.type, r, piece, lane, keep);
  }
};

template <class A>
class Forward {
 public:
  SRN_DEVICE Forward(const Common& common, const ForwardPointers* layers)
      : c(common),
        layers(layers),
        sh(Shared<A>::carve(shared_memory())),
        consumer(c, sh.control, sh.slots) {}

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

  // Whether v is the stored one, not that of the pass before, which is in memory order.
  SRN_DEVICE bool first_pass(const Record& r) const {
    return r.iterations <= 1 || load_acquire(counter_of(c, int(&r - c.records))) < r.arrivals;
  }

  SRN_DEVICE void slab(const Entry& e, const Record& r, const ForwardPointers& p) {
    if (r.path == kScalars) {
      with_count<1, 3, 6>(r.vectors, [&](auto n) { staged<Any, 1, n.kValue>(e, r, p); });
    } else if (r.path == kVectors) {
      with_type<A>(r.type, [&](auto type) {
        with_count<1, 2, 3, 6, 9>(r.vectors, [&](auto n) {
          staged<typename decltype(type)::Type, kVectorWidth<A>, n.kValue>(e, r, p);
        });
      });
    } else {
      direct(e, r, p, Workspace<A>(r, c.scratch), first_pass(r));
    }
  }

  // A block is a piece, or a row that came in parts: where its parts start, seen from the slots.
  template <int kVectors>
  struct Block {
    static constexpr int kParts = (kVectors + kPartVectors - 1) / kPartVectors;
    const char* part[kParts];
  };
  template <class E, int kWidth, int kVectors>
  SRN_DEVICE Block<kVectors> take_block(const Entry& e, const Record& r, const ForwardPointers& p,
                                        const Piece& piece, int k,
                                        const Own<kWidth, kVectors>& own) {
    const int size = bytes_of<E>(r.type), step = kPartVectors * own.across * kWidth * size;
    const char* source = static_cast<const char*>(p.weight) + int64_t(piece.row) * r.columns * size;
    Block<kVectors> block;
    block.part[0] = consumer.take(e, k) + shift_of(source);
#pragma unroll
    for (int i = 1; i < Block<kVectors>::kParts; ++i)
      block.part[i] = consumer.take(e, k + i) + shift_of(source + i * step);
    return block;
  }

  // Groups of warps take a row each. First all dot products of a few rows of each group, then a
  // pair of barriers between which one warp adds their parts, then the rows' share of t.
  template <class E, int kWidth, int kVectors>
  SRN_DEVICE void staged(const Entry& e, const Record& r, const ForwardPointers& p) {
    const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
    constexpr bool kOneRow = Block<kVectors>::kParts > 1;  // in a block
    constexpr int kRows =                                  // at a time
        std::is_same_v<E, Any> || kOneRow ? 1
        : kVectors <= 2 || sizeof(E) == 2 ? 4
                                          : 2;
    constexpr int kSpan = kWarp / kRows;  // lanes that end up with the same row's sum
    const Own<kWidth, kVectors> own(r, r.columns / kWidth);
    const int size = bytes_of<E>(r.type), group_warps = r.group_warps;
    const int stride = own.groups * r.columns * size;  // from a group's row to its next
    const bool iterate = r.iterations > 0, first = first_pass(r);

    A v[kVectors][kWidth], t[kVectors][kWidth] = {};
    load_own(own, first ? static_cast<const A*>(p.v) : Workspace<A>(r, c.scratch).t,
             first ? column_table(c, r) : nullptr, v);
    // Where a unit lies in its part; of few the distance from the first is kept.
    int apart[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) apart[i] = (own.in_part(i) - own.in_part(0)) * kWidth * size;
    const auto load_w = [&](const Block<kVectors>& block, const char* row, int i, A(&w)[kWidth]) {
      load_as<E>(
          kOneRow ? block.part[i / kPartVectors] + own.in_part(i) * kWidth * size : row + apart[i],
          r.type, 0, w);
      if constexpr (kOneRow) {  // or too many loads would be in flight for the registers
        if (i % kPartVectors == kPartVectors - 1) asm volatile("" ::: "memory");
      }
    };
    const A end = own.last ? A(kShrinkSq) : A(0);
    A* parts = sh.parts + warp;
    A* dots = sh.dots + (own.active() ? own.group : 0) * kChunk;

    double squares[1] = {0};  // short sums in A, long ones in float64
    A f = 0;
    const int pieces = pieces_of(r, e.index), begin = e.index * r.slab_rows;
    int next = own.active() ? begin + own.group : r.rows;  // of the group's rows
    for (int piece = 0; piece < pieces; piece += r.row_pieces) {
      const Piece where = piece_of(r, e.index, piece);
      const Block<kVectors> block = take_block<E>(e, r, p, where, piece, own);
      while (next < where.row + where.rows) {
        const int left = (where.row + where.rows - next + own.groups - 1) / own.groups;
        const int n = kOneRow ? 1 : left < kChunk ? left : kChunk;
        const char* rows =
            block.part[0] + ((next - where.row) * r.columns + own.in_part(0) * kWidth) * size;
        // Rows beyond the last repeat it, and count for nothing: a row takes a comparison and an
        // addition that hangs on it.
        const char* from = rows;
        A* part = parts + lane / kSpan * kWarps;
#pragma unroll 1
        for (int rest = n; rest > 0; rest -= kRows) {
          A dot[kRows] = {}, squares_of[kVectors] = {};  // of 16 elements at most: in range
#pragma unroll
          for (int b = 0; b < kRows; ++b) {
            const bool counts = b == 0 || rest > b;
#pragma unroll
            for (int i = 0; i < kVectors; ++i) {
              A w[kWidth];
              load_w(block, from, i, w);
#pragma unroll
              for (int k = 0; k < kWidth; ++k) {
                dot[b] += w[k] * v[i][k];
                if (counts) squares_of[i] += w[k] * w[k];
              }
            }
            if (b == kRows - 1 || rest > b + 1) from += stride;
          }
#pragma unroll
          for (int i = 0; i < kVectors; ++i)
            f += squares_of[i] * (i < kVectors - 1 ? A(kShrinkSq) : end);
          const A sum = warp_sums(dot);
          if (lane % kSpan == 0) *part = sum;
          part += kRows * kWarps;
        }
        own.sync(group_warps);
        if (warp == own.group * group_warps && lane < kChunk) {
          A dot = 0;
#pragma unroll
          for (int i = 0; i < kWarps; ++i) {
            if (i < group_warps && lane < n) dot += parts[lane * kWarps + i];
          }
          if (lane < n) Workspace<A>(r, c.scratch).s[next + lane * own.groups] = dot;
          dots[lane] = dot * A(kShrinkSq);
        }
        own.sync(group_warps);
        if (iterate) {
          from = rows;
          const A* factors = dots;
#pragma unroll 1
          for (int rest = n; rest > 0; rest -= kRows) {
#pragma unroll
            for (int b = 0; b < kRows; ++b) {
              const A s = factors[b];  // 0 beyond the last row
#pragma unroll
              for (int i = 0; i < kVectors; ++i) {
                A w[kWidth];
                load_w(block, from, i, w);
#pragma unroll
                for (int k = 0; k < kWidth; ++k) t[i][k] += w[k] * s;
              }
              if (b == kRows - 1 || rest > b + 1) from += stride;
            }
            factors += kRows;
          }
        }
        next += n * own.groups;
      }
      if constexpr (!kOneRow) {
        squares[0] += double(f);
        f = 0;
      }
      for (int k = 0; k < r.row_pieces; ++k) consumer.give_back(e, piece + k);
    }

    const Workspace<A> ws(r, c.scratch);
    const int tid = thread_index();
    squares[0] += double(f);
    sum_over_consumers(squares, sh.doubles);
    if (tid == 0) finish_slab(e, pieces, ws, squares[0]);
    if (!iterate) return;
    A* share = ws.shares + int64_t(e.index) * ws.pitch;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      Pack<A, kWidth> sum;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) sum.x[k] = t[i][k];
      if (own.groups > 1) {
        auto* sums = reinterpret_cast<Pack<A, kWidth>*>(sh.sums);
        sync_consumers();
        sums[tid] = sum;
        sync_consumers();
        if (own.group == 0) {
#pragma unroll 1
          for (int g = 1; g < own.groups; ++g) {
            const Pack<A, kWidth> more = sums[tid + g * own.across];
#pragma unroll
            for (int k = 0; k < kWidth; ++k) sum.x[k] += more.x[k];
          }
        }
      }
      if (own.group == 0 && own.has(i))
        *reinterpret_cast<Pack<A, kWidth>*>(share + own.unit(i) * kWidth) = sum;
    }
  }

  // The slab's |W|_F^2, and which of its pieces this CTA keeps.
  SRN_DEVICE void finish_slab(const Entry& e, int pieces, const Workspace<A>& ws, double squares) {
    ws.sums[e.index] = squares;
    ws.flags[e.index] = kept_of(e, pieces);
  }

  // Any layout and width: the slab is read from memory for s, and again from L2 for t.
  SRN_DEVICE void direct(const Entry& e, const Record& r, const ForwardPointers& p,
                         const Workspace<A>& ws, bool first) {
    const int tid = thread_index(), lane = tid % kWarp, warp = tid / kWarp;
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
    sum_for_consumers(squares, sh.doubles);  // a barrier too: s is complete
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
    const int tid = thread_index();
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
    const int tid = thread_index();
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
    sum_for_consumers(x, sh.doubles);
    double u_norm = sqrt(x[1]), v_norm = sqrt(x[2]), sigma;
    if (iterate) {
      sigma = u_norm > 0 ? v_norm / u_norm * kGrowSq : u_norm;
    } else {
      if (u_norm == 0) u_norm = 1;  // a vector of zeros stays one, and sigma is 0
      if (v_norm == 0) v_norm = 1;
      sigma = x[0] / u_norm / v_norm;
    }
    if (!last) {
      // t = 0 (a zero weight) stays 0, so that the next sigma is 0 and not NaN.
      if (v_norm == 0) v_norm = 1;
      for (int j = tid; j < r.columns; j += kConsumers)
        ws.t[j] = A(double(load_shared_by_ctas(ws.t + j)) / v_norm);
      return;
    }
    LayerStats stats = forward_scalars(sigma, x[3] * kGrowSq, p.target_rank, p.eps);
    set_factor(&stats, scaling_of(r, p));
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

  SRN_DEVICE static Scaling scaling_of(const Record& r, const ForwardPointers& p) {
    Scaling scaling;
    scaling.sigma_max = p.sigma_max;
    scaling.through = r.through != 0;
    if (p.gain) {
      double gain[1];
      load_any(p.gain, r.gain_type, 0, gain);
      scaling.gain = gain[0];
    }
    return scaling;
  }

  // The factor of W_hat. A round that is repeated forms it anew, from what no tile of it writes.
  SRN_DEVICE double factor(const Entry& e, const Record& r, const ForwardPointers& p) const {
    LayerStats* stats = c.stats + r.stats_row;
    if (r.passes > 0) return load_shared_by_ctas(&stats->factor);
    LayerStats made{};
    made.sigma = stats->sigma;
    made.branch = stats->branch;
    set_factor(&made, scaling_of(r, p));
    if (e.index == 0 && thread_index() == 0) {
      stats->factor = made.factor;
      stats->by_gain = made.by_gain;
      stats->by_sigma = made.by_sigma;
    }
    return made.factor;
  }

  // factor W_hat = factor (a W + b u v^T), from the slab's pieces or, for other layouts, from
  // memory.
  SRN_DEVICE void rescale(const Entry& e, const Record& r, const ForwardPointers& p) {
    const double factor = this->factor(e, r, p);
    const A a = A(factor * load_shared_by_ctas(&c.stats[r.stats_row].a));
    const A b = A(factor * load_shared_by_ctas(&c.stats[r.stats_row].b));
    if (r.path != kDirect) stage_u(c, r, e.index, b, sh.sums);
    if (!with_panel<A>(r, [&](auto panel) { rescaled<decltype(panel)>(e, r, p, a); })) {
      const A* u = round_u<A>(c, r);
      const A* v = round_v<A>(c, r);
      for_each_in_slab(r, e.index, [&](int64_t at, int row, int column) {
        A w[1];
        load_any(p.weight, r.type, at, w);
        w[0] = a * w[0] + b * load_shared_by_ctas(u + row) *
                              load_shared_by_ctas(v + matrix_column(c, r, column));
        store_any(p.out, r.other_type, at, w);
      });
    }
  }

  // b u of the slab's rows lies in shared memory, a thread's part of v of a panel in registers.
  template <class P>
  SRN_DEVICE void rescaled(const Entry& e, const Record& r, const ForwardPointers& p, A a) {
    using E = typename P::Weight;
    using O = typename P::Other;
    constexpr int kWidth = P::kWidth, kVectors = P::kVectors;
    constexpr int kRows = kRowsInFlight<E>;
    const int columns = r.columns, type = r.type, other = r.other_type;
    const int size = bytes_of<E>(type), out_size = bytes_of<O>(other);
    const int begin = e.index * r.slab_rows;
    const int pieces = pieces_of(r, e.index), in_panel = pieces / r.row_pieces;
    const auto* weights = static_cast<const char*>(p.weight);
    char* out = static_cast<char*>(p.out);
    const A* u = sh.sums;
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
        if (e.mask >> piece & 1) {
          const int64_t first = int64_t(where.row) * columns + where.column;
          const char* data = consumer.take(e, piece) + shift_of(weights + first * size);
          const int step = groups * pitch * size;
          const int64_t out_step = int64_t(groups) * columns * out_size;
          data += (next - where.row) * pitch * size;
          char* to = out + (int64_t(next) * columns + where.column) * out_size;
          const A* left = u + (next - begin);
#pragma unroll 1
          for (int row = next; row < end; row += kRows * groups) {
            const bool more = row + groups < end;
            A w[kRows][kVectors][kWidth];
#pragma unroll
            for (int b = 0; b < kRows; ++b) {
              const char* from = b == 0 || !more ? data : data + step;
              const A factor = left[b == 0 || !more ? 0 : groups];
#pragma unroll
              for (int i = 0; i < kVectors; ++i) {
                load_as<E>(from + own.unit(i) * kWidth * size, type, 0, w[b][i]);
#pragma unroll
                for (int x = 0; x < kWidth; ++x) w[b][i][x] = a * w[b][i][x] + factor * v[i][x];
              }
            }
#pragma unroll
            for (int b = 0; b < kRows; ++b) {
#pragma unroll
              for (int i = 0; i < kVectors; ++i)
                if ((b == 0 || more) && own.has(i))
                  store_as<O>(to + b * out_step + own.unit(i) * kWidth * out_size, other, 0,
                              w[b][i]);
            }
            data += kRows * step;
            to += kRows * out_step;
            left += kRows * groups;
          }
          consumer.give_back(e, piece);
        }
        while (next < end) next += groups;
      }
    }
  }
};

}  // namespace srn::cuda
