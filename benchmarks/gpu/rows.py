"""The rows of GPU measurements, and where and with what they were taken."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, replace

import torch

from benchmarks.measure import store
from benchmarks.measure.suite import Key
from benchmarks.measure.timing import Spread


@dataclass(frozen=True, kw_only=True)
class Row(store.Measured):
    """A measurement on a GPU."""

    triton: str
    device: str
    processors: int
    l2_mb: float
    driver: str
    kind: str = "gpu"

    def of(self, key: Key) -> Row:
        return replace(self, provider=key[0], rank_ratio=key[1])

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
        commit=commit or here.commit,
        dirty=here.dirty,
        date=here.date,
        srn_kernels=here.srn_kernels,
        torch=here.torch,
        python=here.python,
        triton=_triton_version(),
        device=name,
        processors=processors,
        l2_mb=l2_bytes / 2**20,
        driver=driver,
    )
