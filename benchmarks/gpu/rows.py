"""The rows of GPU measurements, and where and with what they were taken."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import dataclass, replace

import torch

from benchmarks.measure import store
from benchmarks.measure.suite import Key
from benchmarks.measure.timing import Spread


@dataclass(frozen=True)
class Row:
    """One number; the metric's name ends with its unit."""

    commit: str
    dirty: bool
    date: str
    srn_kernels: str
    torch: str
    triton: str
    python: str
    device: str
    processors: int
    l2_mb: float
    driver: str
    workload: str = ""
    provider: str = ""
    rank_ratio: float | None = None
    mode: str = ""
    metric: str = ""
    p20: float = 0.0
    p50: float = 0.0
    p80: float = 0.0
    repeats: int = 0
    bytes: int = 0
    kind: str = "gpu"

    def of(self, key: Key) -> Row:
        return replace(self, provider=key[0], rank_ratio=key[1])

    with_result = store.Row.with_result

    def with_count(self, metric: str, n: int) -> Row:
        return self.with_result(metric, Spread(n, n, n, 1))


def _driver() -> str:
    command = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.splitlines()[0].strip()


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return triton.__version__


def environment(device: torch.device, commit: str | None = None) -> Row:
    """A row without a number: when, on what, and with which versions."""
    here = store.environment()
    name, processors, l2_bytes, driver = "interpreter", 0, 0, "none"
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        name, processors, l2_bytes = p.name, p.multi_processor_count, p.L2_cache_size
        driver = _driver()
    return Row(
        commit or here.commit,
        here.dirty,
        here.date,
        here.srn_kernels,
        torch.__version__,
        _triton_version(),
        platform.python_version(),
        name,
        processors,
        l2_bytes / 2**20,
        driver,
    )
