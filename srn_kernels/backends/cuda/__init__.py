"""All layers of a model in one CUDA C++ launch, forward and backward.

csrc/cuda has the kernels and, in bindings.cpp, the way from tensors to a launch; planning.py cuts a
model into tiles the first time that its shapes are seen, and compile.py compiles the kernels ahead
of time on a machine without a GPU. docs/gpu.md describes the design.
"""

from __future__ import annotations

from types import ModuleType

import torch

from srn_kernels.backends import built
from srn_kernels.backends.cuda import planning

DEVICES = frozenset({"cuda"})
STATE_DTYPES = frozenset({torch.float32, torch.float64})
extension: ModuleType | None = None


def install(module: ModuleType) -> None:
    """Serves with this build of csrc/cuda."""
    global extension, normalize, normalize_backward
    planning.install(module)
    extension = module
    normalize, normalize_backward = module.normalize, module.normalize_backward


_cuda, _REASON = built.load("srn_kernels.backends._cuda")
if _cuda is not None:
    install(_cuda)


def unavailable_reason() -> str | None:
    if extension is None:
        return _REASON
    if "cuda" in DEVICES and not torch.cuda.is_available():
        return "no GPU is visible to torch"
    return None
