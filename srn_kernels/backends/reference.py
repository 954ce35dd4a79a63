"""Every rule in plain PyTorch, layer by layer on any device: the backend "reference".

``normalize`` and ``normalize_backward`` are the backend's verbs, for the rule that kernels serve
too; ``run`` and ``run_backward`` are the same for any rule, and ``add_exact_parts`` follows the
backward of every backend.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from srn_kernels.maths.matrix import matrix_shape, round_vectors
from srn_kernels.maths.rule import Rule
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
) -> None:
    """The op ``normalize``."""
    pairs = list(_vectors(rule, round_state, weights, offsets, dims))
    for i, (weight, (u, v)) in enumerate(zip(weights, pairs, strict=True)):
        if iterations[i] < 0:
            constants = (target_ranks[i], eps[i], dims[i])
            outs[i].copy_(rule.repeat_layer(weight, u, v, stats[i], *constants))
            continue
        constants = (target_ranks[i], iterations[i], eps[i], dims[i], outs[i].dtype)
        layer = rule.normalize_layer(weight, us[i], vs[i], *constants)
        outs[i].copy_(layer.weight)
        u.copy_(layer.u)
        v.copy_(layer.v)
        stats[i].copy_(layer.stats)
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
    target_ranks: Sequence[float] = (),
) -> None:
    """The op ``normalize_backward``, u and v held constant."""
    pairs = _vectors(rule, round_state, weights, offsets, dims)
    ranks = target_ranks or itertools.repeat(0.0)  # which TOP_ONE takes from the statistics
    layers = zip(grads, weights, pairs, rows, ranks, dims, strict=False)
    for out, (grad, weight, (u, v), row, rank, dim) in zip(grad_weights, layers, strict=True):
        out.copy_(rule.layer_gradient(grad, weight, u, v, stats[row], rank, dim))


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
    target_ranks: Sequence[float],
) -> None:
    """Adds what ``gradient="exact"`` has beside the gradient of constant u and v."""
    pairs = _vectors(rule, round_state, weights, offsets, dims)
    layers = zip(grads, weights, pairs, rows, target_ranks, dims, strict=True)
    for out, (grad, weight, (u, v), row, rank, dim) in zip(grad_weights, layers, strict=True):
        part = rule.layer_exact_part(grad, weight, u, v, stats[row], rank, dim)
        if part is not None:
            out.add_(part)


normalize = functools.partial(run, TOP_ONE)
normalize_backward = functools.partial(run_backward, TOP_ONE)
