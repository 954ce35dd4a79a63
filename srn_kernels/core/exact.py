"""The gradient of one layer in differentiable operations, for ``create_graph=True``.

It is the rule's own formula. What ``gradient="exact"`` adds, with u and v turning as W changes, has
no derivative here: conjugate gradients found it (:mod:`srn_kernels.maths.turning`). They read W
twice a step, 5 to 50 steps for the gaps of trained layers, and look at the scalars of the round
(one synchronisation on a GPU). Layers whose constraint is inactive (b = 0), and all of plain SN,
cost nothing more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from srn_kernels.core.plan import Plan
from srn_kernels.maths.matrix import round_vectors
from srn_kernels.maths.rules import named


def graphed_gradient(
    grad: Tensor, weight: Tensor, round_state: Tensor, stats: Tensor, plan: Plan, place: int
) -> Tensor:
    """dL/dW of the layer at ``place`` of a round, from its G = dL/dW_hat."""
    rule, dim = named(plan.rule), plan.dims[place]
    u, v = round_vectors(round_state, plan.offsets[place], weight, dim, plan.pairs[place])
    settled = (grad, weight, u, v, stats[place], plan.target_ranks[place], dim)
    frozen = rule.layer_gradient(*settled)
    if plan.gradient == "frozen":
        return frozen
    with torch.no_grad():
        part = rule.layer_exact_part(*settled)
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
