"""Which backends are live, and which of them serves a call.

Every backend is a module with the same verbs over tensors it is given (their meaning is in
:mod:`srn_kernels.core.ops`): ``normalize``, ``normalize_backward`` and ``unavailable_reason``; it
serves the device types in ``DEVICES`` (None: any) and the dtypes of u and v in ``STATE_DTYPES``.
Their rule is :data:`srn_kernels.maths.top_one.TOP_ONE`; any other runs in reference.py. "auto" is
the only name that chooses, :func:`choose` says how; a backend asked for by name serves or raises.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import threading
import warnings
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("reference", "cpu", "triton", "cuda")
FEW_COLUMNS = 2048  # that the CUDA kernels' threads hold, whatever a row's alignment
_local = threading.local()


@functools.cache
def load(name: str) -> ModuleType:
    """The module of a backend; it may still have an ``unavailable_reason``."""
    return importlib.import_module(f"srn_kernels.backends.{name}")


def available_backends() -> dict[str, str | None]:
    """Every backend's name, with None if it is live or the reason why it is not.

    Example:
        >>> srn.available_backends()["reference"] is None
        True
    """
    return {name: load(name).unavailable_reason() for name in BACKENDS}


def check_name(name: str, argument: str = "backend") -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{argument} must be 'auto' or one of {BACKENDS}, got {name!r}")
    return name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within this context and thread, ``backend="auto"`` means ``name``.

    An explicit ``backend=`` still wins. Raises RuntimeError on entry if the backend cannot serve,
    ValueError if there is no such backend.

    Example:
        >>> layer = srn.spectral_norm(nn.Linear(8, 8))
        >>> with srn.use_backend("reference"):
        ...     y = layer(torch.randn(2, 8))
    """
    check_name(name, "name")
    if name != "auto" and (reason := load(name).unavailable_reason()):
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    previous = getattr(_local, "name", "auto")
    _local.name = name
    try:
        yield
    finally:
        _local.name = previous


@functools.cache
def _automatic(device_type: str, state_dtype: torch.dtype) -> str:
    # The order of preference on each device; the last one is always live.
    preference = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
    names = preference.get(device_type, ("reference",))
    able = [name for name in names if state_dtype in load(name).STATE_DTYPES]
    name = next(name for name in able if load(name).unavailable_reason() is None)
    if name == "reference" and device_type != "meta":
        reasons = [f"{n}: {load(n).unavailable_reason()}" for n in able[:-1]]
        reasons += [f"{n} does not serve {state_dtype}" for n in names if n not in able]
        warnings.warn(
            f"srn_kernels uses the pure PyTorch reference on {device_type} "
            f"({'; '.join(reasons) or 'no kernels'})",
            stacklevel=2,
        )
    return name


def asked(name: str) -> str:
    """What ``backend=name`` asks for here: "auto" may stand for that of :func:`use_backend`."""
    return getattr(_local, "name", "auto") if name == "auto" else name


def resolve(name: str, device_type: str, state_dtype: torch.dtype) -> str:
    """The backend that serves ``name`` on a device type ("cpu", "cuda", ...) for u, v of a dtype.

    RuntimeError: it is not live, or not for tensors there; TypeError: not for this dtype.
    """
    name = asked(name)
    if name == "auto":
        return _automatic(device_type, state_dtype)
    module = load(check_name(name))
    if reason := module.unavailable_reason():
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    if module.DEVICES is not None and device_type not in module.DEVICES:
        raise RuntimeError(
            f"backend {name!r} serves tensors on {', '.join(sorted(module.DEVICES))}, "
            f"got one on {device_type}"
        )
    if state_dtype not in module.STATE_DTYPES:
        raise TypeError(f"backend {name!r} does not serve weights whose u and v are {state_dtype}")
    return name


def choose(
    name: str,
    device_type: str,
    state_dtype: torch.dtype,
    weights: Sequence[Tensor],
    dims: Sequence[int],
) -> str:
    """:func:`resolve` for these weights, whose output dimensions are ``dims``.

    Under "auto", Triton serves a call in place of the CUDA kernels where they would read more than
    half of its elements from memory directly, one at a time: layouts whose rows are not contiguous,
    and rows beyond what their threads hold.
    """
    chosen = resolve(name, device_type, state_dtype)
    if chosen != "cuda":
        return chosen
    # The usual weights are seen at a glance: this is part of every round.
    others = tuple(
        [
            (tuple(w.shape), w.stride(), d, w.element_size())
            for w, d in zip(weights, dims, strict=True)
            if w.dim() > 1
            and (d != 0 or w.numel() > FEW_COLUMNS * w.shape[0] or not w.is_contiguous())
        ]
    )
    if not others:
        return chosen
    return _by_layout(name, state_dtype, others, sum([w.numel() for w in weights]))


def _by_layout(
    name: str, state_dtype: torch.dtype, weights: tuple[tuple[Any, ...], ...], elements: int
) -> str:
    """The rule of :func:`choose` where the CUDA kernels serve; ``elements``: of the whole call."""
    triton, is_direct = load("triton"), load("cuda").planning.is_direct
    if asked(name) != "auto" or state_dtype not in triton.STATE_DTYPES:
        return "cuda"
    if triton.unavailable_reason() is not None:
        return "cuda"
    direct = sum(math.prod(w[0]) for w in weights if is_direct(*w))
    return "triton" if 2 * direct > elements else "cuda"


# torch.compiler.assume_constant_result does just this, but imports all of the compiler.
resolve._dynamo_marked_constant = _by_layout._dynamo_marked_constant = True
