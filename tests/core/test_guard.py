"""Tensors that kernels cannot read: subclasses go to the reference, others are refused by name."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrize
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

import srn_kernels as srn
from srn_kernels import functional
from srn_kernels.core.guard import naming


class Mute(Tensor):
    """A wrapper that knows no arithmetic."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Mute:
        made = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].inner)
        raise NotImplementedError(f"no {func}")


def twin(layer: nn.Linear) -> nn.Linear:
    """The same layer with its weight twice."""
    w = layer.weight.detach()
    other = copy.deepcopy(layer)
    other.weight = nn.Parameter(TwoTensor(w.clone(), w.clone()))
    return other


def state(size: int) -> Tensor:
    return nn.functional.normalize(torch.randn(size), dim=0)


def test_a_subclass_trains_as_a_plain_weight_does() -> None:
    plain = nn.Sequential(nn.Linear(7, 6), nn.Linear(6, 5))
    other = copy.deepcopy(plain)
    other[1] = twin(plain[1])
    x = torch.randn(3, 7)
    results = []
    for model in (plain, other):
        srn.apply_stable_rank_norm(model, 0.4)
        for _ in range(2):
            model.zero_grad()
            out = model(x)
            out.square().sum().backward()
        results.append((out, model[0].weight.grad, model[1].weight.grad, model[1].weight_u))
    assert isinstance(results[1][2], TwoTensor)
    for expected, actual in zip(*results, strict=True):
        actual = actual.a if isinstance(actual, TwoTensor) else actual
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_weight_that_is_replaced_by_a_subclass_later() -> None:
    layer = srn.stable_rank_norm(nn.Linear(6, 5), rank_ratio=0.4)
    x = torch.randn(3, 6)
    expected = layer(x)
    w = layer.weight.detach()
    layer.weight = nn.Parameter(TwoTensor(w.clone(), w.clone()))
    actual = layer(x)
    torch.testing.assert_close(actual.a, expected, rtol=1e-3, atol=1e-3)  # another step or so
    actual.sum().backward()
    layer.weight = nn.Parameter(w.to_mkldnn())
    with pytest.raises(TypeError, match=r"weight must be a dense tensor, got a torch\._mkldnn"):
        layer(x)
    layer.weight = nn.Parameter(Mute(w))
    with pytest.raises(TypeError, match="weight is a Mute, which cannot do the arithmetic"):
        layer(x)


def test_functional_and_parametrization() -> None:
    w, u, v = torch.randn(5, 6), state(5), state(6)
    pair, other = TwoTensor(w.clone(), w.clone()).requires_grad_(), w.clone().requires_grad_()
    g = torch.randn(5, 6)
    outs = []
    for x in (pair, other):
        both = [x, w], [u.clone(), u.clone()], [v.clone(), v.clone()]
        out, beside = functional.stable_rank_normalize(*both, [1.5, 1.5])
        (grad,) = torch.autograd.grad(out, x, g)
        outs.append([out, grad, both[1][0], beside])
    for expected, actual in zip(outs[1], outs[0], strict=True):
        actual = actual.a if isinstance(actual, TwoTensor) else actual
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        functional.stable_rank_project_([pair], [u.clone()], [v.clone()], [1.5])
    torch.testing.assert_close(pair.a.detach(), outs[1][0].detach(), rtol=1e-4, atol=1e-5)
    layer = twin(nn.Linear(6, 5))
    parametrize.register_parametrization(layer, "weight", srn.StableRankNorm(layer.weight))
    layer(torch.randn(2, 6)).sum().backward()


def test_a_gradient_that_is_a_subclass() -> None:
    layer = srn.spectral_norm(nn.Linear(6, 5))
    x = torch.randn(3, 6)
    layer.eval()(x).square().sum().backward()
    expected, layer.weight.grad = layer.weight.grad, None
    layer(TwoTensor(x, x.clone())).square().sum().backward()
    grad = layer.weight.grad
    grad = grad.a if isinstance(grad, TwoTensor) else grad
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)


def test_a_backend_asked_for_by_name_raises() -> None:
    if srn.available_backends()["cpu"] is not None:
        pytest.skip("needs the cpu backend to name")
    w = TwoTensor(torch.randn(5, 6), torch.randn(5, 6))
    u, v = state(5), state(6)
    before = u.clone()
    with pytest.raises(TypeError, match=r"weights\[0\] is a TwoTensor, which backend 'cpu'"):
        functional.stable_rank_normalize([w], [u], [v], [1.5], backend="cpu")
    with srn.use_backend("cpu"), pytest.raises(TypeError, match="'cpu' cannot read"):
        functional.stable_rank_normalize([w], [u], [v], [1.5])
    assert torch.equal(u, before)


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        (lambda w: w.to(torch.float8_e4m3fn), "float8"),
        (lambda w: w.to_sparse(), "torch.sparse_coo"),
        (lambda w: w.to_sparse_csr(), "torch.sparse_csr"),
        (lambda w: w.to_mkldnn(), "torch._mkldnn"),
        (lambda w: torch.nested.nested_tensor([w, w]), "nested"),
        (lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), "qint8"),
        (Mute, "cannot do the arithmetic"),
    ],
)
def test_other_tensors_are_refused_by_name(kind, match: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        w = kind(torch.randn(4, 4))
    with pytest.raises(TypeError, match=rf"weights\[1\] .*{match}"):
        functional.stable_rank_normalize(
            [torch.randn(4, 4), w], [state(4), state(4)], [state(4), state(4)], [1.5, 1.5]
        )
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(w, requires_grad=False)
    for wrap in (srn.apply_stable_rank_norm, lambda m: srn.stable_rank_norm(m[0])):
        with pytest.raises(TypeError, match=rf"weight .*{match}"):
            wrap(model)
    assert not srn.is_normalized(model[0])
    assert not list(model.buffers())


def test_fake_tensors_are_refused_at_wrapping() -> None:
    with FakeTensorMode():
        fake = nn.Linear(4, 4)
        for layer in (fake, plain := nn.Linear(4, 4)):
            with pytest.raises(TypeError, match="weight is a fake tensor"):
                srn.apply_stable_rank_norm(nn.Sequential(layer))
    with pytest.raises(TypeError, match="weight is a fake tensor"):
        srn.stable_rank_norm(fake)
    assert not srn.is_normalized(plain)


class Plain(Tensor):
    """A subclass that is what its storage holds."""


class Partial(TwoTensor):
    """Lacks one operation."""

    lacking = None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is cls.lacking:
            raise NotImplementedError(f"no {func}")
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_a_subclass_that_is_memory_is_served_by_name(name: str) -> None:
    if (reason := srn.available_backends()[name]) is not None:
        pytest.skip(f"{name}: {reason}")
    w, u, v = torch.randn(5, 6), state(5), state(6)
    results = [
        functional.stable_rank_normalize([x], [u.clone()], [v.clone()], [1.5], backend=name)[0]
        for x in (w, w.as_subclass(Plain))
    ]
    assert torch.equal(*(r.as_subclass(Tensor) for r in results))


def test_the_reference_takes_a_subclass_by_name() -> None:
    w, u, v = torch.randn(5, 6), state(5), state(6)
    pair = TwoTensor(w.clone(), w.clone())
    call = functional.stable_rank_normalize
    (out,) = call([pair], [u.clone()], [v.clone()], [1.5], backend="reference")
    (expected,) = call([w], [u], [v], [1.5], backend="reference")
    torch.testing.assert_close(out.a, expected)


def test_a_vector_that_is_a_subclass() -> None:
    layer = nn.Linear(4, 3)
    b = layer.bias.detach().clone()
    layer.bias = nn.Parameter(TwoTensor(b, b.clone()))
    srn.spectral_norm(layer, "bias")
    torch.testing.assert_close(srn.normalized_weight(layer, "bias").a, b / b.norm())


@pytest.mark.parametrize("lacking", ["copy_", "abs"])  # abs is in isfinite
def test_what_a_subclass_lacks_is_found_at_wrapping(lacking: str, monkeypatch) -> None:
    monkeypatch.setattr(Partial, "lacking", getattr(torch.ops.aten, lacking).default)
    layer, w = nn.Linear(4, 3), torch.randn(3, 4)
    layer.weight = nn.Parameter(Partial(w, w.clone()))
    with pytest.raises(TypeError, match="weight is a Partial, which cannot do the arithmetic"):
        srn.spectral_norm(layer)


def test_an_interrupt_is_no_error_of_the_subclass() -> None:
    with pytest.raises(KeyboardInterrupt), naming("weight", torch.ones(1)):
        raise KeyboardInterrupt


def test_tracing_records_the_kernels_op() -> None:
    if srn.available_backends()["cpu"] is not None:
        pytest.skip("needs the cpu backend")

    def normalize(w: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return functional.stable_rank_normalize([w], [u], [v], [1.5])[0]

    graph = make_fx(normalize, tracing_mode="fake")(torch.randn(5, 6), state(5), state(6))
    assert "'cpu'" in graph.code
    assert "'reference'" not in graph.code


def test_a_mode_of_fake_tensors_is_refused_for_real_weights() -> None:
    layer = nn.Linear(4, 4)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, pytest.raises(TypeError, match="weight is a fake tensor"):
        srn.spectral_norm(layer)
    assert not srn.is_normalized(layer)


def test_a_mode_that_looks_on_changes_nothing() -> None:
    class Looks(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Looks.seen += "srn_kernels" in str(func)
            return func(*args, **(kwargs or {}))

    layer = srn.spectral_norm(nn.Linear(4, 3)).eval()
    x = torch.randn(2, 4)
    expected = layer(x)
    with Looks():
        assert torch.equal(layer(x), expected)
    assert Looks.seen
