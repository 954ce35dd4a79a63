"""The functional core through every backend: edge cases, layers of all kinds, and projection."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from live import live_backends
from one_layer import run
from oracle import DTYPES, LAYOUTS, NOT_DENSE, dtype_id

from srn_kernels.functional import stable_rank_normalize, stable_rank_project_

BACKENDS = pytest.mark.parametrize("backend", live_backends())
FLOAT64_BACKENDS = pytest.mark.parametrize("backend", live_backends(torch.float64))
NARROW = [torch.float32, torch.bfloat16, torch.float16]


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("layout", [*LAYOUTS, *NOT_DENSE])
def test_every_layout_keeps_its_strides_and_agrees_with_the_oracle(backend, layout, dtype):
    for iterations in (0, 1):
        weight, dim = oracle.make_weight(layout, (27, 90), dtype)
        result = run(backend, weight, 2.0, iterations=iterations, dim=dim)
        result.check(2.0, iterations=iterations, dim=dim)
        if layout in LAYOUTS:
            assert result.out.stride() == weight.stride()
            assert result.grad.stride() == weight.stride()


# The edge-case table.


@BACKENDS
@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1)])
@pytest.mark.parametrize("rank", [1.0, 3.0, math.inf])
def test_a_vector_is_only_divided_by_its_norm(backend, shape, rank):
    result = run(backend, torch.randn(shape), rank, iterations=2)
    result.check(rank, iterations=2)
    expected = result.weight.double() / result.weight.double().norm()
    # Two products and a division: a dozen roundings.
    oracle.assert_within(result.out, expected, 12 * oracle.unit_of(torch.float32), "W_hat")


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_target_one_gives_exactly_the_outer_product_and_gradient_zero(backend, dtype):
    result = run(backend, torch.randn(9, 20).to(dtype), 1.0)
    assert torch.equal(result.out, torch.outer(result.u, result.v).to(dtype))
    assert not result.grad.any()


@BACKENDS
def test_a_target_above_the_stable_rank_is_plain_spectral_normalisation(backend):
    weight = torch.randn(9, 20) + 5 * torch.outer(torch.randn(9), torch.randn(20))
    state = oracle.make_state(weight)
    plain = run(backend, weight, math.inf, state=tuple(x.clone() for x in state))
    assert oracle.normalized(weight.double(), plain.u, plain.v, 8.0).branch == oracle.SPECTRAL
    reached = run(backend, weight, 8.0, state=state)
    assert torch.equal(reached.out, plain.out)
    reached.check(8.0)


@BACKENDS
@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("scale", [0.0, 1e-14])
def test_a_zero_or_vanishing_weight_passes_through_and_recovers(backend, dtype, iterations, scale):
    weight = (torch.randn(6, 10, dtype=torch.float64) * scale).to(dtype)
    result = run(backend, weight, 2.0, iterations=iterations)
    assert torch.equal(result.out, weight)
    assert torch.equal(result.grad, result.g)
    assert not result.moved
    awake = run(
        backend, torch.randn(6, 10).to(dtype), 2.0, state=(result.u, result.v), iterations=3
    )
    awake.check(2.0, iterations=3)
    assert awake.moved


@BACKENDS
@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_weight_shows_and_does_not_poison_the_state(backend, dtype, iterations, value):
    # In the vectorised part of a row, and in its end; the first row block and the last.
    for row, column in ((0, 0), (12, 36), (3, 20)):
        weight = torch.randn(13, 37).to(dtype)
        weight[row, column] = value
        result = run(backend, weight, 2.0, iterations=iterations)
        assert not result.out.isfinite().any()
        assert not result.moved
        weight[row, column] = 0.5
        run(backend, weight, 2.0, state=(result.u, result.v), iterations=3).check(2.0, iterations=3)


@BACKENDS
@pytest.mark.parametrize("iterations", [0, 1, 2])
@pytest.mark.parametrize("scale", [1e-11, 1e-6, 1e3, 1e9, 1e12, 1e15, 1e18])
def test_float32_weights_of_any_scale_are_normalised_finitely_and_right(backend, scale, iterations):
    for shape in ((27, 63), (40, 1500)):
        for rank in (1.0, 2.5, math.inf):
            weight = torch.randn(shape) * scale
            result = run(backend, weight, rank, iterations=iterations)
            assert result.out.isfinite().all()
            assert result.grad.isfinite().all()
            result.check(rank, iterations=iterations, what=f"{shape}, rank {rank}")


@BACKENDS
@pytest.mark.parametrize("order", ["ascending", "descending", "shuffled", "columns"])
@pytest.mark.parametrize("powers", [(-12, 12), (-11, 18)], ids=str)
def test_rows_of_very_different_scales_in_one_matrix(backend, order, powers):
    rows, columns = 100, 150
    scales = torch.logspace(*powers, rows)
    scales = {
        "ascending": scales,
        "descending": scales.flip(0),
        "shuffled": scales[torch.randperm(rows)],
        "columns": torch.logspace(*powers, columns),
    }[order]
    weight = torch.randn(rows, columns) * (scales if order == "columns" else scales[:, None])
    for rank in (1.2, math.inf):
        for iterations in (0, 1, 2):
            result = run(backend, weight, rank, iterations=iterations)
            result.check(rank, iterations=iterations, what=f"rank {rank}, {iterations}")


@BACKENDS
@pytest.mark.parametrize("shrink", [(1.0, 0.3), (0.02, 1.0), (0.7, 0.6), (50.0, 3.0)])
@pytest.mark.parametrize("rank", [2.0, math.inf])
def test_evaluation_uses_unit_vectors_when_an_average_has_shrunk_them(backend, shrink, rank):
    weight = torch.randn(13, 37)
    u, v = oracle.make_state(weight)
    result = run(backend, weight, rank, state=(u * shrink[0], v * shrink[1]), iterations=0)
    result.check(rank, iterations=0)


@BACKENDS
@pytest.mark.parametrize("zeros", ["u", "v", "uv"])
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_evaluation_with_a_vector_of_zeros_passes_through(backend, zeros, scale):
    w = (scale * torch.randn(5, 7)).requires_grad_()
    u, v = torch.ones(5) * ("u" not in zeros), torch.ones(7) * ("v" not in zeros)
    options = {"training": False, "backend": backend}
    (out,) = stable_rank_normalize([w], [u], [v], [2.0], **options)
    assert torch.equal(out, w)
    grad = torch.randn(5, 7)
    out.backward(grad)
    assert torch.equal(w.grad, grad)


@BACKENDS
@pytest.mark.parametrize("rank", [2.0, math.inf])
def test_a_negative_sigma_in_evaluation_is_used_as_it_is(backend, rank):
    """W / sigma and E = u v^T, as torch: W_hat changes its sign with that of u^T v."""
    weight = torch.randn(13, 37)
    u, v = oracle.iterate(weight.double(), *oracle.make_state(weight), 2)
    pairs = [(u.float(), v.float()), (-u.float(), v.float()), (u.float(), -v.float())]
    results = [run(backend, weight, rank, state=pair, iterations=0) for pair in pairs]
    for result, sign in zip(results, (1, -1, -1), strict=True):
        result.check(rank, iterations=0)
        bound = 4 * oracle.unit_of(torch.float32)
        oracle.assert_within(result.out, sign * results[0].out.double(), bound, "W_hat")
        assert not result.moved


@FLOAT64_BACKENDS
@pytest.mark.parametrize("iterations", [0, 1, 4])
@pytest.mark.parametrize("rank", [1.0, 1.5, 4.0])
def test_before_convergence_the_frobenius_norm_is_exact_and_the_stable_rank_bounded(
    backend, rank, iterations
):
    for layout in ("linear", "conv-transpose"):
        weight, dim = oracle.make_weight(layout, (30, 63), torch.float64)
        w = oracle.matrix_of(weight, dim)
        result = run(backend, weight, rank, iterations=iterations, dim=dim)
        w_hat = oracle.matrix_of(result.out, dim)
        singular = torch.linalg.svdvals(w_hat)
        # q up to |W|_F^2 / sigma^2, whose error is a few hundred roundings.
        u, v = (oracle.iterate(w, *result.before, 0)) if iterations == 0 else (result.u, result.v)
        loose = 1e3 * oracle.unit_of(torch.float64) * float(w.norm() / abs(u @ w @ v)) ** 2
        assert oracle.normalized(w, u, v, rank).branch == oracle.STABLE_RANK
        assert abs(float(w_hat.square().sum()) - rank) <= loose * rank
        assert float(w_hat.square().sum() / singular[0] ** 2) <= rank * (1 + loose)
        assert float(singular[0]) >= 1 - loose
        if iterations == 4:  # close to the top pair by now
            assert float(singular[0]) <= 1.2


# Several layers in one call.


@FLOAT64_BACKENDS
def test_float64_float32_and_16_bit_and_empty_weights_share_a_call(backend):
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float64, torch.float16]
    weights = [torch.randn(7 + i, 20 - i).to(d) for i, d in enumerate(dtypes)]
    states = [oracle.make_state(w) for w in weights]
    before = [(u.clone(), v.clone()) for u, v in states]
    empty = [(0, 4), (3, 0)]
    leaves = [w.requires_grad_() for w in weights] + [torch.zeros(s) for s in empty]
    us = [u for u, _ in states] + [torch.zeros(r) for r, _ in empty]
    vs = [v for _, v in states] + [torch.zeros(c) for _, c in empty]
    outs = stable_rank_normalize(leaves, us, vs, [2.0] * 7, backend=backend)
    assert [o.dtype for o in outs] == [*dtypes, torch.float32, torch.float32]
    assert [tuple(o.shape) for o in outs[5:]] == empty
    grads = [torch.randn_like(o) for o in outs[:5]]
    results = torch.autograd.grad(outs[:5], weights, grads)
    for i, weight in enumerate(weights):
        what = f"weights[{i}]"
        layer = oracle.assert_forward(weight, 0, before[i], 2.0, 1, outs[i], us[i], vs[i])
        oracle.assert_gradient(layer, grads[i], results[i], 0, what)
    assert stable_rank_normalize([], [], [], [], backend=backend) == []


# Projection.


@BACKENDS
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("layout", [*LAYOUTS, "slice", "transposed-slice"])
def test_projecting_a_parameter_equals_normalising_it(backend, layout, dtype, training):
    weight, dim = oracle.make_weight(layout, (27, 90), dtype)
    (u, v), parameter = oracle.make_state(weight, dim), torch.nn.Parameter(weight)
    twin = u.clone(), v.clone()
    keywords = {"dims": [dim], "training": training, "backend": backend}
    (expected,) = stable_rank_normalize([parameter], [u], [v], [2.0], **keywords)
    expected = expected.detach()
    versions = [t._version for t in (parameter, *twin)]
    assert torch.is_grad_enabled()
    result = stable_rank_project_([parameter], [twin[0]], [twin[1]], [2.0], **keywords)
    assert result is None
    assert torch.equal(parameter, expected)
    assert all(map(torch.equal, twin, (u, v)))
    moved = [t._version > n for t, n in zip((parameter, *twin), versions, strict=True)]
    assert moved == [True, training, training]
    assert parameter.is_leaf
    assert parameter.grad_fn is None


@BACKENDS
def test_projection_under_a_graph_that_saved_the_weight_is_noticed(backend):
    parameter = torch.nn.Parameter(torch.randn(4, 6))
    u, v = oracle.make_state(parameter)
    loss = parameter.square().sum()
    stable_rank_project_([parameter], [u], [v], [2.0], backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@BACKENDS
def test_projection_works_on_inference_tensors(backend):
    with torch.inference_mode():
        weight = torch.randn(4, 6)
        u, v = oracle.make_state(weight)
        expected = stable_rank_normalize(
            [weight], [u.clone()], [v.clone()], [2.0], backend=backend
        )[0]
        stable_rank_project_([weight], [u], [v], [2.0], backend=backend)
        assert torch.equal(weight, expected)
