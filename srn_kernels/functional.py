"""The functional core: weights, u, v and target ranks in, normalised weights out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from srn_kernels import backends
from srn_kernels.core import ops
from srn_kernels.core.arguments import Request, is_dense, overlaps
from srn_kernels.core.autograd import refuse_batched, run_round
from srn_kernels.core.guard import are_plain, serving
from srn_kernels.core.plan import make_plan
from srn_kernels.maths.matrix import matrix_shape, state_dtype


def _calls(
    weights: Sequence[Tensor], dims: Sequence[int], backend: str
) -> list[tuple[list[int], str]]:
    """The layers that one op call can take, of one device and one state dtype, and the backend that
    serves it. Empty ones are left out; a tensor subclass is a call of its own, before all others,
    because it may turn out that nothing serves it."""
    groups: dict[Any, list[int]] = {}
    plain = are_plain(weights)
    for i, weight in enumerate(weights):
        if weight.numel():
            alone = -1 if plain or are_plain([weight]) else i
            groups.setdefault((alone, weight.device, state_dtype(weight.dtype)), []).append(i)
    chosen = sorted(groups.values(), key=lambda group: plain or are_plain([weights[group[0]]]))
    return [
        (
            g,
            serving(
                backend,
                [weights[i] for i in g],
                [f"weights[{i}]" for i in g],
                [dims[i] for i in g],
            ),
        )
        for g in chosen
    ]


# Each public signature is written out: people read it, and editors complete it.


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
    backend: str = "auto",
) -> list[Tensor]:
    """Normalises all weights in one fused call (arXiv 1906.04659, Algorithm 2).

    Each weight is seen as a matrix W of (rows, columns), rows along ``dims[i]``. With
    sigma = u^T W v after ``n_power_iterations`` power iterations, the result is
    ``gamma W / sigma + (1 - gamma) u v^T``, whose spectral norm is 1 and whose stable rank is at
    most the target; gamma = 1 (plain spectral normalisation) where the stable rank is low enough
    already. Differentiable in the weights, with u and v held constant unless ``gradient="exact"``.

    Args:
        weights: tensors of two dimensions or more; float32, bfloat16, float16 or float64, read in
            place in any dense memory order (others are copied first).
        us, vs: us[i] (rows_i,), vs[i] (columns_i,): unit vectors, float32, or float64 for float64
            weights. Updated in place when ``training``.
        target_ranks: floats >= 1; inf: spectral norm only.
        n_power_iterations: per call, when ``training``.
        eps: |sigma| at or below it passes the weight, and its gradient, unchanged.
        dims: the output dimension of each weight; None: 0 for all.
        training: whether u and v move; without, u/|u| and v/|v| are used as they are.
        out_dtype: of the results; None: each weight's own. float64 needs float64 weights.
        gradient: "frozen", or "exact": as if u, v were the top singular pair of W and moved with
            it, whatever ``training`` is; accurate as far as they have converged, bounded where the
            two largest singular values coincide, differentiable once. It reads W twice a step of
            conjugate gradients, 5 to 50 steps for the gaps of trained layers.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        One tensor a weight, with its shape and strides.

    Raises:
        ValueError, TypeError: an argument is wrong; nothing has been changed.
        RuntimeError: the named backend cannot serve.

    Example:
        >>> weight = torch.eye(4, 8, requires_grad=True)  # stable rank 4
        >>> u, v = torch.eye(4)[0], torch.eye(8)[0]
        >>> (out,) = srn.functional.stable_rank_normalize([weight], [u], [v], [2.0])
        >>> round(out.square().sum().item(), 4)  # |W_hat|_F^2 = r
        2.0
        >>> out.sum().backward()
        >>> weight.grad.shape
        torch.Size([4, 8])
    """
    backends.check_name(backend)
    request = Request.checked(
        weights, us, vs, target_ranks, n_power_iterations, eps, dims, training, out_dtype, gradient
    )
    refuse_batched(weights)
    outs = [w.to(request.out_dtypes[i]) if w.numel() == 0 else None for i, w in enumerate(weights)]
    calls = _calls(weights, request.dims, backend)
    for group, name in calls:
        chosen = [w if is_dense(w) else w.contiguous() for w in (weights[i] for i in group)]
        plan = make_plan(
            tuple(matrix_shape(weights[i], request.dims[i]) for i in group),
            tuple(request.target_ranks[i] for i in group),
            tuple(request.iterations[i] for i in group),
            tuple(request.dims[i] for i in group),
            tuple(request.eps[i] for i in group),
            tuple(request.out_dtypes[i] for i in group),
            tuple(f"weights[{i}]" for i in group),
            name,
            gradient,
        )
        results = run_round(plan, None, chosen, [us[i] for i in group], [vs[i] for i in group])
        for i, out in zip(group, results, strict=False):
            outs[i] = out
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
    backend: str = "auto",
) -> None:
    """Overwrites the weights with what :func:`stable_rank_normalize` would return.

    Runs under no_grad, works on leaf Parameters and bumps their version. Arguments and errors as
    there; a weight that overlaps itself in memory (an expanded tensor) raises ValueError.

    Example:
        >>> weight = nn.Parameter(torch.eye(4, 8))
        >>> u, v = torch.eye(4)[0], torch.eye(8)[0]
        >>> srn.functional.stable_rank_project_([weight], [u], [v], [2.0])
        >>> round(weight.square().sum().item(), 4)
        2.0
    """
    backends.check_name(backend)
    request = Request.checked(
        weights, us, vs, target_ranks, n_power_iterations, eps, dims, training, None, "frozen"
    )
    for i, weight in enumerate(weights):
        if overlaps(weight):
            raise ValueError(f"weights[{i}] overlaps itself in memory and cannot be overwritten")
    calls = _calls(weights, request.dims, backend)
    with torch.no_grad():
        for group, name in calls:
            dense = [w if is_dense(w) else w.contiguous() for w in (weights[i] for i in group)]
            ops.project(
                dense,
                [us[i] for i in group],
                [vs[i] for i in group],
                [request.target_ranks[i] for i in group],
                [request.iterations[i] for i in group],
                [request.dims[i] for i in group],
                [request.eps[i] for i in group],
                name,
            )
            for i, w in zip(group, dense, strict=True):
                if w is not weights[i]:
                    weights[i].copy_(w)
