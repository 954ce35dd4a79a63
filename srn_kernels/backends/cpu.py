"""The C++ backend: fused, multi-threaded, for any x86-64 or arm64 processor."""

from __future__ import annotations

import torch

from srn_kernels.backends import built

DEVICES = frozenset({"cpu"})
STATE_DTYPES = frozenset({torch.float32, torch.float64})

_cpu, _REASON = built.load("srn_kernels.backends._cpu")
if _cpu is not None:
    normalize = _cpu.normalize
    normalize_backward = _cpu.normalize_backward


def unavailable_reason() -> str | None:
    return _REASON


def instruction_set() -> str | None:
    """The instruction set in use: "avx512", "avx2" or "baseline"; None without the extension."""
    return None if _cpu is None else _cpu.instruction_set()


def take_like(weights, dtype=None):
    """New tensors like ``weights``, in memory of earlier rounds that nobody uses any more."""
    return _cpu.take_like(weights) if dtype is None else _cpu.take_like(weights, dtype)


def empty_cache() -> int:
    """Frees the memory kept between rounds that is not in use; returns the bytes freed.

    Example:
        >>> srn.empty_cache() >= 0
        True
    """
    return 0 if _cpu is None else _cpu.empty_recycler()
