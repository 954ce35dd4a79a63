"""Every rule in plain PyTorch, layer by layer on any device: the backend "reference".

``normalize`` and ``normalize_backward`` are the backend's verbs, for the rule that kernels serve
too; ``run`` and ``run_backward`` are the same for any rule, and ``add_exact_parts`` follows the
backward of every backend. Arguments are those of :mod:`srn_kernels.core.ops`, in its order.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from srn_kernels.maths.bound import Factor, scaled_gradient, with_factor
from srn_kernels.maths.matrix import matrix_shape, round_vectors, state_dtype
from srn_kernels.maths.rule import Rule
from srn_kernels.maths.scalars import Stats
from srn_kernels.maths.top_one import TOP_ONE

DEVICES = None  # any
STATE_DTYPES = frozenset({torch.float32, torch.float64})


def unavailable_reason() -> str | None:
    return None


def _vectors(
    rule: Rule,
    round_state: Tensor,
    weights: Sequence[Tensor],
    offsets: Sequence[int],
    dims: Sequence[int],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each layer's u and v in a round's flat state."""
    for weight, offset, dim in zip(weights, offsets, dims, strict=True):
        pairs = rule.pairs(*matrix_shape(weight, dim))
        yield round_vectors(round_state, offset, weight, dim, pairs)


def _gain(gains: Sequence[Tensor], gained: Sequence[int], layer: int) -> Tensor | None:
    """The gain of a layer, or the place of its gradient, if it has one."""
    return gains[gained[layer]] if gained and gained[layer] >= 0 else None


# The verbs' parameters are written out in every backend, since the ops pass them by place.


@torch.no_grad()
def run(
    rule: Rule,
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    outs: Sequence[Tensor],
    round_state: Tensor,
    stats: Tensor,
    offsets: Sequence[int],
    target_ranks: Sequence[float],
    iterations: Sequence[int],
    dims: Sequence[int],
    eps: Sequence[float],
    gains: Sequence[Tensor] = (),
    gained: Sequence[int] = (),
    sigma_max: Sequence[float] = (),
    through: Sequence[bool] = (),
) -> None:
    """The op ``normalize``."""
    pairs = list(_vectors(rule, round_state, weights, offsets, dims))
    for i, (weight, (u, v)) in enumerate(zip(weights, pairs, strict=True)):
        gain, bound = _gain(gains, gained, i), sigma_max[i] if sigma_max else 0.0
        scaled = gain is not None or bound > 0
        if iterations[i] < 0:
            constants = (target_ranks[i], eps[i], dims[i])
            w_hat, known = rule.repeat_layer(weight, u, v, stats[i], *constants), stats[i]
        else:
            # The factor comes before the rounding to the result's dtype.
            dtype = state_dtype(weight.dtype) if scaled else outs[i].dtype
            constants = (target_ranks[i], iterations[i], eps[i], dims[i], dtype)
            w_hat, *pair, known = rule.normalize_layer(weight, us[i], vs[i], *constants)
            for old, new in zip((u, v), pair, strict=True):
                old.copy_(new)
        if scaled:
            known = with_factor(known, gain, bound, through[i] if through else True)
            w_hat = w_hat * Stats(*known).factor.to(w_hat.dtype)
        outs[i].copy_(w_hat)
        stats[i].copy_(known)
    for i, pair in enumerate(pairs):  # at the end: a layer that fails leaves all as they were
        if iterations[i] > 0:
            for state, new in zip((us[i], vs[i]), pair, strict=True):
                state.copy_(new)


@torch.no_grad()
def run_backward(
    rule: Rule,
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    round_state: Tensor,
    stats: Tensor,
    grad_weights: Sequence[Tensor],
    rows: Sequence[int],
    offsets: Sequence[int],
    dims: Sequence[int],
    grad_gains: Sequence[Tensor] = (),
    gained: Sequence[int] = (),
    scaled: Sequence[bool] | None = None,
    target_ranks: Sequence[float] = (),
    eps: Sequence[float] = (),
) -> None:
    """The op ``normalize_backward``, u and v held constant; ``scaled`` None: perhaps any layer."""
    pairs = _vectors(rule, round_state, weights, offsets, dims)
    for i, (weight, (u, v)) in enumerate(zip(weights, pairs, strict=True)):
        # TOP_ONE takes what it needs of these two from the statistics.
        rank, small = target_ranks[i] if target_ranks else 0.0, eps[i] if eps else 0.0
        known = stats[rows[i]]
        if scaled is not None and not (scaled and scaled[i]):
            grad = rule.layer_gradient(grads[i], weight, u, v, known, rank, dims[i])
        else:
            w_hat = rule.repeat_layer(weight, u, v, known, rank, small, dims[i])
            factor = Factor(*(getattr(Stats(*known), name) for name in Factor._fields))
            layer = (grads[i], weight, w_hat, u, v, known, rank, dims[i])
            grad, by_gain = scaled_gradient(rule, factor, *layer)
            if (place := _gain(grad_gains, gained, i)) is not None:
                place.fill_(by_gain)
        grad_weights[i].copy_(grad)


@torch.no_grad()
def add_exact_parts(
    rule: Rule,
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    round_state: Tensor,
    stats: Tensor,
    grad_weights: Sequence[Tensor],
    rows: Sequence[int],
    offsets: Sequence[int],
    dims: Sequence[int],
    scaled: Sequence[bool],
    target_ranks: Sequence[float],
) -> None:
    """Adds what ``gradient="exact"`` has beside the gradient of constant u and v."""
    pairs = _vectors(rule, round_state, weights, offsets, dims)
    for i, (weight, (u, v)) in enumerate(zip(weights, pairs, strict=True)):
        known = stats[rows[i]]
        part = rule.layer_exact_part(grads[i], weight, u, v, known, target_ranks[i], dims[i])
        if part is not None:
            grad_weights[i].add_(part * Stats(*known).factor if scaled and scaled[i] else part)


normalize = functools.partial(run, TOP_ONE)
normalize_backward = functools.partial(run_backward, TOP_ONE)
