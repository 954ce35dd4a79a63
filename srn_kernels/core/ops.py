"""The registered ops: one contract that every backend answers. Needs torch alone.

All ops write into tensors they are given and return nothing, so that they can be functionalised.
For ``n`` layers with matrix views of (rows_i, columns_i), of which the rule keeps k_i pairs u, v:

weights       n tensors, float32, bfloat16, float16 or float64, dense in any memory order
us, vs        the state: (rows_i,) and (columns_i,) for k_i = 1, else (rows_i, k_i) and
              (columns_i, k_i); float32, or float64 for float64 weights; all layers of a call share
              one state dtype; written where ``iterations[i] > 0``
outs          factor W_hat, with the weights' sizes and strides; float64 only for float64 weights;
              the factor is 1 without gain and soft bound (:mod:`srn_kernels.maths.bound`)
round_state   flat, in the state dtype: layer i's unit u starts at ``offsets[i]``, its v
              ``padded(k_i rows_i)`` later; what backward needs, untouched by later rounds
stats         (n, 11) float64, the columns of :class:`srn_kernels.maths.scalars.Stats`
iterations    power iterations; 0: evaluation (u/|u|, v/|v|, no change of state); -1: repeat the
              round whose round_state and stats are given
dims          the output dimension of each weight
gains         learned gains, one element each; in a backward grad_gains, where their gradients go
gained        for each layer the place of its gain, -1: it has none; empty: no layer has one
sigma_max     soft bounds, 0: none; empty: no layer has one. ``through``: whether their divisor
              moves with W in the gradient
scaled        of a backward: whether a layer's factor is anything but 1; empty: none
rows          of a backward: the layers' places in the round
gradient      "frozen" or "exact"
rule          a name of :func:`srn_kernels.maths.rules.named`; where kernels do not serve it, plain
              PyTorch does, whatever the backend
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from srn_kernels import backends
from srn_kernels.backends import host, reference
from srn_kernels.maths.matrix import matrix_shape, state_layout
from srn_kernels.maths.rules import named
from srn_kernels.maths.scalars import STATS

# The only list of each op's arguments; the functions below take them in this order.
_SCHEMAS = {
    "normalize": "(Tensor[] weights, Tensor(a!)[] us, Tensor(b!)[] vs, Tensor(c!)[] outs, "
    "Tensor(d!) round_state, Tensor(e!) stats, int[] offsets, float[] target_ranks, "
    "int[] iterations, int[] dims, float[] eps, Tensor[] gains, int[] gained, "
    "float[] sigma_max, bool[] through, str rule, str backend) -> ()",
    "normalize_backward": "(Tensor[] grads, Tensor[] weights, Tensor round_state, Tensor stats, "
    "Tensor(a!)[] grad_weights, int[] rows, int[] offsets, int[] dims, Tensor(b!)[] grad_gains, "
    "int[] gained, bool[] scaled, float[] target_ranks, float[] eps, str gradient, str rule, "
    "str backend) -> ()",
    "project": "(Tensor(a!)[] weights, Tensor(b!)[] us, Tensor(c!)[] vs, float[] target_ranks, "
    "int[] iterations, int[] dims, float[] eps, str backend) -> ()",
}


def _tell_of(us: list[Tensor], vs: list[Tensor], iterations: list[int]) -> None:
    """Tells autograd which u and v have moved."""
    for vectors in (us, vs):
        if min(iterations) <= 0:
            vectors = [x for x, n in zip(vectors, iterations, strict=True) if n > 0]
        host.tell_autograd(vectors)


def _normalize(*arguments: Any) -> None:
    *lists, rule, backend = arguments
    rule = named(rule)
    if rule.kernels:
        backends.load(backend).normalize(*lists)
    else:
        reference.run(rule, *lists)
    us, vs, iterations = lists[1], lists[2], lists[8]
    _tell_of(us, vs, iterations)


def _normalize_backward(*arguments: Any) -> None:
    *lists, scaled, target_ranks, eps, gradient, rule, backend = arguments
    rule = named(rule)
    if rule.kernels and backend != "reference":
        backends.load(backend).normalize_backward(*lists)
    else:
        reference.run_backward(rule, *lists, scaled, target_ranks, eps)
    if gradient == "exact":
        reference.add_exact_parts(rule, *lists[:8], scaled, target_ranks)


def _project(*arguments: Any) -> None:
    weights, us, vs, target_ranks, iterations, dims, eps, backend = arguments
    offsets, size = state_layout([matrix_shape(w, d) for w, d in zip(weights, dims, strict=True)])
    round_state = us[0].new_empty(size)
    stats = us[0].new_empty((len(weights), len(STATS)), dtype=torch.float64)
    lists = (weights, us, vs, weights, round_state, stats, offsets, target_ranks, iterations)
    backends.load(backend).normalize(*lists, dims, eps)
    host.tell_autograd(weights)
    _tell_of(us, vs, iterations)


_library = torch.library.Library("srn_kernels", "DEF")
_KERNELS = {"normalize": _normalize, "normalize_backward": _normalize_backward, "project": _project}
for _name, _kernel in _KERNELS.items():
    _library.define(_name + _SCHEMAS[_name])
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"srn_kernels::{_name}", lambda *args: None, lib=_library)

_ops = torch.ops.srn_kernels


def _undispatched() -> bool:
    """Plain eager mode, where the dispatcher would only add 10 us to a call."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._len_torch_dispatch_stack() == 0
    )


def normalize(*arguments: Any) -> None:
    """The op of this name."""
    (_normalize if _undispatched() else _ops.normalize.default)(*arguments)


def normalize_backward(*arguments: Any) -> None:
    """The op of this name."""
    (_normalize_backward if _undispatched() else _ops.normalize_backward.default)(*arguments)


def project(*arguments: Any) -> None:
    """The op of this name."""
    (_project if _undispatched() else _ops.project.default)(*arguments)
