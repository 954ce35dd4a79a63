"""A soft bound on the spectral norm, and a learnable gain, on top of a round's W_hat.

With P(W) = sigma W_hat, which keeps W's own spectral norm (P(W) = W without a stable rank), the
bounded weight is g P(W) / max(1, sigma / s): W itself as long as its norm is at most s (as SNGP
does; Liu et al., arXiv 2006.10108), and s W_hat beyond. Both are scalars on W_hat, taken from the
round's own u and v, so every backend serves them; they cost a product with W_hat and, for sigma's
gradient, one with W.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from srn_kernels.maths.matrix import from_matrix, matrix
from srn_kernels.maths.scalars import Stats


class _Bound(torch.autograd.Function):
    """factor * W_hat.

    Like a round's node it keeps its tensors itself in eager mode, so that several backwards may
    reach it and activation checkpointing does not count them.
    """

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        *tensors, _, sigma_max, grad_through_sigma, _ = inputs
        return tensors[0] * _settled(tensors, sigma_max, grad_through_sigma)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, dim, sigma_max, grad_through_sigma, keep = inputs
        ctx.constants = dim, sigma_max, grad_through_sigma
        ctx.tensors = tuple(tensors) if keep else None
        gain = tensors[2]
        ctx.has_gain = gain is not None
        if keep:
            with torch.no_grad():  # those of this forward, whatever happens to the gain
                ctx.factors = _settled(tensors, sigma_max, grad_through_sigma)
            ctx.version = None if gain is None or gain.is_inference() else gain._version
        else:
            ctx.save_for_backward(*[t for t in tensors if t is not None])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dim, sigma_max, through = ctx.constants
        kept = ctx.tensors is not None
        tensors = list(ctx.tensors if kept else ctx.saved_tensors)
        if not kept and not ctx.has_gain:
            tensors.insert(2, None)
        w_hat, weight, gain, u, v, stats = tensors
        by_weight = by_gain = None
        if torch.is_grad_enabled():  # create_graph: sigma as a function of W once more
            if kept and gain is not None and ctx.version not in (None, gain._version):
                raise RuntimeError("the gain was changed in place before this backward")
            known = Stats(*stats)
            sigma = known.sigma.to(u.dtype)
            if sigma_max is not None:
                sigma = u @ (matrix(weight, dim).to(u.dtype) @ v)
            factors = _factors(sigma, gain, known, sigma_max, through)
        else:
            factors = ctx.factors if kept else _settled(tensors, sigma_max, through)
        factor, by_sigma, scale = factors
        moves = sigma_max is not None and ctx.needs_input_grad[1]
        if moves or (gain is not None and ctx.needs_input_grad[2]):
            inner = (grad * w_hat).sum(dtype=u.dtype)  # <G, W_hat>
            if gain is not None:
                by_gain = (inner * scale).to(gain.dtype).reshape(gain.shape)
            if moves:
                outer = from_matrix(torch.outer(u * (inner * by_sigma), v), weight, dim)
                by_weight = outer.to(weight.dtype)
        return grad * factor, by_weight, by_gain, *[None] * 7


def _settled(
    tensors: Sequence[Any], sigma_max: float | None, through: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`_factors` at the round's own sigma."""
    _, _, gain, u, _, stats = tensors
    known = Stats(*stats)
    return _factors(known.sigma.to(u.dtype), gain, known, sigma_max, through)


def _factors(
    sigma: Tensor, gain: Tensor | None, stats: Stats, sigma_max: float | None, through: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The factor of W_hat, its derivative by sigma, and itself without the gain."""
    one = torch.ones_like(sigma)
    scale, by_sigma = one, torch.zeros_like(sigma)
    if sigma_max is not None:
        good, beyond = stats.masks()[0], sigma > sigma_max
        # sigma / max(1, sigma / s) = min(sigma, s)
        scale = torch.where(good, torch.where(beyond, sigma_max, sigma), one)
        divided = torch.zeros_like(one) if through else sigma_max / sigma.detach()
        by_sigma = torch.where(good, torch.where(beyond, divided, one), torch.zeros_like(one))
    if gain is None:
        return scale, by_sigma, scale
    gain = gain.reshape(()).to(sigma.dtype)
    return scale * gain, by_sigma * gain, scale


def bounded(
    w_hat: Tensor,
    weight: Tensor,
    u: Tensor,
    v: Tensor,
    stats: Tensor,
    dim: int,
    sigma_max: float | None,
    grad_through_sigma: bool,
    gain: Tensor | None,
    keep: bool,
) -> Tensor:
    """gain * sigma / max(1, sigma / sigma_max) * W_hat; differentiable in W_hat, W and gain.

    w_hat and weight: one shape; u: (rows,), v: (columns,), stats: (8,), the round's own;
    sigma_max None: W_hat keeps spectral norm 1; gain: one element, or None. Without
    ``grad_through_sigma`` the divisor max(1, sigma / sigma_max) is held constant. A weight that
    normalisation passes through, or that is not finite, gets the gain alone. ``keep``: in eager
    mode, to let several backwards reach the result.
    """
    return _Bound.apply(w_hat, weight, gain, u, v, stats, dim, sigma_max, grad_through_sigma, keep)
