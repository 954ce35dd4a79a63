"""Where a symbol is defined in a source file: what links from the pages to the code resolve to.

A link is ordinary Markdown, ``[text](../path/file.py#Class.method "a piece of the line")``, so it
opens the file in any viewer; the site resolves it to the line. Needs the standard library alone.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# [text](../file#symbol "piece"), to a file above the page's own folder.
LINK = re.compile(r'\[([^\]]+)\]\(((?:\.\./)+[^)\s#]+)(?:#([\w.-]+))?(?:\s+"([^"]+)")?\)')


class Link(NamedTuple):
    """One link from a page to a file of the repository that is no page."""

    text: str
    file: Path
    symbol: str
    piece: str

    def line(self) -> int:
        """The line it leads to; ValueError if the file, symbol or piece is not there."""
        return line_of(self.file, self.symbol, self.piece)


def links(markdown: str, page: Path, docs: Path) -> Iterator[tuple[re.Match[str], Link]]:
    """Every link out of the documents' folder, with where it stands in the text of ``page``."""
    for found in LINK.finditer(markdown):
        text, target, symbol, piece = found.groups()
        file = (page.parent / target).resolve()
        if not file.is_relative_to(docs.resolve()):
            yield found, Link(text, file, symbol or "", piece or "")


def line_of(file: Path, symbol: str = "", piece: str = "") -> int:
    """The line where ``symbol`` is defined, or the one line of its definition with ``piece``."""
    if not file.is_file():
        raise ValueError(f"{file}: there is no such file")
    text = file.read_text()
    first, last = 1, text.count("\n") + 1
    if symbol:
        span = {".py": _python, ".md": _heading}.get(file.suffix, _native)(text, symbol)
        if span is None:
            raise ValueError(f"{file}: defines no {symbol!r}")
        first, last = span
    if not piece:
        return first
    lines = enumerate(text.splitlines()[first - 1 : last], first)
    having = [number for number, line in lines if piece in line]
    if len(having) != 1:
        raise ValueError(f"{file}: {len(having)} lines of {symbol or 'it'} have {piece!r}, not one")
    return having[0]


def _python(text: str, symbol: str) -> tuple[int, int] | None:
    body: list[ast.stmt] = ast.parse(text).body
    span = None
    for name in symbol.split("."):
        node = next((n for n in body if name in _names(n)), None)
        if node is None:
            return None
        span = node.lineno, node.end_lineno or node.lineno
        body = getattr(node, "body", [])
    return span


def _names(node: ast.stmt) -> set[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
    return {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}


def _heading(text: str, symbol: str) -> tuple[int, int] | None:
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("#") and line.lstrip("# ").lower().replace(" ", "-") == symbol:
            return number, number
    return None


def _native(text: str, symbol: str) -> tuple[int, int] | None:
    """C++ and CUDA: from a line that begins a function, struct or enum, to the next closing brace
    in the first column."""
    lines = text.splitlines()
    begins = re.compile(rf"^[A-Za-z_][^;/#]*\b{re.escape(symbol)}\b\s*[({{:]")
    for number, line in enumerate(lines, 1):
        if begins.match(line):
            end = next(
                (i for i, x in enumerate(lines[number:], number + 1) if x[:1] == "}"), number
            )
            return number, end
    return None
