"""Place of the cuda backend; it is listed, and refuses to serve, until its kernels are here."""

from __future__ import annotations

import torch

DEVICES = frozenset({"cuda"})
STATE_DTYPES = frozenset({torch.float32})


def unavailable_reason() -> str | None:
    return "the CUDA C++ backend is not part of this release"
