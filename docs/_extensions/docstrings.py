"""Sphinx: docstrings that use | as mathematics does, for norms, are read that way."""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

_LITERAL = re.compile(r"(``[^`]*``)")


def _plain(line: str) -> str:
    parts = _LITERAL.split(line)
    return "".join(p if i % 2 else p.replace("|", r"\|") for i, p in enumerate(parts))


def norms(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = [
        line if line.lstrip().startswith((">>>", "...")) else _plain(line) for line in lines
    ]


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", norms, priority=100)  # before napoleon
    return {"parallel_read_safe": True}
