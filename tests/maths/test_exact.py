"""gradient="exact" against finite differences through an SVD, and what it must leave alone."""

from __future__ import annotations

import warnings

import pytest
import torch
from live import live_backends
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import srn_kernels as srn
from srn_kernels import functional, reference
from srn_kernels.maths.matrix import from_matrix

SHAPES = [((5, 7), 0), ((7, 5), 0), ((6, 4), 1), ((4, 2, 3, 3), 0), ((3, 5, 2, 2), 1), ((9, 2), 0)]


def matrix(w: Tensor, dim: int) -> Tensor:
    return w.movedim(dim, 0).flatten(1)


def top_pair(w: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    u, _, vt = torch.linalg.svd(matrix(w, dim), full_matrices=False)
    return u[:, 0].contiguous(), vt[0].contiguous()


def through_svd(w: Tensor, r: float, dim: int) -> Tensor:
    """Theorem 1 with k = 1 for W / s_1, u and v those of this W."""
    m = matrix(w, dim)
    u, s, vt = torch.linalg.svd(m, full_matrices=False)
    outer, scaled = torch.outer(u[:, 0], vt[0]), m / s[0]
    q = float(scaled.square().sum() - 1)
    gamma = ((r - 1) / q) ** 0.5 if q > r - 1 else 1.0
    return from_matrix(outer + gamma * (scaled - outer), w, dim)


def differences(w: Tensor, g: Tensor, function) -> Tensor:
    """d<G, f(W)>/dW by central differences."""
    step = 1e-6 * w.abs().max()
    result = torch.zeros_like(w)
    for index in range(w.numel()):
        shift = torch.zeros_like(w)
        shift.view(-1)[index] = step
        change = (g * (function(w + shift) - function(w - shift))).sum()
        result.view(-1)[index] = change / (2 * step)
    return result


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def normalize(w: Tensor, r: float, dim: int, gradient: str, **keywords) -> Tensor:
    u, v = top_pair(w.detach(), dim)
    (out,) = functional.stable_rank_normalize(
        [w], [u], [v], [r], dims=[dim], training=False, gradient=gradient, **keywords
    )
    return out


@pytest.mark.parametrize("backend", live_backends())
@pytest.mark.parametrize(("shape", "dim"), SHAPES)
def test_exact_gradient_against_finite_differences(
    shape: tuple[int, ...], dim: int, backend: str
) -> None:
    for scale in (1.0, 1e-9, 1e12):
        w = (torch.randn(shape, dtype=torch.float64) * scale).requires_grad_()
        g = torch.randn_like(w)
        top = float(srn.linalg.stable_rank(matrix(w.detach(), dim)))
        for r in (1.0, 1 + 0.3 * (top - 1), 1 + 0.9 * (top - 1), top + 0.1):
            out = normalize(w, r, dim, "exact", backend=backend)
            (grad,) = torch.autograd.grad(out, w, g)
            expected = differences(w.detach(), g, lambda x, r=r: through_svd(x, r, dim))
            assert relative(grad, expected) <= 1e-6
            # Autograd through the reference, whose u v^T knows its own derivative.
            u, v = top_pair(w.detach(), dim)
            (out,) = reference.stable_rank_normalize(
                [w], [u], [v], [r], dims=[dim], training=False, gradient="exact"
            )
            assert relative(torch.autograd.grad(out, w, g)[0], expected) <= 1e-6


@pytest.mark.parametrize(("shape", "dim"), SHAPES)
def test_frozen_gradient_against_finite_differences_with_u_and_v_fixed(
    shape: tuple[int, ...], dim: int
) -> None:
    w = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    g, (u, v) = torch.randn_like(w), top_pair(w.detach(), dim)

    def fixed(x: Tensor) -> Tensor:
        m = matrix(x, dim)
        scaled = m / (u @ m @ v)
        gamma = ((r - 1) / float(scaled.square().sum() - 1)) ** 0.5
        outer = torch.outer(u, v)
        return from_matrix(outer + min(gamma, 1) * (scaled - outer), x, dim)

    for r in (1.1, 1.3):
        frozen = torch.autograd.grad(normalize(w, r, dim, "frozen"), w, g)[0]
        exact = torch.autograd.grad(normalize(w, r, dim, "exact"), w, g)[0]
        expected = differences(w.detach(), g, fixed)
        assert relative(frozen, expected) <= 1e-6
        assert relative(exact, expected) > 1e-3  # they do differ


def test_the_term_vanishes_where_the_constraint_does() -> None:
    w = torch.randn(6, 9, requires_grad=True)
    g = torch.randn_like(w)
    for r in (float("inf"), 6.0):
        frozen, exact = (
            torch.autograd.grad(normalize(w, r, 0, kind), w, g)[0] for kind in ("frozen", "exact")
        )
        assert torch.equal(frozen, exact)
    for bad in (torch.zeros(3, 4), torch.full((3, 4), float("nan"))):
        grads = []
        for kind in ("frozen", "exact"):
            x = bad.clone().requires_grad_()
            state = [torch.ones(3) / 3**0.5], [torch.ones(4) / 2]
            (out,) = functional.stable_rank_normalize([x], *state, [1.5], gradient=kind)
            grads += torch.autograd.grad(out, x, torch.ones(3, 4))
        assert torch.equal(grads[0].nan_to_num(7.0), grads[1].nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_repeated_top_values_give_a_bounded_gradient_without_a_warning(dtype: torch.dtype) -> None:
    from srn_kernels.maths.turning import ACCURACY

    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    for w in (torch.eye(5, 8), torch.diag(torch.tensor([1.0, 1.0, 0.5, 0.25]))):
        w = w.to(dtype).requires_grad_()
        u, v = torch.zeros(len(w), dtype=state_dtype), torch.zeros(w.shape[1], dtype=state_dtype)
        u[0] = v[0] = 1
        g = torch.randn_like(w)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            (out,) = functional.stable_rank_normalize(
                [w], [u], [v], [1.5], training=False, gradient="exact"
            )
            (grad,) = torch.autograd.grad(out, w, g)
        assert grad.isfinite().all()
        assert grad.norm() <= 4 * g.norm() / ACCURACY[state_dtype].gap


def test_float32_and_bfloat16_are_near_float64_once_u_and_v_have_converged() -> None:
    w = torch.randn(24, 60, dtype=torch.float64)
    g = torch.randn_like(w)
    expected = differences_free(w, g)
    for dtype, bound in ((torch.float32, 1e-3), (torch.bfloat16, 3e-2)):
        x = w.to(dtype).requires_grad_()
        u, v = (t.float() for t in top_pair(w))
        (out,) = functional.stable_rank_normalize(
            [x], [u], [v], [4.0], n_power_iterations=50, gradient="exact"
        )
        (grad,) = torch.autograd.grad(out, x, g.to(dtype))
        assert grad.dtype == dtype
        assert relative(grad.double(), expected) <= bound


def differences_free(w: Tensor, g: Tensor) -> Tensor:
    """The exact gradient of r = 4 by autograd through torch's own SVD."""
    w = w.clone().requires_grad_()
    u, s, vt = torch.linalg.svd(w, full_matrices=False)
    outer, scaled = torch.outer(u[:, 0], vt[0]), w / s[0]
    gamma = (3 / (scaled.square().sum() - 1)).sqrt()
    return torch.autograd.grad((g * (outer + gamma * (scaled - outer))).sum(), w)[0]


# --- through rounds, graphs and transforms -------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.head = nn.Linear(4 * 8 * 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.up(torch.tanh(self.conv(x)))).flatten(1))


def wrapped(gradient: str = "exact", **keywords) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = srn.apply_stable_rank_norm(
        Net().double(), 0.3, gradient=gradient, init_iterations=400, **keywords
    )
    return model, torch.randn(2, 3, 4, 4, dtype=torch.float64)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def test_modules_give_the_exact_gradient() -> None:
    model, x = wrapped()
    model.eval()
    found = gradients(model, x)
    plain, targets = Net().double(), {"conv": 0.3 * 8, "up": 0.3 * 8, "head": 1.0}
    plain.load_state_dict(
        {k: v for k, v in model.state_dict().items() if k[-2:] not in ("_u", "_v")}
    )

    def loss(name: str, weight: Tensor) -> Tensor:
        parameters = {
            f"{n}.weight": through_svd(
                weight if n == name else getattr(plain, n).weight.detach(),
                max(1.0, 0.3 * min(matrix(getattr(plain, n).weight, int(n == "up")).shape)),
                int(n == "up"),
            )
            for n in targets
        }
        return torch.func.functional_call(plain, parameters, (x,)).square().sum()

    with torch.no_grad():
        for name in targets:
            weight = getattr(plain, name).weight.detach()
            direction = torch.randn_like(weight)
            slope = (
                loss(name, weight + 1e-6 * direction) - loss(name, weight - 1e-6 * direction)
            ) / 2e-6
            along = float((found[f"{name}.weight"] * direction).sum())
            assert along == pytest.approx(float(slope), rel=1e-6)
    frozen, _ = wrapped("frozen")
    other = gradients(frozen.eval(), x)
    assert relative(other["head.weight"], found["head.weight"]) > 1e-3


def test_overrides_choose_the_gradient_of_single_layers() -> None:
    model, x = wrapped("frozen", overrides={"head": {"gradient": "exact"}})
    exact, frozen = (gradients(wrapped(kind)[0], x) for kind in ("exact", "frozen"))
    found = gradients(model, x)
    assert torch.equal(found["head.weight"], exact["head.weight"])
    assert torch.equal(found["conv.weight"], frozen["conv.weight"])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_equals_eager(backend: str) -> None:
    if backend == "inductor":
        pytest.importorskip("ninja")
    torch._dynamo.reset()
    expected = [gradients(m, x) for m, x in [wrapped()] for _ in range(2)]
    model, x = wrapped()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for step in range(2):
        model.zero_grad()
        compiled(x).square().sum().backward()
        for name, p in model.named_parameters():
            assert relative(p.grad, expected[step][name]) <= 1e-12


def test_several_backwards_unused_layers_and_checkpointing() -> None:
    model, x = wrapped()
    expected = gradients(model, x)
    with srn.shared_round(model):
        first, second = model(x), model(2 * x)
    model.zero_grad()
    first.square().sum().backward()
    partial = {n: p.grad.clone() for n, p in model.named_parameters()}
    second.square().sum().backward()
    assert any(relative(p.grad, partial[n]) > 1e-3 for n, p in model.named_parameters())

    for reentrant in (True, False):
        again, _ = wrapped()
        leaf = x.clone().requires_grad_()

        def run(t: Tensor, model: nn.Module = again) -> Tensor:
            return torch.tanh(model.up(torch.tanh(model.conv(t)))).flatten(1)

        again.forward = lambda t, run=run, m=again, r=reentrant: m.head(
            checkpoint(run, t, use_reentrant=r)
        )
        again(leaf).square().sum().backward()
        for name, p in again.named_parameters():
            assert relative(p.grad, expected[name]) <= 1e-12

    used, x = wrapped()
    used.conv.weight.requires_grad_(False)
    used(x).square().sum().backward()
    assert used.conv.weight.grad is None


def test_transforms_and_second_derivatives() -> None:
    w = torch.randn(5, 7, dtype=torch.float64)
    g = torch.randn_like(w)
    (expected,) = torch.autograd.grad(
        normalize(x := w.clone().requires_grad_(), 1.4, 0, "exact"), x, g
    )
    u, v = top_pair(w)

    def loss(x: Tensor) -> Tensor:
        (out,) = functional.stable_rank_normalize(
            [x], [u], [v], [1.4], training=False, gradient="exact"
        )
        return (g * out).sum()

    torch.testing.assert_close(torch.func.grad(loss)(w), expected)
    x = w.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(x), x, create_graph=True)
    torch.testing.assert_close(grad.detach(), expected)  # the first derivative is there
    with pytest.raises(RuntimeError, match="differentiated once only"):
        grad.sum().backward()


def test_wrong_names_are_refused() -> None:
    for call in (
        lambda: srn.stable_rank_norm(nn.Linear(3, 4), gradient="full"),
        lambda: srn.spectral_norm(nn.Linear(3, 4), gradient=None),
        lambda: srn.apply_stable_rank_norm(nn.Linear(3, 4), gradient="full"),
    ):
        with pytest.raises(ValueError, match="gradient must be"):
            call()
