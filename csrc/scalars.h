// The scalar mathematics of one layer, written once for C++ and CUDA. Torch-free.
//
// Sanyal, Torr, Dokania, "Stable Rank Normalization" (arXiv 1906.04659), Theorem 1 with k = 1 and
// Algorithm 2, in the form W_hat = a W + b u v^T, and its gradient with u and v held constant.
#pragma once

#include <cmath>
#include <limits>

#ifdef __CUDACC__
#define SRN_HD __host__ __device__
#else
#define SRN_HD
#endif

namespace srn {

// Which row of the edge-case table a layer took; stored as a double in its statistics row.
enum Branch : int {
  kSpectral = 0,     // stable rank already at most r: W / sigma
  kStableRank = 1,   // stable rank lowered to r
  kPassThrough = 2,  // |sigma| <= eps: W unchanged
  kNonFinite = 3,    // a non-finite weight: the output shows it, the state does not
};

// One row of the (layers, 8) float64 statistics tensor; srn_kernels/ops.py names the same columns.
struct LayerStats {
  double sigma;         // u^T W v
  double frobenius_sq;  // |W|_F^2
  double q;             // |W / sigma - u v^T|_F^2 = |W|_F^2 / sigma^2 - 1, for any unit u, v
  double gamma;         // min(1, sqrt((r - 1) / q))
  double a;             // W_hat = a W + b u v^T
  double b;
  double branch;
  double reserved;
};
constexpr int kStatsColumns = 8;

SRN_HD inline LayerStats forward_scalars(double sigma, double frobenius_sq, double target_rank,
                                         double eps) {
  LayerStats st{sigma, frobenius_sq, 0.0, 1.0, 1.0, 0.0, double(kPassThrough), 0.0};
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

// dL/dW = scale * (G + weight * W + outer * u v^T), given g_w = <G, W> and g_e = u^T G v.
// The common factor keeps every coefficient inside float32 for weights from 1e-11 to 1e18.
struct BackwardScalars {
  double scale;
  double weight;
  double outer;
};

SRN_HD inline BackwardScalars backward_scalars(const LayerStats& st, double g_w, double g_e) {
  BackwardScalars c{st.a, 0.0, 0.0};
  const int branch = int(st.branch);
  if (branch == kSpectral) {
    c.outer = -g_w / st.sigma;
  } else if (branch == kStableRank && st.gamma > 0.0) {
    const double d = g_w / st.sigma - g_e;
    c.weight = -d / (st.q * st.sigma);
    c.outer = (st.q + 1.0) / st.q * d - g_w / st.sigma;  // F / (q sigma^2) = (q + 1) / q
  }
  return c;
}

}  // namespace srn
