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
from srn_kernels.maths.bound import Factor, scaled_gradient
from srn_kernels.maths.matrix import first_vector, matrix, round_vectors
from srn_kernels.maths.rules import named
from srn_kernels.maths.scalars import Stats


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


def graphed_scaled_gradient(
    grad: Tensor,
    weight: Tensor,
    gain: Tensor | None,
    round_state: Tensor,
    stats: Tensor,
    plan: Plan,
    place: int,
) -> tuple[Tensor, Tensor]:
    """dL/dW and dL/dgain of a layer with a factor, from G = dL/d(factor W_hat)."""
    rule, dim, rank = named(plan.rule), plan.dims[place], plan.target_ranks[place]
    u, v = round_vectors(round_state, plan.offsets[place], weight, dim, plan.pairs[place])
    known, bound = Stats(*stats[place]), plan.sigma_max[place]
    sigma = known.sigma
    if bound > 0:  # as a function of W
        sigma = (first_vector(u) @ (matrix(weight, dim).to(u.dtype) @ first_vector(v))).double()
    factor = Factor.of(sigma, known.masks()[0], gain, bound, plan.through[place])
    w_hat = Repeated.apply(weight, round_state, stats, plan, place)
    layer = (grad, weight, w_hat, u, v, stats[place], rank, dim)
    frozen, by_gain = scaled_gradient(rule, factor, *layer)
    if plan.gradient == "frozen":
        return frozen, by_gain
    with torch.no_grad():
        part = rule.layer_exact_part(grad, weight, u, v, stats[place], rank, dim)
        part = part if part is None else part * factor.factor.to(part.dtype)
    return OnceDifferentiable.apply(frozen, part), by_gain


class Repeated(torch.autograd.Function):
    """W_hat of a layer of a finished round, without its factor, as a function of W."""

    @staticmethod
    def forward(
        weight: Tensor, round_state: Tensor, stats: Tensor, plan: Plan, place: int
    ) -> Tensor:
        dim, constants = plan.dims[place], (plan.target_ranks[place], plan.eps[place])
        u, v = round_vectors(round_state, plan.offsets[place], weight, dim, plan.pairs[place])
        return named(plan.rule).repeat_layer(weight, u, v, stats[place], *constants, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, round_state, stats, ctx.plan, ctx.place = inputs
        ctx.save_for_backward(weight, round_state, stats)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        weight, round_state, stats = ctx.saved_tensors
        made = graphed_gradient(grads[0], weight, round_state, stats, ctx.plan, ctx.place)
        return made, None, None, None, None


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
