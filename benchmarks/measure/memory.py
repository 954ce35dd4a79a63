"""Peak memory of one call, as the operating system sees it (Linux only)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import srn_kernels as srn

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


def _mebibytes(field: str, path: Path = _STATUS) -> float:
    for line in path.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def available_mebibytes() -> float:
    """What the machine can still give; infinite where it does not say."""
    try:
        return _mebibytes("MemAvailable", Path("/proc/meminfo"))
    except (OSError, KeyError):
        return float("inf")


def peak_mebibytes(body: Callable[[], object]) -> float | None:
    """How far the process grows during ``body``; None where the peak cannot be reset.

    Garbage of earlier calls is the caller's to collect.
    """
    srn.empty_cache()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        _RESET.write_text("5")
        before = _mebibytes("VmRSS")
        body()
        return max(0.0, _mebibytes("VmHWM") - before)
    except (OSError, AttributeError, KeyError):
        return None
