// The scalar mathematics of one layer, written once for C++ and CUDA. Torch-free.
//
// Sanyal, Torr, Dokania, "Stable Rank Normalization" (arXiv 1906.04659), Theorem 1 with k = 1 and
// Algorithm 2, in the form W_hat = a W + b u v^T, and its gradient with u and v held constant; and
// the factor of a layer that has a soft bound or a gain (srn_kernels/maths/bound.py).
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#ifdef __CUDACC__
#define SRN_HD __host__ __device__
#else
#define SRN_HD
#endif

namespace srn {

// The number of elements that a vector takes in the round's state; maths/matrix.py has the same.
SRN_HD constexpr int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

// Which row of the edge-case table a layer took; stored as a double in its statistics row.
enum Branch : int {
  kSpectral = 0,     // stable rank already at most r: W / sigma
  kStableRank = 1,   // stable rank lowered to r
  kPassThrough = 2,  // |sigma| <= eps: W unchanged
  kNonFinite = 3,    // a non-finite weight: the output shows it, the state does not
};

// One row of the float64 statistics tensor; srn_kernels/maths/scalars.py names the same columns.
struct LayerStats {
  double sigma;         // u^T W v
  double frobenius_sq;  // |W|_F^2
  double q;             // |W / sigma - u v^T|_F^2 = |W|_F^2 / sigma^2 - 1, for any unit u, v
  double gamma;         // min(1, sqrt((r - 1) / q))
  double a;             // W_hat = a W + b u v^T
  double b;
  double branch;
  double kept;     // of other rules
  double factor;   // what is returned is factor W_hat
  double by_gain;  // the factor's derivatives
  double by_sigma;
};
constexpr int kStatsColumns = 11;

SRN_HD inline LayerStats forward_scalars(double sigma, double frobenius_sq, double target_rank,
                                         double eps) {
  LayerStats st{sigma, frobenius_sq, 0.0, 1.0, 1.0, 0.0, double(kPassThrough), 0.0, 1.0, 1.0, 0.0};
  // The comparison is false for NaN as well as for infinity.
  if (!(std::fabs(sigma) <= std::numeric_limits<double>::max()) ||
      !(frobenius_sq <= std::numeric_limits<double>::max())) {
    st.q = st.gamma = st.a = st.b = std::numeric_limits<double>::quiet_NaN();
    st.branch = double(kNonFinite);
    return st;
  }
  if (std::fabs(sigma) <= eps) return st;
  const double ratio = frobenius_sq / sigma / sigma;
  st.q = ratio > 1.0 ? ratio - 1.0 : 0.0;
  const bool active = st.q > target_rank - 1.0;  // an infinite target is never active
  st.gamma = active ? std::sqrt((target_rank - 1.0) / st.q) : 1.0;
  st.a = st.gamma / sigma;
  st.b = 1.0 - st.gamma;
  st.branch = double(active ? kStableRank : kSpectral);
  return st;
}

// What multiplies a layer's W_hat: its gain, and with a soft bound s min(sigma, s) too.
struct Scaling {
  double gain = 1.0;
  double sigma_max = 0.0;  // s; 0: none
  bool through = true;     // whether the divisor max(1, sigma / s) moves with W in the gradient
};

// From sigma and the branch, so that a round that is repeated comes to the same factor.
SRN_HD inline void set_factor(LayerStats* st, const Scaling& scaling) {
  st->by_gain = 1.0;
  st->by_sigma = 0.0;
  if (scaling.sigma_max > 0.0 && int(st->branch) <= kStableRank) {
    const bool beyond = st->sigma > scaling.sigma_max;
    st->by_gain = beyond ? scaling.sigma_max : st->sigma;
    const double held = scaling.through ? 0.0 : scaling.sigma_max / st->sigma;
    st->by_sigma = scaling.gain * (beyond ? held : 1.0);
  }
  st->factor = scaling.gain * st->by_gain;
}

// dL/dW = scale * (G + weight * W) + outer * u v^T, given g_w = <G, W> and g_e = u^T G v for
// G = dL / d(factor W_hat). The common factor keeps every coefficient inside float32 for weights
// from 1e-11 to 1e18.
struct BackwardScalars {
  double scale;
  double weight;
  double outer;
  double gain;  // dL/dgain
};

SRN_HD inline BackwardScalars backward_scalars(const LayerStats& st, double g_w, double g_e) {
  BackwardScalars c{st.factor * st.a, 0.0, 0.0, 0.0};
  const int branch = int(st.branch);
  const double inner = st.a * g_w + st.b * g_e;  // <G, W_hat>
  c.gain = inner * st.by_gain;
  double outer = 0.0;
  if (branch == kSpectral) {
    outer = -g_w / st.sigma;
  } else if (branch == kStableRank && st.gamma > 0.0) {
    const double d = g_w / st.sigma - g_e;
    c.weight = -d / (st.q * st.sigma);
    outer = (st.q + 1.0) / st.q * d - g_w / st.sigma;  // F / (q sigma^2) = (q + 1) / q
  }
  c.outer = c.scale * outer;
  if (st.by_sigma != 0.0) c.outer += inner * st.by_sigma;  // d sigma / dW = u v^T
  return c;
}

}  // namespace srn
