"""Builds the extensions for this machine's device alone, CUDA C++ included, or fails loudly."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from benchmarks.measure.store import ROOT

LIVE = (
    "import sys; from srn_kernels.backends import cuda; reason = cuda.unavailable_reason(); "
    "print(reason or 'backend cuda: live'); sys.exit(reason is not None)"
)


_FALLBACKS = ("/usr/local/cuda", "/opt/cuda")


def _places(environment: Mapping[str, str]) -> Iterator[Path]:
    """Where a toolkit may be, most telling first."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if environment.get(name):
            yield Path(environment[name])
    if nvcc := shutil.which("nvcc", path=environment.get("PATH")):
        yield Path(nvcc).resolve().parents[1]
        yield Path(nvcc).parents[1]
    yield from map(Path, _FALLBACKS)


def cuda_home(environment: Mapping[str, str]) -> Path:
    """The toolkit's folder; SystemExit naming what was looked at.

    A compiler alone does not count: nvcc on the PATH may be a wrapper of one that lies elsewhere.
    """
    looked = []
    for place in _places(environment):
        wanted = (place / "bin" / "nvcc", place / "include" / "cuda_runtime.h")
        if all(path.exists() for path in wanted):
            return place
        looked.append(str(place))
    raise SystemExit(
        f"no CUDA toolkit with bin/nvcc and include/cuda_runtime.h in {', '.join(looked)}; "
        "set CUDA_HOME"
    )


def variables(architecture: str, environment: Mapping[str, str]) -> dict[str, str]:
    """The build's environment."""
    return {
        **environment,
        "CUDA_HOME": str(cuda_home(environment)),
        "SRN_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": architecture,
        "MAX_JOBS": str(os.cpu_count() or 1),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", help="as 9.0; default: the device's own")
    parser.add_argument("--dry-run", action="store_true", help="find the toolkit, build nothing")


def run(chosen: argparse.Namespace) -> int:
    if not chosen.arch and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU: name the architecture with --arch")
    architecture = chosen.arch or "{}.{}".format(*torch.cuda.get_device_capability())
    environment = variables(architecture, os.environ)
    print(f"CUDA_HOME={environment['CUDA_HOME']} TORCH_CUDA_ARCH_LIST={architecture}", flush=True)
    if chosen.dry_run:
        return 0
    command = (sys.executable, "setup.py", "build_ext", "--inplace")
    if code := subprocess.run(command, cwd=ROOT, env=environment).returncode:
        return code
    if not torch.cuda.is_available():
        print("built; without a GPU nothing can be run")
        return 0
    return subprocess.run((sys.executable, "-c", LIVE), cwd=ROOT).returncode
