"""csrc/cuda for the CPU: the same sources, compiled by g++ against csrc/cuda/shim."""

from __future__ import annotations

import hashlib
import importlib.util
import os
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
SOURCES = ("normalize.cu", "backward.cu", "bindings.cpp", "shim/fibers.cpp", "shim/runtime.cpp")
COMPILER = os.environ.get("CXX", "g++")
# Four consumer warps instead of fifteen: threads are fibers here.
FLAGS = ("-std=c++20", "-O2", "-fPIC", "-DSRN_SHIM", "-DSRN_CONSUMER_WARPS=4", "-Wall")


def fingerprint(flags: tuple[str, ...]) -> str:
    h = hashlib.sha256(repr((flags, torch.__version__, sysconfig.get_python_version())).encode())
    files = [*CSRC.glob("*.h"), *CSRC.glob("cuda/*"), *CSRC.glob("cuda/shim/*")]
    for path in sorted(p for p in files if p.is_file()):
        h.update(path.read_bytes())
    return h.hexdigest()[:16]


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def build(sanitizer: str | None = None) -> ModuleType:
    """The extension as a module; built anew only if a source changed."""
    extra = () if sanitizer is None else (f"-fsanitize={sanitizer}", "-g", "-DSRN_TSAN")
    folder = ROOT / "build" / "cuda_shim"
    name = f"srn_cuda_shim_{fingerprint(FLAGS + extra)}"
    library = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        includes = [f"-isystem{p}" for p in cpp_extension.include_paths()]
        includes.append(f"-isystem{sysconfig.get_path('include')}")

        def compiled(source: str) -> str:
            to = folder / f"{name}_{Path(source).stem}_{os.getpid()}_{len(source)}.o"
            torch_flags = includes if source == "bindings.cpp" else []
            # Only the kernels are of interest; the fibers tell the sanitizer of their order.
            flags = extra if source.endswith(".cu") else extra[1:]
            _run(
                *(COMPILER, *FLAGS, *flags, f"-DTORCH_EXTENSION_NAME={name}", *torch_flags),
                *("-x", "c++", "-c", str(CSRC / "cuda" / source), "-o", str(to)),
            )
            return str(to)

        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compiled, SOURCES))
        libraries = [f"-L{p}" for p in cpp_extension.library_paths()]
        temporary = f"{library}.{os.getpid()}"
        _run(
            *(COMPILER, "-shared", *extra, *objects, *libraries),
            *("-ltorch", "-ltorch_cpu", "-ltorch_python", "-lc10", "-pthread", "-o", temporary),
        )
        os.replace(temporary, library)
        for path in objects:
            os.unlink(path)
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
