"""The reference against the float64 oracle, finite differences and its own closed-form gradient."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from oracle import DTYPES, LAYOUTS, SMALL, dtype_id
from torch import Tensor

from srn_kernels import reference
from srn_kernels.maths.matrix import from_matrix, matrix
from srn_kernels.maths.scalars import Stats
from srn_kernels.maths.top_one import TOP_ONE

UNIT = oracle.unit_of(torch.float64)
# (shape, target): stable rank lowered, lowered to 1, not lowered, no target.
BRANCHES = [((6, 9), 1.2), ((6, 9), 1.0), ((9, 6), 5.9), ((4, 7), math.inf)]
BRANCH_IDS = ["active", "rank-one", "rank-reached", "spectral"]


def layer_of(shape: tuple[int, int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    w = torch.randn(shape, dtype=torch.float64)
    if min(shape) > 4:  # one direction stands out, so that 5.9 is above the stable rank
        w += 3 * torch.outer(torch.randn(shape[0]), torch.randn(shape[1]))
    w = w.to(dtype)
    return (w, *oracle.make_state(w))


@pytest.mark.parametrize("iterations", [0, 1, 2, 5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_shape_and_target_agrees_with_the_oracle(layout, iterations):
    for shape in SMALL:
        for fraction in (0.0, 0.3, 0.9, math.inf):
            weight, dim = oracle.make_weight(layout, shape, torch.float64)
            u, v = oracle.make_state(weight, dim)
            rank = math.inf if min(shape) == 1 else max(1.0, fraction * min(shape))
            layer = TOP_ONE.normalize_layer(weight, u, v, rank, iterations, 1e-12, dim)
            oracle.assert_forward(
                weight,
                dim,
                (u, v),
                rank,
                iterations,
                layer.weight,
                layer.u,
                layer.v,
                stats=layer.stats,
                what=f"{shape}, rank {rank}",
            )


@pytest.mark.parametrize(("shape", "rank"), BRANCHES, ids=BRANCH_IDS)
def test_branches_are_the_ones_meant(shape, rank):
    w, u, v = layer_of(shape)
    layer = TOP_ONE.normalize_layer(w, u, v, rank, 5, 1e-12, 0)
    active = rank < 2
    assert Stats(*layer.stats).branch == (oracle.STABLE_RANK if active else oracle.SPECTRAL)


def test_one_step_is_that_of_torch_spectral_norm_with_no_target():
    linear = torch.nn.Linear(7, 5, dtype=torch.float64)
    torch.nn.utils.parametrizations.spectral_norm(linear, n_power_iterations=1)
    norm = linear.parametrizations.weight[0]
    u, v = norm._u.clone(), norm._v.clone()
    weight = linear.parametrizations.weight.original.detach()
    layer = TOP_ONE.normalize_layer(weight, u, v, math.inf, 1, 1e-12, 0)
    # Both compute in float64; a dozen roundings each.
    torch.testing.assert_close(layer.weight, linear.weight, rtol=0, atol=64 * UNIT)
    torch.testing.assert_close(layer.u, norm._u, rtol=0, atol=64 * UNIT)
    torch.testing.assert_close(layer.v, norm._v, rtol=0, atol=64 * UNIT)


def difference_quotient(
    w: Tensor, u: Tensor, v: Tensor, rank: float, g: Tensor, direction: Tensor
) -> float:
    """d/dh <G, W_hat(W + h D)> of the oracle, u and v constant, by a fourth-order stencil."""

    def loss(h: float) -> float:
        return float((g * oracle.normalized(w + h * direction, u, v, rank).w_hat).sum())

    h = 1e-3
    return (8 * (loss(h) - loss(-h)) - (loss(2 * h) - loss(-2 * h))) / (12 * h)


@pytest.mark.parametrize("iterations", [0, 1, 2])
@pytest.mark.parametrize(("shape", "rank"), BRANCHES, ids=BRANCH_IDS)
def test_autograd_through_the_reference_is_the_derivative_with_u_and_v_constant(
    shape, rank, iterations
):
    w, u, v = layer_of(shape)
    g = torch.randn_like(w)
    w.requires_grad_()
    layer = TOP_ONE.normalize_layer(w, u, v, rank, iterations, 1e-12, 0)
    (grad,) = torch.autograd.grad(layer.weight, w, g)
    for _ in range(5):
        direction = torch.nn.functional.normalize(torch.randn_like(w), dim=(0, 1))
        quotient = difference_quotient(w.detach(), layer.u, layer.v, rank, g, direction)
        # Truncation: h^4 times the fifth derivative over 30 (of order 5! / sigma^5), h = 1e-3.
        scale = float(g.norm()) / min(float(Stats(*layer.stats).sigma), 1.0) ** 5
        assert abs(quotient - float((grad * direction).sum())) <= 1e-10 * scale + 1e-11
    expected = oracle.gradient(oracle.normalized(w.detach(), layer.u, layer.v, rank), g)
    bound = 1000 * UNIT * float(g.norm()) / min(float(Stats(*layer.stats).sigma), 1.0)
    oracle.assert_within(grad, expected, bound, "dL/dW")


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(("shape", "rank"), BRANCHES, ids=BRANCH_IDS)
def test_layer_gradient_equals_autograd_to_second_order(shape, rank, dim):
    w, u, v = layer_of(shape)
    w = (w if dim == 0 else w.T.contiguous()).requires_grad_()
    g = torch.randn_like(w).requires_grad_()
    layer = TOP_ONE.normalize_layer(w, u, v, rank, 0, 1e-12, dim)
    (expected,) = torch.autograd.grad(layer.weight, w, g, create_graph=True)
    actual = TOP_ONE.layer_gradient(g, w, layer.u, layer.v, layer.stats, 1.0, dim)
    bound = 1000 * UNIT * float(g.detach().norm()) / min(float(Stats(*layer.stats).sigma), 1.0)
    oracle.assert_within(actual, expected.detach(), bound, "first order")
    probe = torch.randn_like(w)
    wanted = torch.autograd.grad(expected, (w, g), probe, materialize_grads=True)
    got = torch.autograd.grad(actual, (w, g), probe, materialize_grads=True)
    for name, x, y in zip(("W", "G"), got, wanted, strict=True):
        oracle.assert_within(x, y, 100 * bound, f"second order in {name}")


@pytest.mark.parametrize(("shape", "rank"), BRANCHES, ids=BRANCH_IDS)
def test_layer_gradient_passes_gradgradcheck(shape, rank):
    w, u, v = layer_of(shape)
    layer = TOP_ONE.normalize_layer(w, u, v, rank, 0, 1e-12, 0)

    def value(w: Tensor) -> Tensor:
        return TOP_ONE.normalize_layer(w, layer.u, layer.v, rank, 0, 1e-12, 0).weight

    def gradient(g: Tensor, w: Tensor) -> Tensor:
        return TOP_ONE.layer_gradient(g, w, layer.u, layer.v, layer.stats, 1.0, 0)

    inputs = (torch.randn_like(w).requires_grad_(), w.requires_grad_())
    assert torch.autograd.gradcheck(value, w)
    assert torch.autograd.gradcheck(gradient, inputs)
    assert torch.autograd.gradgradcheck(value, w)


@pytest.mark.parametrize("branch", ["zero", "vanishing"])
def test_passing_through_has_the_identity_as_gradient(branch):
    w, u, v = layer_of((4, 6))
    w = (w * {"zero": 0.0, "vanishing": 1e-14}[branch]).requires_grad_()
    layer = TOP_ONE.normalize_layer(w, u, v, 2.0, 1, 1e-12, 0)
    g = torch.randn_like(w)
    (grad,) = torch.autograd.grad(layer.weight, w, g)
    assert torch.equal(layer.weight, w)
    assert torch.equal(grad, g)
    assert torch.equal(TOP_ONE.layer_gradient(g, w, u, v, layer.stats, 1.0, 0), g)


def test_target_one_active_has_gradient_zero():
    w, u, v = layer_of((4, 6))
    w.requires_grad_()
    layer = TOP_ONE.normalize_layer(w, u, v, 1.0, 1, 1e-12, 0)
    (grad,) = torch.autograd.grad(layer.weight, w, torch.randn_like(w))
    assert torch.equal(layer.weight, torch.outer(layer.u, layer.v))
    assert not grad.any()


@pytest.mark.parametrize("out_dtype", [None, torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_functions_move_the_state_in_training_and_honour_dims_and_out_dtype(dtype, out_dtype):
    shapes = [(5, 18), (18, 5), (0, 3)]
    weights = [torch.randn(s).to(dtype) for s in shapes[:2]] + [torch.zeros(0, 3, dtype=dtype)]
    dims = [0, 1, 0]
    states = [oracle.make_state(w, d) for w, d in zip(weights[:2], dims, strict=False)]
    us, vs = (list(x) for x in zip(*states, strict=True))
    us, vs = [*us, us[0].new_zeros(0)], [*vs, vs[0].new_zeros(3)]
    for training in (False, True):
        before = [(u.clone(), v.clone()) for u, v in zip(us, vs, strict=True)]
        outs = reference.stable_rank_normalize(
            weights, us, vs, [2.0] * 3, dims=dims, training=training, out_dtype=out_dtype
        )
        assert all(o.dtype == (out_dtype or dtype) for o in outs)
        assert outs[2].shape == (0, 3)
        for i in range(2):
            pair = us[i], vs[i]
            if not training:
                assert all(map(torch.equal, pair, before[i]))
                pair = oracle.iterate(oracle.matrix_of(weights[i], dims[i]), *before[i], 0)
            oracle.assert_forward(
                weights[i], dims[i], before[i], 2.0, int(training), outs[i], *pair
            )
    # Projection writes the same numbers over the weights.
    expected = reference.stable_rank_normalize(
        weights, [u.clone() for u in us], [v.clone() for v in vs], [2.0] * 3, dims=dims
    )
    reference.stable_rank_project_(weights, us, vs, [2.0] * 3, dims=dims)
    assert all(torch.equal(w, e) for w, e in zip(weights, expected, strict=True))


def test_matrix_views_and_their_inverse():
    for layout in LAYOUTS:
        weight, dim = oracle.make_weight(layout, (5, 18), torch.float64)
        w = matrix(weight, dim)
        assert torch.equal(w, oracle.matrix_of(weight, dim))
        assert torch.equal(from_matrix(w, weight, dim), weight)
