"""Layers that keep k singular values (preserve=k): against the oracle of linalg, and in rounds."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from models import Discriminator, check_it_trains, images, is_raw, same_state, state
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import srn_kernels as srn
from srn_kernels import linalg
from srn_kernels.core import ops
from srn_kernels.maths import top_k
from srn_kernels.maths.matrix import from_matrix
from srn_kernels.maths.scalars import SPECTRAL, STABLE_RANK, STATS, Stats
from srn_kernels.maths.top_k import TopK
from srn_kernels.maths.top_one import TOP_ONE

SHAPES = [((6, 9), 0), ((9, 6), 0), ((5, 8), 1), ((6, 2, 3, 3), 0), ((3, 7, 2, 2), 1)]
KS = (0, 1, 2, 3, 20)


def matrix(w: Tensor, dim: int) -> Tensor:
    return w.movedim(dim, 0).flatten(1)


def pairs(w: Tensor, dim: int, k: int) -> tuple[Tensor, Tensor]:
    m = matrix(w, dim)
    u, _, vt = torch.linalg.svd(m, full_matrices=False)
    size = TopK(k).pairs(*m.shape)
    return u[:, :size].contiguous(), vt[:size].T.contiguous()


def run(w: Tensor, u: Tensor, v: Tensor, r: float, dim: int, k: int, n: int = 0):
    return TopK(k).normalize_layer(w, u, v, r, n, 1e-12, dim)


def gradient_of(g: Tensor, w: Tensor, layer, r: float, dim: int, k: int, gradient: str) -> Tensor:
    settled = (g, w, layer.u, layer.v, layer.stats, r, dim)
    frozen = TopK(k).layer_gradient(*settled)
    part = TopK(k).layer_exact_part(*settled) if gradient == "exact" else None
    return frozen if part is None else frozen + part


def top_rank(w: Tensor, dim: int) -> float:
    return float(linalg.stable_rank(matrix(w, dim)))


@pytest.mark.parametrize(("shape", "dim"), SHAPES)
def test_layers_agree_with_theorem_1(shape: tuple[int, ...], dim: int) -> None:
    for k in KS:
        w = torch.randn(shape, dtype=torch.float64)
        m = matrix(w, dim)
        top = torch.linalg.matrix_norm(m, 2)
        for r in (1.0, 1 + 0.3 * (top_rank(w, dim) - 1), top_rank(w, dim) + 0.1, math.inf):
            expected, kept, gamma = linalg.nearest_with_stable_rank(m / top, r, k, method="svd")
            start = [torch.randn_like(x) for x in pairs(w, dim, k)]
            layer = run(w, *start, r, dim, k, 300)
            torch.testing.assert_close(matrix(layer.weight, dim), expected, rtol=0, atol=1e-9)
            seen = Stats(*layer.stats.tolist())
            assert seen.sigma == pytest.approx(float(top), rel=1e-9)
            assert seen.frobenius_sq == pytest.approx(float(m.square().sum()), rel=1e-12)
            assert seen.gamma == pytest.approx(gamma, abs=1e-7)
            active = r < top_rank(w, dim)
            assert seen.branch == (STABLE_RANK if active else SPECTRAL)
            if active:
                assert seen.kept == kept
            if k == 1:
                single = TOP_ONE.normalize_layer(w, layer.u[:, 0], layer.v[:, 0], r, 0, 1e-12, dim)
                torch.testing.assert_close(layer.weight, single.weight, rtol=0, atol=1e-12)
                assert seen.a == pytest.approx(float(Stats(*single.stats).a), rel=1e-9)


def test_before_convergence_the_frobenius_norm_is_exact() -> None:
    w = torch.randn(12, 20, dtype=torch.float64)
    for k in (1, 2, 4):
        u, v = (torch.randn(n, k, dtype=torch.float64) for n in (12, 20))
        for steps in (0, 1, 2):
            layer = run(w, u, v, 4.5, 0, k, steps)
            if Stats(*layer.stats).branch == STABLE_RANK:
                assert float(layer.weight.square().sum()) == pytest.approx(4.5, rel=1e-12)
            assert float(torch.linalg.matrix_norm(layer.weight, 2)) >= 1 - 1e-12
            for basis in (layer.u, layer.v):
                assert (basis.T @ basis - torch.eye(k)).abs().max() < 1e-12
            core = layer.u.T @ w @ layer.v
            assert (core - core.diag().diag()).abs().max() < 1e-12
        # Shrunk by a moving average, they mean the same.
        again = run(w, 0.3 * layer.u, 0.7 * layer.v, 4.5, 0, k)
        torch.testing.assert_close(again.weight, run(w, layer.u, layer.v, 4.5, 0, k).weight)


def differences(w: Tensor, g: Tensor, function) -> Tensor:
    result = torch.zeros_like(w)
    for index in range(w.numel()):
        shift = torch.zeros_like(w)
        shift.view(-1)[index] = 1e-6
        result.view(-1)[index] = (g * (function(w + shift) - function(w - shift))).sum() / 2e-6
    return result


@pytest.mark.parametrize(("shape", "dim"), SHAPES[1:4])
@pytest.mark.parametrize("k", KS)
def test_gradients_against_finite_differences(shape: tuple[int, ...], dim: int, k: int) -> None:
    w = torch.randn(shape, dtype=torch.float64)
    g, top = torch.randn_like(w), top_rank(w, dim)

    def exact(x: Tensor, r: float) -> Tensor:
        m = matrix(x, dim)
        m = m / torch.linalg.matrix_norm(m, 2)
        out = linalg.nearest_with_stable_rank(m, r, k, method="svd")[0]
        return from_matrix(out, x, dim)

    for r in (1.0, 1 + 0.4 * (top - 1), top + 0.1):
        u, v = pairs(w, dim, k)
        layer = run(w, u, v, r, dim, k)

        def fixed(x: Tensor, r: float = r, u: Tensor = layer.u, v: Tensor = layer.v) -> Tensor:
            m = matrix(x, dim)
            return from_matrix(top_k.combine(m, u, v, top_k.coefficients(m, u, v, r, k)), x, dim)

        frozen = gradient_of(g, w, layer, r, dim, k, "frozen")
        expected = differences(w, g, fixed)
        assert (frozen - expected).norm() <= 1e-6 * expected.norm() + 1e-8
        x = w.clone().requires_grad_()  # autograd through the same formula
        torch.testing.assert_close(torch.autograd.grad(fixed(x), x, g)[0], frozen)
        full = gradient_of(g, w, layer, r, dim, k, "exact")
        expected = differences(w, g, lambda x, r=r: exact(x, r))
        assert (full - expected).norm() <= 1e-6 * expected.norm()


def test_second_derivatives_of_the_frozen_rule() -> None:
    w = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    for k in (0, 2):
        u, v = pairs(w.detach(), 0, k)
        layer = run(w, u, v, 1.9, 0, k)

        def gradient(g: Tensor, w: Tensor, layer=layer, k: int = k) -> Tensor:
            return gradient_of(g, w, layer, 1.9, 0, k, "frozen")

        g = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(gradient, (g, w), rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-11, 1.0, 1e18])
def test_float32_at_any_scale_and_half(scale: float) -> None:
    w = torch.randn(16, 40)
    expected, kept, _ = linalg.nearest_with_stable_rank(
        w.double() / torch.linalg.matrix_norm(w.double(), 2), 5.0, 3, method="svd"
    )
    u, v = torch.randn(16, 3), torch.randn(40, 3)
    layer = run(w * scale, u, v, 5.0, 0, 3, 200)
    torch.testing.assert_close(layer.weight.double(), expected, rtol=0, atol=2e-5)
    assert (kept, Stats(*layer.stats).kept) == (3, 3)
    grad = gradient_of(torch.randn(16, 40), w * scale, layer, 5.0, 0, 3, "exact")
    assert grad.isfinite().all()
    for dtype, bound in ((torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
        layer = run(w.to(dtype), u, v, 5.0, 0, 3, 200)
        assert layer.weight.dtype == dtype
        torch.testing.assert_close(layer.weight.double(), expected, rtol=0, atol=bound)


def test_zero_and_non_finite_weights_leave_the_state() -> None:
    u, v = torch.randn(4, 2), torch.randn(5, 2)
    for w in (torch.zeros(4, 5), torch.full((4, 5), 1e-20), torch.full((4, 5), math.nan)):
        layer = run(w, u, v, 1.5, 0, 2, 3)
        assert torch.equal(layer.u, u)
        assert torch.equal(layer.v, v)
        g = torch.randn(4, 5)
        grad = gradient_of(g, w, layer, 1.5, 0, 2, "exact")
        if w.isfinite().all():
            assert torch.equal(layer.weight, w)
            assert torch.equal(grad, g)
        else:
            assert layer.weight.isnan().all()
            assert grad.isnan().all()


# --- in a model ----------------------------------------------------------------------------------


def wrapped(**keywords) -> nn.Module:
    torch.manual_seed(0)
    return srn.apply_stable_rank_norm(
        Discriminator().double(),
        0.3,
        **{"preserve": 2, "init_iterations": 200, **keywords},
    )


def test_buffers_are_blocks_and_those_of_k_1_vectors() -> None:
    model = wrapped(overrides={"up": {"preserve": 1}, "head": {"preserve": 0}})
    shapes = {k: tuple(b.shape) for k, b in model.named_buffers()}
    assert shapes == {
        "conv.weight_u": (12, 2),
        "conv.weight_v": (27, 2),
        "up.weight_u": (6,),
        "up.weight_v": (192,),
        "head.weight_u": (1,),
        "head.weight_v": (1536,),
    }
    notes = {row.name: row.note for row in srn.report(model)}
    assert notes["conv.weight"] == "keeps the top 2 of preserve=2; plain PyTorch (reference)"
    assert notes["up.weight"] == ""
    assert "preserve=0" in notes["head.weight"]
    row = srn.report(model)[0]
    assert row.active
    assert row.normalized_stable_rank == pytest.approx(row.target, rel=1e-9)


def test_one_round_moves_all_states_once_and_evaluation_none() -> None:
    model, x = wrapped(overrides={"up": {"preserve": 1}}).train(), images().double()
    before = state(model)
    calls = []
    handle = model.conv.register_forward_hook(lambda m, a, out: calls.append(m.weight))
    model(x)
    handle.remove()
    assert not same_state(model, before)
    expected, _, _ = linalg.nearest_with_stable_rank(
        (w := model.conv.weight.detach().flatten(1)) / torch.linalg.matrix_norm(w, 2), 3.6, 2
    )
    torch.testing.assert_close(calls[0].detach().flatten(1), expected, rtol=0, atol=1e-6)
    assert is_raw(model)
    before = state(model)
    model.eval()(x)
    with torch.no_grad():
        model.train()(x)
    srn.normalized_weight(model.conv)
    srn.report(model)
    assert same_state(model, before)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("gradient", ["frozen", "exact"])
def test_several_forwards_and_backwards(gradient: str) -> None:
    model, x = wrapped(gradient=gradient), images().double()
    first, second = model(x), model(2 * x)  # two forwards before one backward
    total = gradients(model, (first + second).sum())
    again = wrapped(gradient=gradient)
    parts = gradients(again, again(x).sum())
    for name, g in gradients(again, again(2 * x).sum()).items():
        torch.testing.assert_close(total[name], parts[name] + g)
    with srn.shared_round(model):
        real, fake = model(x), model(2 * x)
    model.zero_grad()
    real.sum().backward()
    fake.sum().backward()
    grads = torch.autograd.grad(model(x).sum(), list(model.parameters()), create_graph=True)
    total = sum(g.square().sum() for g in grads)
    if gradient == "exact":
        with pytest.raises(RuntimeError, match="differentiated once only"):
            total.backward()
    else:
        total.backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_sees_the_same_w_hat(reentrant: bool) -> None:
    model, x = wrapped(), images().double().requires_grad_()
    expected = gradients(model, model(x).sum())
    model = wrapped()
    model.forward = lambda x: model.head(checkpoint(model.features, x, use_reentrant=reentrant))
    for name, g in gradients(model, model(x).sum()).items():
        torch.testing.assert_close(g, expected[name], rtol=1e-12, atol=1e-14)


def test_compiled_equals_eager() -> None:
    torch._dynamo.reset()
    model, other, x = wrapped(gradient="exact"), wrapped(gradient="exact"), images().double()
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        expected = gradients(model, model(x).sum())
        for name, g in gradients(other, compiled(x).sum()).items():
            torch.testing.assert_close(g, expected[name], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(other.conv.weight_u, model.conv.weight_u)


def test_checkpoints_copies_and_removal() -> None:
    model, x = wrapped().eval(), images().double()
    out = model(x)
    kept = state(model)
    torch.testing.assert_close(copy.deepcopy(model)(x), out, rtol=0, atol=0)
    torch.testing.assert_close(srn.export(model)(x), out)
    fresh = wrapped().eval()
    fresh.load_state_dict(model.state_dict())
    assert all(torch.equal(b, kept[k]) for k, b in state(fresh).items())
    torch.testing.assert_close(fresh(x), out, rtol=0, atol=0)
    half = copy.deepcopy(model).half()
    assert half.conv.weight_u.dtype == torch.float32

    plain = Discriminator().double()
    fresh.load_state_dict(plain.state_dict())  # u and v converge anew
    single = srn.apply_stable_rank_norm(plain, 0.3, init_iterations=200)
    from_single = wrapped().eval()
    from_single.load_state_dict(single.state_dict())  # one pair: the first of the block
    again = fresh(x)
    torch.testing.assert_close(from_single(x), again, rtol=0, atol=1e-6)
    still = wrapped(init_iterations=0)
    still.load_state_dict(single.state_dict())
    assert torch.equal(still.conv.weight_u[:, 0], single.conv.weight_u)
    assert torch.equal(still.conv.weight_v[:, 0], single.conv.weight_v)

    srn.remove_stable_rank_norm(fresh)
    assert not state(fresh)
    torch.testing.assert_close(fresh(x), again)


def test_convert_fuse_refresh_and_schedules_with_blocks() -> None:
    inner = srn.stable_rank_norm(nn.Linear(6, 8), rank_ratio=0.4, preserve=3)
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(5, 6)), inner).eval()
    x = torch.randn(2, 5)
    out = model(x)
    srn.convert_spectral_norm(model)
    torch.testing.assert_close(model(x), out)
    srn.refresh(model, 500)
    srn.set_rank_ratio(model, 0.3)
    w_hat = srn.normalized_weight(inner).detach()
    assert top_rank(w_hat, 0) == pytest.approx(0.3 * 6, rel=1e-3)
    with torch.no_grad():
        inner.weight.copy_(torch.randn(8, 6))  # stale: converges before the next forward
    w_hat = srn.normalized_weight(inner).detach()
    assert float(torch.linalg.matrix_norm(w_hat, 2)) == pytest.approx(1, abs=0.05)


def test_training_moves_weights() -> None:
    check_it_trains(wrapped(gradient="exact"), steps=8, lr=1e-3)


def test_wrong_values_are_refused_and_change_nothing() -> None:
    layer = nn.Linear(3, 4)
    for preserve, error, match in (
        (-1, ValueError, "preserve must be"),
        (1.5, TypeError, "preserve"),
    ):
        with pytest.raises(error, match=match):
            srn.stable_rank_norm(layer, preserve=preserve)
    with pytest.raises(ValueError, match="plain PyTorch"):
        srn.stable_rank_norm(layer, preserve=2, backend="cpu")
    assert not srn.is_normalized(layer)


def test_a_repeated_round_uses_its_own_u_and_v() -> None:
    w, u, v = torch.randn(6, 9), torch.randn(6, 2), torch.randn(9, 2)
    offsets, size = ops.state_layout([(12, 18)])
    round_state, stats = torch.zeros(size), torch.zeros(1, len(STATS), dtype=torch.float64)
    out, again = torch.empty(6, 9), torch.empty(6, 9)
    constants = (round_state, stats, offsets, [2.2])
    unscaled, rule = ([],) * 4, ("stable_rank:2", "reference")
    ops.normalize([w], [u], [v], [out], *constants, [3], [0], [1e-12], *unscaled, *rule)
    u.normal_()
    v.normal_()
    kept = u.clone()
    ops.normalize([w], [u], [v], [again], *constants, [-1], [0], [1e-12], *unscaled, *rule)
    assert torch.equal(out, again)
    assert torch.equal(u, kept)


def test_the_ops_pass_opcheck() -> None:
    w, u, v = torch.randn(4, 6), torch.randn(4, 2), torch.randn(6, 2)
    offsets, size = ops.state_layout([(8, 12)])
    round_state, stats = torch.zeros(size), torch.zeros(1, len(STATS), dtype=torch.float64)
    arguments = ([w], [u], [v], [torch.empty_like(w)], round_state, stats)
    arguments += (offsets, [1.5], [5], [0], [1e-12], [], [], [], [], "stable_rank:2", "reference")
    ops.normalize(*arguments)
    torch.library.opcheck(torch.ops.srn_kernels.normalize.default, arguments)
    backward = ([torch.randn(4, 6)], [w], round_state, stats, [torch.zeros(4, 6)], [0], offsets)
    backward += ([0], [], [], [], [1.5], [1e-12], "exact", "stable_rank:2", "reference")
    torch.library.opcheck(torch.ops.srn_kernels.normalize_backward.default, backward)
