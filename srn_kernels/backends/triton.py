"""Place of the triton backend; it is listed, and refuses to serve, until its kernels are here."""

from __future__ import annotations

DEVICES = frozenset({"cuda"})


def unavailable_reason() -> str | None:
    return "the Triton backend is not part of this release"
