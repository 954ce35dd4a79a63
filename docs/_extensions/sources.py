"""Sphinx: links from pages to code lead to a page of the site with that file, at the line."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name, get_lexer_for_filename
from sphinx.application import Sphinx
from sphinx.util import logging
from symbols import links

log = logging.getLogger(__name__)


def _page(file: Path, root: Path) -> str:
    return f"sources/{file.relative_to(root).as_posix()}"


def _lexer(file: Path) -> Any:
    native = file.suffix in (".h", ".inc", ".cpp", ".cu")
    return get_lexer_by_name("cpp") if native else get_lexer_for_filename(file.name)


def rewrite(app: Sphinx, docname: str, source: list[str]) -> None:
    """Replaces each link by HTML; what it does not find is a warning, so that the build fails."""
    docs = Path(app.srcdir)
    root, page = docs.parent, Path(app.env.doc2path(docname))
    if page.suffix != ".md":
        return
    text = source[0]
    for found, link in reversed(list(links(text, page, docs))):
        try:
            line = link.line()
        except ValueError as error:
            log.warning("%s", error, location=docname)
            continue
        app.env.srn_sources.setdefault(docname, set()).add(str(link.file))
        up = "../" * docname.count("/")
        shown = re.sub("`([^`]+)`", r"<code>\1</code>", html.escape(link.text))
        where = html.escape(f"{link.file.relative_to(root)}, line {line}")
        anchor = (
            f'<a class="source" title="{where}" href="{up}{_page(link.file, root)}.html#L-{line}">'
        )
        text = f"{text[: found.start()]}{anchor}{shown}</a>{text[found.end() :]}"
    source[0] = text


def pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """A page for every file that something links to."""
    root = Path(app.srcdir).parent
    form = HtmlFormatter(linenos="inline", linespans="L", anchorlinenos=True)
    for name in sorted(set().union(*app.env.srn_sources.values())):
        file = Path(name)
        body = highlight(file.read_text(), _lexer(file), form)
        title = str(file.relative_to(root))
        whole = f'<h1>{html.escape(title)}</h1><div class="code-page">{body}</div>'
        content = {"title": title, "body": whole, "furo_hide_toc": True}
        yield _page(file, root), content, "page.html"


def _prepare(app: Sphinx, env: Any, docnames: Any) -> None:
    if not hasattr(env, "srn_sources"):
        env.srn_sources = {}


def _forget(app: Sphinx, env: Any, docname: str) -> None:
    getattr(env, "srn_sources", {}).pop(docname, None)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("env-before-read-docs", _prepare)
    app.connect("env-purge-doc", _forget)
    app.connect("source-read", rewrite)
    app.connect("html-collect-pages", pages)
    return {"parallel_read_safe": False}
