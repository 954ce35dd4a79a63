"""A call that raises leaves the model as it was, whatever argument was wrong, bit for bit."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from models import Discriminator
from torch import nn
from torch.nn.utils import spectral_norm as legacy_spectral_norm

import srn_kernels as srn
from srn_kernels.model.weight import KEY


def plain() -> nn.Module:
    return Discriminator()


def wrapped() -> nn.Module:
    model = srn.apply_stable_rank_norm(Discriminator(), 0.5, exclude="head")
    return model.train()


def foreign() -> nn.Module:
    model = Discriminator()
    legacy_spectral_norm(model.conv)
    legacy_spectral_norm(model.head)
    srn.spectral_norm(model.up)
    return model


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Every attribute of every module, tensors by value and identity, our own records too."""
    seen: dict[str, Any] = {}
    for name, module in model.named_modules():
        seen[f"{name}: class"] = type(module)
        for key, value in module.__dict__.items():
            seen[f"{name}: {key}"] = _content(value)
        for key, entry in module.__dict__.get(KEY, {}).items():
            state = {k: v for k, v in vars(entry).items() if k not in ("constants", "record")}
            seen[f"{name}: entry {key}"] = {k: _content(v) for k, v in state.items()}
        this = module.__dict__.get("_srn_group")
        if this is not None:
            seen[f"{name}: round"] = {k: _content(v) for k, v in vars(this).items()}
    return seen


def _content(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return id(value), value.dtype, value._version, value.detach().numpy().tobytes()
    if isinstance(value, dict):
        return id(value), [(k, _content(v)) for k, v in value.items()]
    if isinstance(value, (list, tuple, set)):
        return [_content(v) for v in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else id(value)


WRONG: dict[str, list[Any]] = {
    "rank_ratio": [0.0, 1.5, math.nan, "0.7", None, True, torch.ones(2)],
    "stable_rank": [0.5, math.inf, "2", math.nan],
    "n_power_iterations": [0, -1, 1.5, "1", True],
    "eps": [-1.0, math.inf, math.nan, "small"],
    "dim": [7, -5, 1.0, "0", True],
    "init_iterations": [-1, 0.5, "many"],
    "backend": ["gpu", 3, "cuda", "triton"],
    "gradient": ["none", 1, None],
    "preserve": [-1, 1.5, "all"],
    "sigma_max": [0.0, -1.0, math.nan, "1"],
    "grad_through_sigma": [1, "yes", None],
    "gain": [1, 0.5, "yes", None],
    "groups": [0, 1.5, "two"],
    "include": ["nothing", ["conv", "haed"], 3],
    "exclude": ["nothing", "*", 3],
    "layer_types": [nn.Linear, ["Linear"], [nn.GRU], 3, []],
    "overrides": [
        {"nothing": {"eps": 1e-3}},
        {"conv": {"ratio": 0.3}},
        {"conv": {"rank_ratio": 7}},
        {"head": {"backend": "cuda"}},
        {"head": {"dim": 9}},
        {"conv": 3},
        ["conv"],
    ],
    "name": ["wieght", 3, None],
    "iterations": [0, 1.5, "all"],
    "value": [0, 2.0, "half", None],
    "form": ["torch", None, 3],
    "input_shape": [(3,), (5, 8, 8)],
    "rank_ration": [0.5],
    "module": [None, torch.ones(2, 2), [nn.Linear(2, 2)]],
    "model": [None, torch.ones(2, 2), [nn.Linear(2, 2)]],
    "layer": [None, torch.ones(2, 2)],
    "model_or_layer": [None, torch.ones(2, 2)],
    "optimizer": [None, 3],
}

TARGETS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], dict[str, Any]]]] = {
    "stable_rank_norm": (plain, lambda m: {"module": m.conv}),
    "spectral_norm": (plain, lambda m: {"module": m.up}),
    "apply_stable_rank_norm": (wrapped, lambda m: {"model": m}),
    "convert_spectral_norm": (foreign, lambda m: {"model": m}),
    "project_after_step": (
        plain,
        lambda m: {"optimizer": torch.optim.SGD(m.parameters(), 0.1), "model": m},
    ),
    "fuse": (wrapped, lambda m: {"model": m}),
    "refresh": (wrapped, lambda m: {"model": m}),
    "report": (wrapped, lambda m: {"model": m}),
    "set_rank_ratio": (wrapped, lambda m: {"model_or_layer": m, "value": 0.3}),
    "normalized_weight": (wrapped, lambda m: {"layer": m.conv}),
    "is_normalized": (wrapped, lambda m: {"layer": m.conv}),
    "remove_stable_rank_norm": (wrapped, lambda m: {"model_or_layer": m}),
    "export": (wrapped, lambda m: {"model": m}),
    "to_torch_state_dict": (wrapped, lambda m: {"model": m}),
}

# what these functions take without a complaint
FINE = {("is_normalized", "name")}


def wrong_calls() -> list[Any]:
    calls = []
    for function in TARGETS:
        parameters = inspect.signature(getattr(srn, function)).parameters
        for argument in [*parameters, "rank_ration"]:
            for i, value in enumerate(WRONG.get(argument, ())):
                if (function, argument) in FINE:
                    continue
                calls.append(
                    pytest.param(function, argument, value, id=f"{function}-{argument}{i}")
                )
    return calls


def accepts(function: str, argument: str, value: Any) -> bool:
    """Values that mean something to one of the functions."""
    if value is None and argument in ("stable_rank", "sigma_max", "dim"):
        return True
    if function == "convert_spectral_norm" and value is None:
        return argument != "model"
    if argument == "backend" and value in ("cuda", "triton"):
        return srn.available_backends()[value] is None
    return False


@pytest.mark.parametrize(("function", "argument", "value"), wrong_calls())
def test_every_public_function_with_every_wrong_argument(
    function: str, argument: str, value: Any
) -> None:
    if accepts(function, argument, value):
        return
    make, arguments = TARGETS[function]
    model = make()
    keywords = {**arguments(model), argument: value}
    before = fingerprint(model)
    with pytest.raises((ValueError, TypeError, RuntimeError)) as error:
        getattr(srn, function)(**keywords)
    text = str(error.value)
    named = {"value": "rank_ratio"}.get(argument, argument)
    assert named in text or "layer" in text or "model" in text, text
    assert fingerprint(model) == before
    good = arguments(model)  # and the same call without the mistake works
    if function != "to_torch_state_dict":
        getattr(srn, function)(**good)


@pytest.mark.parametrize("moment", range(4))
@pytest.mark.parametrize("function", ["apply_stable_rank_norm", "convert_spectral_norm", "fuse"])
def test_an_interrupt_within_leaves_the_model_as_it_was(
    function: str, moment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from srn_kernels.model import attach, root, wrap
    from srn_kernels.tools import convert

    make, arguments = TARGETS[function]
    model = make()
    before = fingerprint(model)
    calls = iter(range(100))

    def interrupting(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            result = original(*args, **keywords)
            if next(calls) == moment:
                raise KeyboardInterrupt
            return result

        return call

    monkeypatch.setattr(wrap, "attach", interrupting(attach.attach))
    monkeypatch.setattr(convert, "attach", interrupting(attach.attach))
    monkeypatch.setattr(root, "hook_layer", interrupting(root.hook_layer))
    monkeypatch.setattr(root, "group_of", interrupting(root.group_of))
    monkeypatch.setattr(wrap, "_hook_readers", interrupting(wrap._hook_readers))
    try:
        getattr(srn, function)(**arguments(model))
    except KeyboardInterrupt:
        assert fingerprint(model) == before
        monkeypatch.undo()
        getattr(srn, function)(**arguments(model))
    else:
        assert function == "fuse" and moment > 1  # it had finished


def test_a_backend_that_cannot_serve_leaves_nothing_behind() -> None:
    """A retry with another backend wraps every layer."""
    reason = srn.available_backends()["cuda"]
    if reason is None:
        pytest.skip("the cuda backend is live here")
    for function in (srn.apply_stable_rank_norm, srn.convert_spectral_norm):
        model = plain() if function is srn.apply_stable_rank_norm else foreign()
        with pytest.raises(RuntimeError, match=r"conv\.weight: backend 'cuda'"):
            function(model, backend="cuda")
        function(model, backend="reference")
        assert len(srn.report(model)) == 3
        model(torch.randn(2, 3, 8, 8)).sum().backward()


def test_numpys_scalars_are_numbers() -> None:
    model = Discriminator()
    srn.apply_stable_rank_norm(
        model,
        np.float32(0.5),
        n_power_iterations=np.int64(2),
        eps=np.float64(1e-9),
        sigma_max=np.float32(2.0),
        gain=np.bool_(True),
        groups=np.int32(2),
        overrides={"head": {"stable_rank": np.float64(2.0), "dim": np.int64(1)}},
    )
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    srn.set_rank_ratio(model, np.float32(0.25))
    srn.refresh(model, np.int64(3))
    assert srn.report(model)[0].target == 3.0
    srn.spectral_norm(nn.Linear(3, 3), "weight", np.int64(1), np.float32(1e-6), np.int64(0))
    copy.deepcopy(model)
