"""Every public name has a documented example that runs, and a place in the API reference."""

from __future__ import annotations

import doctest
import inspect
import re
from pathlib import Path

import pytest
import torch

import srn_kernels as srn

PAGES = Path(__file__).parents[2] / "docs" / "api"
# What the reference tells its readers to import.
IMPORTS = re.search(r"^```python\n(.*?)^```$", (PAGES / "index.md").read_text(), re.M | re.S)[1]
MODULES = {
    "functional": ("stable_rank_normalize", "stable_rank_project_"),
    "reference": ("stable_rank_normalize", "stable_rank_project_"),
    "linalg": ("stable_rank", "nearest_with_stable_rank", "spectral_clip", "top_singular"),
}
NAMES = [name for name in srn.__all__ if name not in MODULES]
NAMES += [f"{module}.{name}" for module, names in MODULES.items() for name in names]


def public(name: str) -> object:
    module, _, last = name.rpartition(".")
    return getattr(getattr(srn, module) if module else srn, last)


@pytest.mark.parametrize("name", NAMES)
def test_its_example_runs(name: str) -> None:
    shown = inspect.cleandoc(public(name).__doc__ or "")
    imported: dict[str, object] = {}
    exec(IMPORTS, imported)
    example = doctest.DocTestParser().get_doctest(shown, imported, name, None, None)
    assert example.examples, f"{name} has no example"
    torch.manual_seed(0)
    said: list[str] = []
    failed, _ = doctest.DocTestRunner(verbose=False).run(example, out=said.append)
    assert not failed, "".join(said)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_in_the_reference(name: str) -> None:
    module, _, last = name.rpartition(".")
    current = f"srn_kernels.{module}" if module else "srn_kernels"
    found = set()
    for page in PAGES.glob("*.md"):
        where = ""
        for directive, value in re.findall(r"^\.\. (\w+):: (\S+)", page.read_text(), re.MULTILINE):
            where = value if directive == "currentmodule" else where
            if directive.startswith("auto"):
                found.add((where, value.removesuffix("()")))
    assert (current, last) in found
