"""Sphinx: formulas become MathML when the site is built, which browsers draw without a script.

The font, STIX Two Math, is that of the package ziamath and goes into the site.
"""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from docutils import nodes
from math_core import LatexError, LatexToMathML
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.fileutil import copy_asset_file

log = logging.getLogger(__name__)
convert = LatexToMathML().convert_with_local_state


def _mathml(node: nodes.Element, block: bool) -> str:
    try:
        return convert(node.astext().strip(), displaystyle=block)
    except LatexError as error:
        log.warning("%s: %s", node.astext(), error, location=node)
        return ""


def _inline(self: Any, node: nodes.Element) -> None:
    self.body.append(_mathml(node, block=False))
    raise nodes.SkipNode


def _block(self: Any, node: nodes.Element) -> None:
    self.body.append(f'<div class="math">{_mathml(node, block=True)}</div>')
    raise nodes.SkipNode


def _font(app: Sphinx, problem: Exception | None) -> None:
    if problem is None and app.builder.format == "html":
        with as_file(files("ziamath") / "fonts" / "STIXTwoMath-Regular.ttf") as font:
            copy_asset_file(font, Path(app.outdir) / "_static")


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    app.connect("build-finished", _font)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
