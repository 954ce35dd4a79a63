"""The exact gradient of a round: with u and v turning as W changes, without a decomposition.

For W_hat = a W + b u v^T the exact gradient is the frozen one plus b (x v^T + u y^T) with
a_1 = (I - u u^T) G v and b_1 = (I - v v^T) G^T u. A backward then reads W twice a step, 5 to 50
steps for the gaps of trained layers, and looks at the scalars of the round (one synchronisation on
a GPU). Layers whose constraint is inactive (b = 0), and all of plain SN, cost nothing more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from srn_kernels.maths import top_k
from srn_kernels.maths.matrix import from_matrix, matrix, round_vectors
from srn_kernels.maths.scalars import STABLE_RANK
from srn_kernels.maths.top_one import layer_gradient
from srn_kernels.maths.turning import turning


def turning_part(
    grad: Tensor, weight: Tensor, u: Tensor, v: Tensor, stats: Tensor, dim: int
) -> Tensor | None:
    """b (x v^T + u y^T) in the weight's shape, from G = dL/dW_hat; None where it is 0."""
    sigma, _, _, _, _, b, branch, _ = stats.tolist()
    if branch != STABLE_RANK or b == 0:
        return None
    w, g = (matrix(t, dim).to(u.dtype) for t in (weight, grad))
    x, y = turning(
        w,
        u.unsqueeze(-1),
        u.new_full((1,), sigma),
        v.unsqueeze(-1),
        (g @ v).unsqueeze(-1),
        (g.mT @ u).unsqueeze(-1),
    )
    part = torch.outer(x[:, 0], v) + torch.outer(u, y[:, 0])
    return from_matrix(part * (b / sigma), weight, dim)


def add_turning(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    round_state: Tensor,
    stats: Tensor,
    grad_weights: Sequence[Tensor],
    rows: Sequence[int],
    offsets: Sequence[int],
    dims: Sequence[int],
) -> None:
    """Adds :func:`turning_part` of each layer to its frozen gradient. The lists are those of the
    op normalize_backward."""
    with torch.no_grad():
        for i, (grad, weight) in enumerate(zip(grads, weights, strict=True)):
            u, v = round_vectors(round_state, offsets[i], weight, dims[i])
            part = turning_part(grad, weight, u, v, stats[rows[i]], dims[i])
            if part is not None:
                grad_weights[i].add_(part)


def graphed_gradient(
    grad: Tensor, weight: Tensor, round_state: Tensor, stats: Tensor, plan: Any, place: int
) -> Tensor:
    """dL/dW of one layer of a round in differentiable operations (create_graph).

    ``plan`` is the round's :class:`srn_kernels.autograd.Plan`, ``place`` the layer's in it.
    """
    dim, offset = plan.dims[place], plan.offsets[place]
    if plan.preserve:
        k, target_rank = plan.preserve[place], plan.target_ranks[place]
        rows = weight.shape[dim]
        size = top_k.block_size(k, rows, weight.numel() // rows)
        u, v = top_k.state_vectors(round_state, offset, weight, dim, size)
        settled = (weight, u, v, stats, target_rank, dim, k)
        frozen = top_k.layer_gradient(grad, *settled, "frozen")
        if plan.gradient == "frozen":
            return frozen
        with torch.no_grad():
            part = top_k.layer_gradient(grad, *settled, "exact") - frozen
        return OnceDifferentiable.apply(frozen, part)
    u, v = round_vectors(round_state, offset, weight, dim)
    frozen = layer_gradient(grad, weight, u, v, stats, dim)
    if plan.gradient == "frozen":
        return frozen
    with torch.no_grad():
        part = turning_part(grad, weight, u, v, stats, dim)
    return OnceDifferentiable.apply(frozen, part)


class OnceDifferentiable(torch.autograd.Function):
    """frozen + part, as a gradient that cannot be differentiated again."""

    @staticmethod
    def forward(frozen: Tensor, part: Tensor | None) -> Tensor:
        return frozen.clone() if part is None else frozen + part.to(frozen.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "gradient='exact' can be differentiated once only; use gradient='frozen' for second "
            "derivatives"
        )
