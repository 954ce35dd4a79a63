"""All layers of a model in one CUDA C++ launch, forward and backward.

csrc/cuda has the kernels and, in bindings.cpp, the way from tensors to a launch; planning.py cuts a
model into tiles the first time that its shapes are seen, and compile.py compiles the kernels ahead
of time on a machine without a GPU. docs/gpu.md describes the design.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch

from srn_kernels.backends import built
from srn_kernels.backends.cuda import planning

DEVICES = frozenset({"cuda"})
STATE_DTYPES = frozenset({torch.float32, torch.float64})
CAPABILITY = (8, 0)  # asynchronous copies and mbarriers
extension: ModuleType | None = None


def install(module: ModuleType) -> None:
    """Serves with this build of csrc/cuda."""
    global extension, normalize, normalize_backward
    planning.install(module)
    extension = module
    normalize, normalize_backward = module.normalize, module.normalize_backward
    _unserved_device.cache_clear()


def unavailable_reason() -> str | None:
    if extension is None:
        return _REASON
    return _unserved_device() if "cuda" in DEVICES else None


@functools.cache
def _unserved_device() -> str | None:
    """What keeps the kernels from a visible GPU: "auto" chooses for all of them at once."""
    if not torch.cuda.is_available():
        return "no GPU is visible to torch"
    for i in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(i)
        found = f"cuda:{i} ({torch.cuda.get_device_name(i)}, sm_{capability[0]}{capability[1]})"
        if capability < CAPABILITY:
            return f"{found} is older than sm_80; CUDA_VISIBLE_DEVICES can leave it out"
        with torch.cuda.device(i):
            if error := extension.unloadable():
                return (
                    f"the extension has no kernels for {found} ({error}); "
                    f"build it with TORCH_CUDA_ARCH_LIST={capability[0]}.{capability[1]}"
                )
    return None


_cuda, _REASON = built.load("srn_kernels.backends._cuda")
if _cuda is not None:
    install(_cuda)
