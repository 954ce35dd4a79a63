"""The registered ops: one contract that every backend answers. Needs torch alone.

All ops write into tensors they are given and return nothing, so that they can be functionalised.
For ``n`` layers with matrix views of (rows_i, columns_i):

weights       n tensors, float32, bfloat16, float16 or float64, dense in any memory order
us, vs        the state: (rows_i,) and (columns_i,), float32, or float64 for float64 weights; all
              layers of a call share one state dtype; written where ``iterations[i] > 0``
outs          W_hat, with the weights' sizes and strides; float64 only for float64 weights
round_state   flat, in the state dtype: layer i's unit u starts at ``offsets[i]``, its v
              ``padded(rows_i)`` later; what backward needs, untouched by later rounds
stats         (n, 8) float64, the columns named by :data:`srn_kernels.reference.STATS`
iterations    power iterations; 0: evaluation (u/|u|, v/|v|, no change of state); -1: repeat the
              round whose round_state and stats are given
dims          the output dimension of each weight
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from srn_kernels import backends
from srn_kernels.core import exact
from srn_kernels.maths import top_k
from srn_kernels.maths.matrix import state_layout
from srn_kernels.maths.scalars import STATS

_library = torch.library.Library("srn_kernels", "DEF")


_library.define(
    "normalize(Tensor[] weights, Tensor(a!)[] us, Tensor(b!)[] vs, Tensor(c!)[] outs, "
    "Tensor(d!) round_state, Tensor(e!) stats, int[] offsets, float[] target_ranks, "
    "int[] iterations, int[] dims, float[] eps, str backend) -> ()"
)


_library.define(
    "normalize_backward(Tensor[] grads, Tensor[] weights, Tensor round_state, Tensor stats, "
    "Tensor(a!)[] grad_weights, int[] rows, int[] offsets, int[] dims, str backend) -> ()"
)


_library.define(
    "add_turning(Tensor[] grads, Tensor[] weights, Tensor round_state, Tensor stats, "
    "Tensor(a!)[] grad_weights, int[] rows, int[] offsets, int[] dims) -> ()"
)


_library.define(
    "normalize_block(Tensor[] weights, Tensor(a!)[] us, Tensor(b!)[] vs, Tensor(c!)[] outs, "
    "Tensor(d!) round_state, Tensor(e!) stats, int[] offsets, float[] target_ranks, "
    "int[] iterations, int[] dims, float[] eps, int[] preserve) -> ()"
)


_library.define(
    "normalize_block_backward(Tensor[] grads, Tensor[] weights, Tensor round_state, Tensor stats, "
    "Tensor(a!)[] grad_weights, int[] rows, int[] offsets, float[] target_ranks, int[] dims, "
    "int[] preserve, str gradient) -> ()"
)


_library.define(
    "project(Tensor(a!)[] weights, Tensor(b!)[] us, Tensor(c!)[] vs, float[] target_ranks, "
    "int[] iterations, int[] dims, float[] eps, str backend) -> ()"
)


def _moved(vectors: Sequence[Tensor], iterations: Sequence[int]) -> list[Tensor]:
    return [x for x, n in zip(vectors, iterations, strict=True) if n > 0 and not x.is_inference()]


def _normalize(
    weights,
    us,
    vs,
    outs,
    round_state,
    stats,
    offsets,
    target_ranks,
    iterations,
    dims,
    eps,
    backend,
):
    backends.load(backend).normalize(
        weights, us, vs, outs, round_state, stats, offsets, target_ranks, iterations, dims, eps
    )
    # Kernels write through plain pointers: tell autograd.
    torch.autograd.graph.increment_version(_moved(us, iterations) + _moved(vs, iterations))


def _normalize_backward(
    grads, weights, round_state, stats, grad_weights, rows, offsets, dims, backend
):
    backends.load(backend).normalize_backward(
        grads, weights, round_state, stats, grad_weights, rows, offsets, dims
    )


def _add_turning(grads, weights, round_state, stats, grad_weights, rows, offsets, dims):
    exact.add_turning(grads, weights, round_state, stats, grad_weights, rows, offsets, dims)


def _normalize_block(
    weights,
    us,
    vs,
    outs,
    round_state,
    stats,
    offsets,
    target_ranks,
    iterations,
    dims,
    eps,
    preserve,
):
    top_k.normalize(
        weights,
        us,
        vs,
        outs,
        round_state,
        stats,
        offsets,
        target_ranks,
        iterations,
        dims,
        eps,
        preserve,
    )


def _normalize_block_backward(
    grads,
    weights,
    round_state,
    stats,
    grad_weights,
    rows,
    offsets,
    target_ranks,
    dims,
    preserve,
    gradient,
):
    top_k.normalize_backward(
        grads,
        weights,
        round_state,
        stats,
        grad_weights,
        rows,
        offsets,
        target_ranks,
        dims,
        preserve,
        gradient,
    )


def _project(weights, us, vs, target_ranks, iterations, dims, eps, backend):
    shapes = [(w.shape[d], w.numel() // w.shape[d]) for w, d in zip(weights, dims, strict=True)]
    offsets, size = state_layout(shapes)
    round_state = us[0].new_empty(size)
    stats = us[0].new_empty((len(weights), len(STATS)), dtype=torch.float64)
    backends.load(backend).normalize(
        weights, us, vs, weights, round_state, stats, offsets, target_ranks, iterations, dims, eps
    )
    moved = _moved(us, iterations) + _moved(vs, iterations)
    torch.autograd.graph.increment_version([*weights, *moved])


for _name, _kernel in (
    ("normalize", _normalize),
    ("normalize_backward", _normalize_backward),
    ("add_turning", _add_turning),
    ("normalize_block", _normalize_block),
    ("normalize_block_backward", _normalize_block_backward),
    ("project", _project),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"srn_kernels::{_name}", lambda *args: None, lib=_library)


project = torch.ops.srn_kernels.project.default


# What gradient="exact" adds to normalize_backward, for every backend: matrix products alone.
add_turning = torch.ops.srn_kernels.add_turning.default


# Layers that keep k != 1 singular values; u and v are (rows, size) and (columns, size) blocks.
normalize_block = torch.ops.srn_kernels.normalize_block.default


normalize_block_backward = torch.ops.srn_kernels.normalize_block_backward.default


def _undispatched() -> bool:
    """Plain eager mode, where the dispatcher would only add 10 us to a call."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._len_torch_dispatch_stack() == 0
    )


def normalize(*arguments: Any) -> None:
    """The op of this name."""
    op = _normalize if _undispatched() else _dispatched_normalize
    op(*arguments)


def normalize_backward(*arguments: Any) -> None:
    """The op of this name."""
    op = _normalize_backward if _undispatched() else _dispatched_backward
    op(*arguments)


_dispatched_normalize = torch.ops.srn_kernels.normalize.default


_dispatched_backward = torch.ops.srn_kernels.normalize_backward.default
