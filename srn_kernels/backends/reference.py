"""The backend's verbs over :mod:`srn_kernels.reference`: any device, plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from srn_kernels.maths.matrix import round_vectors
from srn_kernels.maths.top_one import layer_gradient, normalize_layer, repeat_layer

DEVICES = None  # any


STATE_DTYPES = frozenset({torch.float32, torch.float64})


def unavailable_reason() -> str | None:
    return None


def normalize(
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
    with torch.no_grad():
        for i, (weight, u, v) in enumerate(zip(weights, us, vs, strict=True)):
            round_u, round_v = round_vectors(round_state, offsets[i], weight, dims[i])
            if iterations[i] < 0:
                w_hat = repeat_layer(weight, round_u, round_v, stats[i], dims[i])
                outs[i].copy_(w_hat)
                continue
            layer = normalize_layer(
                weight, u, v, target_ranks[i], iterations[i], eps[i], dims[i], outs[i].dtype
            )
            round_u.copy_(layer.u)
            round_v.copy_(layer.v)
            stats[i].copy_(layer.stats)
            if iterations[i] > 0:
                u.copy_(layer.u)
                v.copy_(layer.v)
            outs[i].copy_(layer.weight)


def normalize_backward(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    round_state: Tensor,
    stats: Tensor,
    grad_weights: Sequence[Tensor],
    rows: Sequence[int],
    offsets: Sequence[int],
    dims: Sequence[int],
) -> None:
    with torch.no_grad():
        for i, (grad, weight) in enumerate(zip(grads, weights, strict=True)):
            u, v = round_vectors(round_state, offsets[i], weight, dims[i])
            grad_weights[i].copy_(layer_gradient(grad, weight, u, v, stats[rows[i]], dims[i]))
