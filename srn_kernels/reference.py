"""Stable Rank Normalization in plain PyTorch: any device, any real dtype, autograd's own backward.

This is the definition that every backend is compared with. Source: Sanyal, Torr, Dokania, "Stable
Rank Normalization for Improved Generalization in Neural Networks and GANs" (arXiv 1906.04659),
Theorem 1 with k = 1 and Algorithm 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from srn_kernels.core.arguments import Request
from srn_kernels.maths.top_one import TOP_ONE

# Signatures are written out, as in functional.py: people read them, and editors complete them.


def stable_rank_normalize(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    target_ranks: Sequence[float],
    *,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dims: Sequence[int] | None = None,
    training: bool = True,
    out_dtype: torch.dtype | None = None,
    gradient: str = "frozen",
) -> list[Tensor]:
    """:func:`srn_kernels.functional.stable_rank_normalize`, layer by layer in plain PyTorch.

    Example:
        >>> weight, u, v = torch.eye(4, 8), torch.eye(4)[0], torch.eye(8)[0]
        >>> (out,) = srn.reference.stable_rank_normalize([weight], [u], [v], [2.0])
        >>> round(out.square().sum().item(), 4)
        2.0
    """
    request = Request.checked(
        weights, us, vs, target_ranks, n_power_iterations, eps, dims, training, out_dtype, gradient
    )
    outs = []
    for i, weight in enumerate(weights):
        if weight.numel() == 0:
            outs.append(weight.to(request.out_dtypes[i]))
            continue
        layer = TOP_ONE.normalize_layer(
            weight,
            us[i],
            vs[i],
            request.target_ranks[i],
            request.iterations[i],
            request.eps[i],
            request.dims[i],
            request.out_dtypes[i],
            gradient=gradient,
        )
        if training:
            us[i].copy_(layer.u)
            vs[i].copy_(layer.v)
        outs.append(layer.weight)
    return outs


def stable_rank_project_(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    target_ranks: Sequence[float],
    *,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dims: Sequence[int] | None = None,
    training: bool = True,
) -> None:
    """:func:`srn_kernels.functional.stable_rank_project_`, layer by layer in plain PyTorch.

    Example:
        >>> weight, u, v = torch.eye(4, 8), torch.eye(4)[0], torch.eye(8)[0]
        >>> srn.reference.stable_rank_project_([weight], [u], [v], [2.0])
        >>> round(weight.square().sum().item(), 4)
        2.0
    """
    with torch.no_grad():
        outs = stable_rank_normalize(
            weights,
            us,
            vs,
            target_ranks,
            n_power_iterations=n_power_iterations,
            eps=eps,
            dims=dims,
            training=training,
        )
        for weight, out in zip(weights, outs, strict=True):
            weight.copy_(out)
