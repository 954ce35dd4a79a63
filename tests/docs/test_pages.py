"""The pages hold what they say: their code runs, and what they link to is there."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
# A block of Python, or one that stands in a comment because it only prepares the next.
BLOCK = re.compile(r"^(?:```python|<!-- before the next block)\n(.*?)^(?:```|-->)$", re.M | re.S)


def _load(name: str):
    spec = importlib.util.spec_from_file_location(name, DOCS / "_extensions" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


symbols = _load("symbols")


def code(page: Path) -> list[tuple[int, str]]:
    """(first line, text) of every block, in order."""
    text = page.read_text()
    return [(text.count("\n", 0, m.start(1)), m[1]) for m in BLOCK.finditer(text)]


def ids(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [p for p in PAGES if code(p)], ids=ids)
def test_its_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in one namespace, as a reader would type it, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": page.stem}
    for line, text in code(page):
        # Blank lines in front, so that a traceback names the page's own line.
        exec(compile("\n" * line + text, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_what_it_links_to_is_there(page: Path) -> None:
    text = page.read_text()
    for _, link in symbols.links(text, page, DOCS):
        assert link.line() > 0
    shown = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)  # but not what is only quoted
    for target in re.findall(r"\]\((?!https?:|#)([^)\s#]+)", shown):
        assert (page.parent / target).exists(), target


def test_every_formula_is_followed_by_the_line_that_computes_it() -> None:
    page = DOCS / "mathematics.md"
    _, *parts = page.read_text().split("$$")
    for formula, after in zip(parts[::2], parts[1::2], strict=True):
        assert any(link.symbol for _, link in symbols.links(after, page, DOCS)), formula


@pytest.mark.parametrize(
    ("name", "symbol", "piece", "text"),
    [
        ("a.py", "", "", "x = 1"),
        ("a.py", "A.f", "", "def f"),
        ("a.py", "A.f", "return", "return 2"),
        ("a.py", "x", "", "x = 1"),
        ("a.h", "f", "", "int f("),
        ("a.h", "f", "g()", "return g"),
        ("a.md", "the-end", "", "## The end"),
    ],
)
def test_a_symbol_leads_to_its_line(tmp_path, name, symbol, piece, text) -> None:
    file = tmp_path / name
    file.write_text(
        {
            "a.py": "x = 1\n\nclass A:\n    y = 3\n\n    def f(self):\n        return 2\n",
            "a.h": "int g();\n\nint f(\n    int x) {\n  return g();\n}\nint h() {\n  g();\n}\n",
            "a.md": "# A\n\n## The end\n",
        }[name]
    )
    assert text in file.read_text().splitlines()[symbols.line_of(file, symbol, piece) - 1]


@pytest.mark.parametrize(
    ("symbol", "piece"), [("B", ""), ("A.g", ""), ("A", "2"), ("A", "nothing")]
)
def test_a_symbol_that_is_not_there_is_refused(tmp_path, symbol, piece) -> None:
    file = tmp_path / "a.py"
    file.write_text("class A:\n    f = 2\n    h = 2\n")
    with pytest.raises(ValueError, match=r"a\.py"):
        symbols.line_of(file, symbol, piece)


def test_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for command in re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), re.M):
            assert re.search(rf"^{command}:", makefile, re.M), f"{page.name}: make {command}"
