"""Soft bounds and gains inside a round: every backend's numbers, gradients, what a call may be."""

from __future__ import annotations

from collections.abc import Callable

import oracle
import pytest
import torch
from live import live_backends
from scaled_rounds import check_scaled_rounds
from torch import Tensor

from srn_kernels import backends
from srn_kernels.core import ops
from srn_kernels.core.autograd import run_round
from srn_kernels.core.plan import Plan, make_plan
from srn_kernels.maths.bound import Scaling
from srn_kernels.maths.matrix import matrix_shape
from srn_kernels.maths.scalars import STATS

BACKENDS = pytest.mark.parametrize("backend", live_backends())
FLOAT64 = pytest.mark.parametrize("backend", live_backends(torch.float64))
SCALINGS = [
    Scaling(0.4, True, True),
    Scaling(50.0, True, True),
    Scaling(0.0, True, True),
    Scaling(0.4),
    Scaling(),
]


@BACKENDS
def test_rounds_of_float32_and_bfloat16_agree_with_the_oracle(backend):
    check_scaled_rounds(backends.load(backend), torch.float32)


@FLOAT64
def test_rounds_of_float64_agree_with_the_oracle(backend):
    check_scaled_rounds(backends.load(backend), torch.float64)


def made_plan(
    weights: list[Tensor], backend: str, scalings: list[Scaling], rank: float, gradient: str
) -> Plan:
    n = len(weights)
    return make_plan(
        tuple(matrix_shape(w, 0) for w in weights),
        (rank,) * n,
        (0,) * n,
        (0,) * n,
        (1e-12,) * n,
        (torch.float64,) * n,
        ("layer",) * n,
        backend,
        gradient,
        "stable_rank",
        tuple(scalings),
    )


def make_call(
    backend: str, rank: float, scalings: list[Scaling] = SCALINGS, gradient: str = "frozen"
) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """Evaluations of small float64 layers as a function of their weights and gains."""
    torch.manual_seed(0)
    weights = [torch.randn(3, 4, dtype=torch.float64).requires_grad_() for _ in scalings]
    gains = [
        torch.full((1,), 0.5 + i, dtype=torch.float64) for i, s in enumerate(scalings) if s.gain
    ]
    states = [oracle.make_state(w.detach()) for w in weights]
    plan = made_plan(weights, backend, scalings, rank, gradient)
    us, vs = [u for u, _ in states], [v for _, v in states]

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        n = len(weights)
        return run_round(plan, None, tensors[:n], us, vs, gains=tensors[n:])[:n]

    return call, [*weights, *(g.requires_grad_() for g in gains)]


@FLOAT64
@pytest.mark.parametrize("rank", [1.0, 1.3, float("inf")])
def test_first_and_second_derivatives_by_finite_differences(backend, rank):
    call, tensors = make_call(backend, rank)
    assert torch.autograd.gradcheck(call, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


@FLOAT64
@pytest.mark.parametrize("gradient", ["frozen", "exact"])
def test_a_constant_divisor_and_exact_gradients_equal_the_reference(backend, gradient):
    scalings = [Scaling(0.4, False, True), Scaling(0.4, True, True), Scaling(9.0, False)]
    found = []
    for name in (backend, "reference"):
        for graph in (False, True):
            call, tensors = make_call(name, 1.3, scalings, gradient)
            torch.manual_seed(1)
            loss = sum((torch.randn_like(x) * x).sum() for x in call(*tensors))
            found.append(torch.autograd.grad(loss, tensors, create_graph=graph))
    for result in found[:-1]:
        for x, y in zip(result, found[-1], strict=True):
            torch.testing.assert_close(x.detach(), y.detach())


@FLOAT64
def test_frozen_weights_and_frozen_gains_get_no_gradient(backend):
    call, tensors = make_call(backend, 1.3)
    for x in (tensors[0], tensors[len(SCALINGS) + 1]):
        x.requires_grad_(False)
    ones = [torch.ones(3, 4, dtype=torch.float64)] * len(SCALINGS)
    torch.autograd.backward(call(*tensors), ones)
    assert tensors[0].grad is None and tensors[len(SCALINGS) + 1].grad is None
    assert all(x.grad is not None for x in tensors if x.requires_grad)
    expected, other = make_call(backend, 1.3)
    torch.autograd.backward(expected(*other), ones)
    for x, y in zip(tensors, other, strict=True):
        assert x.grad is None or torch.equal(x.grad, y.grad)


def sample(backend: str) -> tuple[tuple, tuple]:
    """Arguments of a forward and its backward: two layers with a gain, one with a bound alone."""
    torch.manual_seed(0)
    weights = [torch.randn(s) for s in ((5, 12), (3, 4), (4, 6))]
    states = [oracle.make_state(w) for w in weights]
    offsets, size = ops.state_layout([tuple(w.shape) for w in weights])
    forward = (
        weights,
        [u for u, _ in states],
        [v for _, v in states],
        [torch.zeros_like(w) for w in weights],
        torch.zeros(size),
        torch.zeros(3, len(STATS), dtype=torch.float64),
        offsets,
        [2.0] * 3,
        [1] * 3,
        [0] * 3,
        [1e-12] * 3,
        [torch.full((1,), 1.5), torch.full((1,), 0.5, dtype=torch.bfloat16)],
        [0, -1, 1],
        [0.5, 0.5, 0.0],
        [True, False, True],
        "stable_rank",
        backend,
    )
    done = torch.utils._pytree.tree_map_only(Tensor, Tensor.clone, forward)
    ops.normalize(*done)
    backward = (
        [torch.randn_like(w) for w in weights],
        weights,
        done[4],
        done[5],
        [torch.zeros_like(w) for w in weights],
        [0, 1, 2],
        offsets,
        [0] * 3,
        [torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16)],
        [0, -1, 1],
        [True] * 3,
        [2.0] * 3,
        [1e-12] * 3,
        "frozen",
        "stable_rank",
        backend,
    )
    return forward, backward


@BACKENDS
def test_opcheck(backend):
    for op, arguments in zip(("normalize", "normalize_backward"), sample(backend), strict=True):
        torch.library.opcheck(getattr(torch.ops.srn_kernels, op).default, arguments)


@BACKENDS
def test_a_round_is_one_call_each_way(backend, monkeypatch):
    """No operation beside the two of the round: a gain costs no pass over a weight."""
    calls = []
    for verb in ("normalize", "normalize_backward"):
        whole = getattr(ops, f"_{verb}")
        monkeypatch.setattr(
            ops, f"_{verb}", lambda *a, verb=verb, f=whole: (calls.append(verb), f(*a))
        )
    weights = [torch.randn(6, 8).requires_grad_() for _ in SCALINGS]
    gains = [torch.ones(1).requires_grad_() for s in SCALINGS if s.gain]
    states = [oracle.make_state(w.detach()) for w in weights]
    plan = made_plan(weights, backend, SCALINGS, 2.0, "frozen")
    plan = plan._replace(out_dtypes=(torch.float32,) * len(weights))
    *outs, _, _ = run_round(
        plan, None, weights, [u for u, _ in states], [v for _, v in states], gains=gains
    )
    assert {out.grad_fn.name() for out in outs} == {"StableRankNormFunctionBackward"}
    torch.autograd.backward(outs, [torch.ones_like(w) for w in weights])
    assert calls == ["normalize", "normalize_backward"]
