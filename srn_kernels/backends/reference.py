"""Every rule in plain PyTorch, layer by layer on any device: the backend "reference".

``normalize`` and ``normalize_backward`` are the backend's verbs, for the rule that kernels serve
too; ``run`` and ``run_backward`` are the same for any rule, and ``add_exact_parts`` follows the
backward of every backend. Arguments are those of :mod:`srn_kernels.core.ops`, in its order.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

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
def run(rule: Rule, *arguments: Any) -> None:
    """The op ``normalize``."""
    weights, us, vs, outs, round_state, stats, offsets, ranks, iterations, dims, eps = arguments
    pairs = list(_vectors(rule, round_state, weights, offsets, dims))
    for i, (weight, (u, v)) in enumerate(zip(weights, pairs, strict=True)):
        if iterations[i] < 0:
            constants = (ranks[i], eps[i], dims[i])
            outs[i].copy_(rule.repeat_layer(weight, u, v, stats[i], *constants))
            continue
        constants = (ranks[i], iterations[i], eps[i], dims[i], outs[i].dtype)
        layer = rule.normalize_layer(weight, us[i], vs[i], *constants)
        for out, made in zip((outs[i], u, v, stats[i]), layer, strict=True):
            out.copy_(made)
    for i, pair in enumerate(pairs):  # at the end: a layer that fails leaves all as they were
        if iterations[i] > 0:
            for state, new in zip((us[i], vs[i]), pair, strict=True):
                state.copy_(new)


@torch.no_grad()
def run_backward(rule: Rule, *arguments: Any) -> None:
    """The op ``normalize_backward``, u and v held constant."""
    for out, layer in _backward_layers(rule, *arguments):
        out.copy_(rule.layer_gradient(*layer))


@torch.no_grad()
def add_exact_parts(rule: Rule, *arguments: Any) -> None:
    """Adds what ``gradient="exact"`` has beside the gradient of constant u and v."""
    for out, layer in _backward_layers(rule, *arguments):
        part = rule.layer_exact_part(*layer)
        if part is not None:
            out.add_(part)


def _backward_layers(rule: Rule, *arguments: Any) -> Iterator[tuple[Tensor, tuple[Any, ...]]]:
    """Where each layer's dL/dW goes, and what the rule's formulas take."""
    grads, weights, round_state, stats, grad_weights, rows, offsets, dims, *ranks = arguments
    pairs = _vectors(rule, round_state, weights, offsets, dims)
    ranks = ranks[0] if ranks else [0.0] * len(dims)  # TOP_ONE takes them from the statistics
    layers = zip(grad_weights, grads, weights, pairs, rows, ranks, dims, strict=True)
    for out, grad, weight, (u, v), row, rank, dim in layers:
        yield out, (grad, weight, u, v, stats[row], rank, dim)


normalize = functools.partial(run, TOP_ONE)
normalize_backward = functools.partial(run_backward, TOP_ONE)
