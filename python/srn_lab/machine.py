"""The facts about versions and hardware that belong beside every number."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import srn_kernels

# srn_kernels by its own attribute: the metadata of an editable install stay those of its day.
_PACKAGES = ("torch", "numpy", "accelerate", "torchmetrics", "scikit-learn")
_SOURCES = ("srn_kernels", "csrc", "python")


def environment() -> dict:
    """Versions, machine, thread count and, in a git checkout, the commit."""
    return {
        "python": platform.python_version(),
        "packages": {
            "srn_kernels": srn_kernels.__version__,
            **{name: _version(name) for name in _PACKAGES},
        },
        **_checkout(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch_threads": torch.get_num_threads(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@functools.lru_cache(maxsize=1)
def _checkout() -> dict:
    """Commit, and whether sources differ from it; looked up once, before a run changes anything."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        # Installed inside somebody else's repository, git would answer with their commit.
        return {"commit": None, "dirty": None}
    git = ("git", "-C", str(root))
    try:
        commit = subprocess.run(
            (*git, "rev-parse", "--verify", "HEAD"), capture_output=True, text=True, check=True
        )
        status = subprocess.run(
            (*git, "status", "--porcelain", "--", *_SOURCES),
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
    return {"commit": commit.stdout.strip(), "dirty": status.stdout != ""}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
