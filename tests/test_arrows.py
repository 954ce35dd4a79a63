"""Imports run down the floors of the house, never up or sideways, and in no circle."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import srn_kernels

ROOT = Path(srn_kernels.__file__).parent
# Each may import those before it, and a folder itself.
FLOORS = (
    {"maths"},
    {"backends", "linalg"},
    {"core"},
    {"model", "functional", "reference"},
    {"tools"},
    {"moved"},
    {"srn_kernels"},
    {"info", "doctor", "integrations"},
)
FILES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}
COMPILED = {"_cpu", "_cuda"}  # which have no file here


def imports(module: str, path: Path) -> set[str]:
    """Modules of the package that a file imports, wherever in it the statement stands."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            inner = {f"{base}.{x.name}" for x in node.names if x.name in COMPILED}
            inner |= {x for x in (f"{base}.{alias.name}" for alias in node.names) if x in FILES}
            found |= inner if len(inner) == len(node.names) else {base} | inner
    return {x for x in found if x.split(".")[0] == "srn_kernels"} - {module}


def floor_of(module: str) -> tuple[int, str]:
    name = module.split(".")[1] if "." in module else module
    return next((i, name) for i, names in enumerate(FLOORS) if name in names)


def arrows_up(module: str, path: Path) -> list[str]:
    floor, name = floor_of(module)
    wrong = []
    for target in sorted(imports(module, path)):
        other, sibling = floor_of(target)
        if other > floor or (other == floor and sibling != name):
            wrong.append(f"{module} imports {target}")
    return wrong


def test_no_import_runs_up() -> None:
    assert not [line for module, path in FILES.items() for line in arrows_up(module, path)]


def test_there_is_no_circle() -> None:
    graph = {module: imports(module, path) for module, path in FILES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names it


def test_compiled_modules_are_in_backends() -> None:
    words = {
        node.value
        for path in FILES.values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    loaded = {x for x in words if x.startswith("srn_kernels.") and x.split(".")[-1] in COMPILED}
    assert loaded == {f"srn_kernels.backends.{name}" for name in COMPILED}


def test_an_arrow_up_is_seen_inside_functions_and_for_types(tmp_path: Path) -> None:
    path = tmp_path / "added.py"
    for line in (
        "def f():\n    from srn_kernels.model import root",
        "if TYPE_CHECKING:\n    import srn_kernels.model.root",
        "from ..model.root import Group",
        "from srn_kernels import functional",
        "import srn_kernels",
    ):
        path.write_text(line)
        assert len(arrows_up("srn_kernels.core.added", path)) == 1, line
    path.write_text("from srn_kernels import backends\nfrom .plan import Plan")
    assert not arrows_up("srn_kernels.core.added", path)
