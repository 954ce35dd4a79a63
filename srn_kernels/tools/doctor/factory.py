"""A user's model and inputs to try it with, from ``MODULE:FUNCTION``."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class DoctorError(Exception):
    """What is wrong with what was asked, in one line."""


class Inputs(NamedTuple):
    """What one call of a model gets."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def to(self, device: torch.device) -> Inputs:
        def move(x: Any) -> Any:
            return x.to(device) if isinstance(x, Tensor) else x

        return Inputs(tuple(map(move, self.args)), {k: move(x) for k, x in self.kwargs.items()})


def find_factory(target: str) -> Callable[[], Any]:
    """The function that ``MODULE:FUNCTION`` names; modules of the current folder count."""
    module_name, colon, path = target.partition(":")
    if not (module_name and colon and path):
        raise DoctorError(f"{target!r} must be MODULE:FUNCTION, as in train:build_model")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise DoctorError(f"{module_name}: cannot be imported ({error})") from error
    for name in path.split("."):
        if not hasattr(found, name):
            raise DoctorError(f"{target}: {module_name} has no {path!r}")
        found = getattr(found, name)
    if not callable(found) or isinstance(found, nn.Module):
        raise DoctorError(
            f"{target}: must be a function that makes the model, because it is made several times; "
            f"got a {type(found).__name__}"
        )
    return found


def make(factory: Callable[[], Any], seed: int = 0) -> tuple[nn.Module, Inputs | None]:
    """A new model, and the inputs if the function returns (model, inputs): a tensor, a tuple of
    arguments, or a dict of keywords."""
    torch.manual_seed(seed)
    try:
        made = factory()
    except TypeError as error:
        raise DoctorError(f"the function is called without arguments: {error}") from error
    model, inputs = made, None
    if isinstance(made, (tuple, list)):
        if len(made) != 2:
            raise DoctorError(f"the function must return a model or (model, inputs), got {made!r}")
        model, inputs = made
    if not isinstance(model, nn.Module):
        raise DoctorError(
            "the function must return an nn.Module, or (model, inputs), got a "
            f"{type(model).__name__}"
        )
    return model, None if inputs is None else _as_inputs(inputs)


def _as_inputs(inputs: Any) -> Inputs:
    if isinstance(inputs, Mapping):
        return Inputs((), dict(inputs))
    if isinstance(inputs, (tuple, list)):
        return Inputs(tuple(inputs), {})
    return Inputs((inputs,), {})


def drawn(model: nn.Module, shape: Sequence[int]) -> Inputs:
    """One tensor of normal numbers, in the dtype of the model's first parameter."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(0))
    generator = torch.Generator().manual_seed(0)
    return Inputs((torch.randn(*shape, generator=generator).to(like.dtype),), {})
