"""Every script of examples/ runs where its package is there, and docs/recipes.md shows each."""

from __future__ import annotations

import ast
import os
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


def imports(script: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(script.read_text())))
    names = [alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names]
    names += [n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module]
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_it_runs(script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing := [name for name in sorted(imports(script)) if find_spec(name) is None]:
        pytest.skip(f"needs {', '.join(missing)}; docs/recipes.md says with which versions it ran")
    monkeypatch.chdir(tmp_path)
    if "spawn" in script.read_text():  # its processes import the script again, by its own name
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        command = [sys.executable, str(script)]
        subprocess.run(command, check=True, timeout=300, env={**os.environ, "PYTHONPATH": paths})
        return
    threads = torch.get_num_threads()
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_the_page_shows_it(script: Path) -> None:
    page = (ROOT / "docs" / "recipes.md").read_text()
    assert f"](../examples/{script.name})" in page
