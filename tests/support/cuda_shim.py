"""csrc/cuda for the CPU: the same sources, compiled by g++ against csrc/cuda/shim."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch
from torch.utils import cpp_extension

from srn_kernels import backends
from srn_kernels.backends.cuda import planning
from srn_kernels.backends.tiling import staging
from srn_kernels.backends.tiling.config import KB, MB, LaunchConfig

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "cuda_shim"
SOURCES = ("normalize.cu", "bindings.cpp", "backward.cu", "shim/fibers.cpp", "shim/runtime.cpp")
COMPILER = os.environ.get("CXX", "g++")
# Four consumer warps instead of fifteen: threads are fibers here.
FLAGS = ("-std=c++20", "-O2", "-fPIC", "-DSRN_SHIM", "-DSRN_CONSUMER_WARPS=4", "-Wall")


def read_by(source: Path) -> set[Path]:
    """The project's files that a source includes, and the source."""
    found, left = set(), [source]
    while left:
        path = left.pop()
        if path in found or not path.exists():
            continue
        found.add(path)
        names = re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE)
        left += [(path.parent / name).resolve() for name in names]
    return found


def fingerprint(source: Path, flags: tuple[str, ...]) -> str:
    h = hashlib.sha256(repr((flags, torch.__version__, sysconfig.get_python_version())).encode())
    for path in sorted(read_by(source)):
        h.update(path.read_bytes())
    return h.hexdigest()[:16]


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def _compiled(source: str, flags: tuple[str, ...]) -> Path:
    """The object of a source; compiled anew only if something that it includes changed."""
    path = CSRC / "cuda" / source
    to = BUILD / f"{path.stem}_{fingerprint(path, flags)}.o"
    if not to.exists():
        temporary = f"{to}.{os.getpid()}"
        _run(COMPILER, *flags, "-x", "c++", "-c", str(path), "-o", temporary)
        os.replace(temporary, to)
    return to


def build(sanitizer: str | None = None) -> ModuleType:
    """The extension as a module."""
    extra = () if sanitizer is None else (f"-fsanitize={sanitizer}", "-g", "-DSRN_TSAN")
    name = "srn_cuda_shim" + (f"_{sanitizer}" if sanitizer else "")
    includes = [f"-isystem{p}" for p in cpp_extension.include_paths()]
    includes.append(f"-isystem{sysconfig.get_path('include')}")
    BUILD.mkdir(parents=True, exist_ok=True)

    def compiled(source: str) -> Path:
        # Only the kernels are of interest; the fibers tell the sanitizer of their order.
        flags = FLAGS + (extra if source.endswith(".cu") else extra[1:])
        if source == "bindings.cpp":
            flags += (f"-DTORCH_EXTENSION_NAME={name}", *includes)
        return _compiled(source, flags)

    with ThreadPoolExecutor(2) as pool:
        objects = [str(path) for path in pool.map(compiled, SOURCES)]
    key = hashlib.sha256(repr(objects).encode()).hexdigest()[:16]
    library = BUILD / f"{name}_{key}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not library.exists():
        libraries = [f"-L{p}" for p in cpp_extension.library_paths()]
        temporary = f"{library}.{os.getpid()}"
        _run(
            *(COMPILER, "-shared", *extra, *objects, *libraries),
            *("-ltorch", "-ltorch_cpu", "-ltorch_python", "-lc10", "-pthread", "-o", temporary),
        )
        os.replace(temporary, library)
    spec = importlib.util.spec_from_file_location(name, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small_device(device: int, model_bytes: int, backward: bool) -> tuple[LaunchConfig, int]:
    """Few CTAs, small caches and 40 KB of shared memory: small models go through every phase."""
    config = LaunchConfig.for_device(
        3, 1 * MB, 40 * KB, model_bytes, backward, planning.FEWEST_SLABS
    )
    return replace(config, max_slabs=40, column_bytes=3 * KB), 40 * KB


def install(sanitizer: str | None = None) -> ModuleType:
    """Makes the shim the cuda backend of this process, for CPU tensors."""
    backend = backends.load("cuda")
    # Small slots too: pieces, parts of rows and kept slabs of small models.
    staging.SLOT_BYTES, staging.IN_FLIGHT = (2 * KB, 5 * KB), 8 * KB
    planning.device_config = small_device
    backend.DEVICES = frozenset({"cpu"})
    backend.install(build(sanitizer))
    return backend
