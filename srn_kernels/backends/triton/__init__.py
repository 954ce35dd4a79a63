"""All layers of a model in one Triton launch, forward and backward.

Which tile when is decided in srn_kernels.backends.tiling. forward.py and backward.py are the
kernels, over common.py; tables.py and launch.py bring tensors to them, and compile.py compiles them
on a machine without a GPU. Under TRITON_INTERPRET=1 CPU tensors are served too.
"""

from __future__ import annotations

import torch

try:
    import triton
except ImportError as error:
    _MISSING: str | None = f"triton cannot be imported ({error})"
    _INTERPRETED = False
else:
    _MISSING = None
    _INTERPRETED = bool(triton.knobs.runtime.interpret)

DEVICES = frozenset({"cuda", "cpu"}) if _INTERPRETED else frozenset({"cuda"})
STATE_DTYPES = frozenset({torch.float32})  # its kernels accumulate in float32


def unavailable_reason() -> str | None:
    if _MISSING is not None:
        return _MISSING
    if not _INTERPRETED and not torch.cuda.is_available():
        return "no GPU is visible to torch, and TRITON_INTERPRET=1 is not set"
    return None


if _MISSING is None:
    from srn_kernels.backends.triton.launch import normalize, normalize_backward

    __all__ = ["DEVICES", "STATE_DTYPES", "normalize", "normalize_backward", "unavailable_reason"]
