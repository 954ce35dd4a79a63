"""The autograd node through the real kernels: orders, repeated backwards, compilation, func."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable

import oracle
import pytest
import torch
from live import live_backends
from torch import Tensor

from srn_kernels.functional import stable_rank_normalize
from srn_kernels.maths.top_one import TOP_ONE

BACKENDS = pytest.mark.parametrize("backend", live_backends(torch.float64))
FLOAT64 = torch.float64
# Shape, target, output dimension: every branch, vectors, a convolution and its transpose.
CASES = {
    "active": ((4, 6), 1.5, 0),
    "rank-one": ((4, 6), 1.0, 0),
    "rank-reached": ((4, 3), 2.999, 0),
    "spectral": ((3, 5), math.inf, 0),
    "row": ((1, 6), 2.0, 0),
    "column": ((6, 1), 2.0, 0),
    "conv": ((3, 2, 2, 2), 1.5, 0),
    "conv-transpose": ((2, 3, 2, 2), 1.5, 1),
    "last-dim": ((2, 3, 4), 2.0, -1),
}


def layer_of(case: str) -> tuple[Tensor, tuple[Tensor, Tensor], float, int]:
    shape, rank, dim = CASES[case]
    weight = torch.randn(shape, dtype=FLOAT64)
    if case == "rank-reached":
        weight += 3 * torch.outer(torch.randn(4), torch.randn(3))
    return weight.requires_grad_(), oracle.make_state(weight, dim), rank, dim


def several() -> tuple[list[Tensor], list[tuple[Tensor, Tensor]], list[float], list[int]]:
    """Three layers of one call."""
    layers = [layer_of(case) for case in ("active", "conv-transpose", "spectral")]
    return tuple(list(part) for part in zip(*layers, strict=True))


def normalizer(
    states: list[tuple[Tensor, Tensor]],
    ranks: list[float],
    dims: list[int],
    backend: str,
    *,
    training: bool = False,
    frozen: bool = True,
) -> Callable[..., tuple[Tensor, ...]]:
    """The call as a function of its weights alone; ``frozen``: each call from the same state."""

    def call(*weights: Tensor) -> tuple[Tensor, ...]:
        pairs = [(u.clone(), v.clone()) for u, v in states] if frozen else states
        us, vs = [u for u, _ in pairs], [v for _, v in pairs]
        return tuple(
            stable_rank_normalize(
                weights, us, vs, ranks, dims=dims, training=training, backend=backend
            )
        )

    return call


@BACKENDS
@pytest.mark.parametrize("case", CASES)
def test_gradcheck_and_gradgradcheck_in_evaluation(backend, case):
    weight, state, rank, dim = layer_of(case)
    call = normalizer([state], [rank], [dim], backend)
    assert torch.autograd.gradcheck(call, weight)
    assert torch.autograd.gradgradcheck(call, weight)


@BACKENDS
@pytest.mark.parametrize("case", CASES)
def test_the_gradient_in_training_is_that_of_the_moved_state_held_constant(backend, case):
    weight, state, rank, dim = layer_of(case)
    moved = state[0].clone(), state[1].clone()
    g = torch.randn_like(weight)
    training = normalizer([moved], [rank], [dim], backend, training=True, frozen=False)
    (grad,) = torch.autograd.grad(training(weight), weight, g)
    evaluation = normalizer([moved], [rank], [dim], backend)
    assert torch.autograd.gradcheck(evaluation, weight)
    (expected,) = torch.autograd.grad(evaluation(weight), weight, g)
    # The same numbers; sigma comes from |t| / |s| there and from u^T W v here.
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-12)


@BACKENDS
@pytest.mark.parametrize("training", [False, True])
def test_gradcheck_of_several_layers_in_one_call(backend, training):
    weights, states, ranks, dims = several()
    if training:
        # At the top pair, iterating does not move u and v to first order where the gradient of
        # sigma is concerned; the frozen rule equals the derivative for spectral normalisation.
        ranks = [math.inf] * 3
        for i, (w, dim) in enumerate(zip(weights, dims, strict=True)):
            states[i] = oracle.iterate(oracle.matrix_of(w, dim), *states[i], 3000)
    call = normalizer(states, ranks, dims, backend, training=training)
    assert torch.autograd.gradcheck(call, weights)
    if not training:
        assert torch.autograd.gradgradcheck(call, weights)


@BACKENDS
@pytest.mark.parametrize("case", CASES)
def test_second_order_through_create_graph_equals_the_reference(backend, case):
    weight, (u, v), rank, dim = layer_of(case)

    def penalty(out: Tensor) -> Tensor:
        """The gradient of a gradient's norm, as a gradient penalty has it."""
        (first,) = torch.autograd.grad(out.pow(3).sum(), weight, create_graph=True)
        return torch.autograd.grad((first.square() + first.sin()).sum(), weight)[0]

    target = math.inf if min(oracle.matrix_of(weight, dim).shape) == 1 else rank
    (out,) = normalizer([(u, v)], [rank], [dim], backend, training=True)(weight)
    expected = TOP_ONE.normalize_layer(weight, u, v, target, 1, 1e-12, dim % weight.dim())
    actual, wanted = penalty(out), penalty(expected.weight)
    torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)


@BACKENDS
def test_first_order_is_the_same_with_and_without_create_graph(backend):
    weights, states, ranks, dims = several()
    outs = normalizer(states, ranks, dims, backend, training=True)(*weights)
    grads = [torch.randn_like(o) for o in outs]
    plain = torch.autograd.grad(outs, weights, grads, retain_graph=True)
    graph = torch.autograd.grad(outs, weights, grads, create_graph=True)
    for x, y in zip(plain, graph, strict=True):
        assert not x.requires_grad
        torch.testing.assert_close(x, y.detach(), rtol=1e-12, atol=1e-12)


@BACKENDS
def test_several_backwards_reach_one_round(backend):
    weights, states, ranks, dims = several()
    call = normalizer(states, ranks, dims, backend, training=True)
    together = call(*weights)
    expected = torch.autograd.grad(
        together[0].exp().sum() + together[0].cos().sum() + together[1].sin().sum(), weights[:2]
    )
    outs = call(*weights)
    outs[0].exp().sum().backward()  # frees the graph, as two losses do
    outs[1].sin().sum().backward()
    outs[0].cos().sum().backward()
    for weight, want in zip(weights[:2], expected, strict=True):
        torch.testing.assert_close(weight.grad, want, rtol=1e-12, atol=1e-12)
    assert weights[2].grad is None


@BACKENDS
def test_a_later_round_does_not_change_the_gradient_of_an_earlier_one(backend):
    weights, states, ranks, dims = several()
    apart = normalizer(states, ranks, dims, backend, training=True)(*weights)
    grads = [torch.randn_like(o) for o in apart]
    expected = torch.autograd.grad(apart, weights, grads)
    call = normalizer(states, ranks, dims, backend, training=True, frozen=False)
    first, second = call(*weights), call(*weights)
    assert not torch.equal(first[0], second[0])
    call(*weights)
    for u, v in states:
        u.zero_()
        v.zero_()
    del second
    for x, y in zip(torch.autograd.grad(first, weights, grads), expected, strict=True):
        assert torch.equal(x, y)


@BACKENDS
def test_layers_without_a_gradient_get_none_and_the_others_their_own(backend):
    weights, states, ranks, dims = several()
    weights[0].requires_grad_(False)
    outs = normalizer(states, ranks, dims, backend)(*weights)
    outs[2].square().sum().backward()
    assert [w.grad is None for w in weights] == [True, True, False]
    w = weights[2].detach()
    layer = oracle.normalized(w, *oracle.iterate(w, *states[2], 0), ranks[2])
    oracle.assert_gradient(layer, 2 * outs[2].detach(), weights[2].grad, 0, "weights[2]")


@BACKENDS
def test_without_gradients_there_is_no_graph(backend):
    weights, states, ranks, dims = several()
    call = normalizer(states, ranks, dims, backend)
    with torch.no_grad():
        assert not any(o.requires_grad for o in call(*weights))
    frozen = [w.detach() for w in weights]
    assert not any(o.requires_grad for o in call(*frozen))
    with torch.inference_mode():
        inferred = call(*frozen)
    assert all(map(torch.equal, inferred, call(*frozen)))


@BACKENDS
@pytest.mark.parametrize("change", ["optimiser", "copy", "data"])
def test_a_weight_changed_in_place_before_backward_raises_and_names_the_layer(backend, change):
    weights, states, ranks, dims = several()
    outs = normalizer(states, ranks, dims, backend)(*weights)
    with torch.no_grad():
        if change == "optimiser":
            weights[1].grad = torch.ones_like(weights[1])
            torch.optim.SGD([weights[1]], lr=0.1).step()
            weights[1].grad = None
        elif change == "copy":
            weights[1].copy_(torch.randn_like(weights[1]))
        else:
            weights[1].data = weights[1].data.clone()
    outs[0].sum().backward()  # the other layers are as they were
    if change == "data":  # the round keeps the old values, which are the right ones
        outs[1].sum().backward()
        assert weights[1].grad is not None
        return
    with pytest.raises(RuntimeError, match=r"weights\[1\].*changed in place"):
        outs[1].sum().backward()
    assert weights[1].grad is None


@BACKENDS
def test_a_non_dense_weight_is_copied_and_may_change(backend):
    base = torch.randn(4, 12, dtype=FLOAT64, requires_grad=True)
    weight = base[:, ::2]
    state = oracle.make_state(weight)
    (out,) = normalizer([state], [1.5], [0], backend)(weight)
    w = weight.detach().clone()
    layer = oracle.normalized(w, *oracle.iterate(w, *state, 0), 1.5)
    g = torch.randn_like(out)
    with torch.no_grad():
        base.zero_()
    (grad,) = torch.autograd.grad(out, base, g)
    assert not grad[:, 1::2].any()
    oracle.assert_gradient(layer, g, grad[:, ::2], 0, "slice")


@BACKENDS
def test_gradients_of_any_memory_layout_are_understood(backend):
    weight, state, rank, dim = layer_of("conv")
    call = normalizer([state], [rank], [dim], backend)
    w = oracle.matrix_of(weight, dim)
    layer = oracle.normalized(w, *oracle.iterate(w, *state, 0), rank)
    dense = torch.randn(3, 2, 2, 2, dtype=FLOAT64)
    for g in (
        dense,
        dense.to(memory_format=torch.channels_last),
        torch.randn(6, 2, 2, 4, dtype=FLOAT64)[::2, :, :, ::2],
        torch.tensor(0.5, dtype=FLOAT64).expand(3, 2, 2, 2),
    ):
        (grad,) = torch.autograd.grad(call(weight), weight, g)
        assert grad.stride() == weight.stride()
        oracle.assert_gradient(layer, g, grad, dim, f"strides {g.stride()}")


@BACKENDS
def test_a_graph_that_is_dropped_frees_its_weights(backend):
    weight, state, rank, dim = layer_of("active")
    (out,) = normalizer([state], [rank], [dim], backend)(weight)
    seen = weakref.ref(weight)
    gc.disable()  # by reference counts alone: the node is in no cycle
    try:
        del weight, out
        assert seen() is None
    finally:
        gc.enable()


# Compilation.


def compiled_step(
    weights: list[Tensor], states: list[tuple[Tensor, Tensor]], backend: str, compiler: str | None
) -> list[Tensor]:
    """Two forwards, then one backward; everything that comes out, state included."""
    weights = [w.detach().clone().requires_grad_() for w in weights]
    us, vs = [u.clone() for u, _ in states], [v.clone() for _, v in states]
    x = torch.linspace(-1, 1, 24, dtype=weights[0].dtype).view(4, 6)

    def forward(weights: list[Tensor], us: list[Tensor], vs: list[Tensor], x: Tensor) -> Tensor:
        outs = stable_rank_normalize(
            weights, us, vs, [1.5, 2.0], dims=[0, 1], out_dtype=None, backend=backend
        )
        return (x @ outs[0].T).tanh().sum() + outs[1].square().sum()

    if compiler is not None:
        forward = torch.compile(forward, fullgraph=True, backend=compiler)
    first = forward(weights, us, vs, x)
    between = [t.clone() for t in (*us, *vs)]
    second = forward(weights, us, vs, 2 * x)
    (first + 3 * second).backward()
    grads = [w.grad for w in weights]
    return [first.detach(), second.detach(), *between, *us, *vs, *grads]


@pytest.mark.parametrize("backend", live_backends())
@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64], ids=oracle.dtype_id)
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_without_graph_breaks_two_forwards_and_a_backward_equal_eager(
    backend, dtype, compiler
):
    if compiler == "inductor" and dtype == FLOAT64:
        pytest.skip("inductor once a backend is enough")
    torch._dynamo.reset()
    weights = [torch.randn(5, 6).to(dtype), torch.randn(3, 4, 2, 2).to(dtype)]
    states = [oracle.make_state(w, d) for w, d in zip(weights, (0, 1), strict=True)]
    eager = compiled_step(weights, states, backend, None)
    compiled = compiled_step(weights, states, backend, compiler)
    # The kernels are the same; only what surrounds them (tanh, sums) may be fused differently.
    tolerance = 64 * oracle.unit_of(dtype)
    for x, y in zip(compiled, eager, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


# Transforms.


@BACKENDS
def test_func_grad_and_vmap_over_something_else_work(backend):
    weights, states, ranks, dims = several()
    x = torch.randn(7, 6, dtype=FLOAT64)
    call = normalizer(states, ranks, dims, backend)

    def loss(x: Tensor) -> Tensor:
        return (call(*weights)[0] @ x).sin().sum()

    (w_hat, *_) = (o.detach() for o in call(*weights))
    values = torch.func.vmap(loss)(x)
    torch.testing.assert_close(values, (x @ w_hat.T).sin().sum(1))
    expected = torch.cos(x @ w_hat.T) @ w_hat
    torch.testing.assert_close(torch.func.grad(loss)(x[0]), expected[0])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x), expected)


@BACKENDS
def test_func_grad_over_the_weights_equals_autograd(backend):
    weights, states, ranks, dims = several()
    call = normalizer(states, ranks, dims, backend)

    def loss(weights: tuple[Tensor, ...]) -> Tensor:
        return sum(o.sin().sum() for o in call(*weights))

    expected = torch.autograd.grad(loss(tuple(weights)), weights)
    actual = torch.func.grad(loss)(tuple(w.detach() for w in weights))
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@BACKENDS
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("dense", [True, False])
def test_vmap_over_weights_is_refused_clearly(backend, dense, requires_grad):
    weights = torch.randn(3, 4, 6) if dense else torch.randn(3, 4, 12)[..., ::2]
    u, v = oracle.make_state(weights[0])
    weights.requires_grad_(requires_grad)

    def call(w: Tensor) -> Tensor:
        return stable_rank_normalize([w], [u], [v], [2.0], training=False, backend=backend)[0]

    with pytest.raises(RuntimeError, match=r"vmap over the weights .* is not supported"):
        torch.func.vmap(call)(weights)
