"""Types of the public interface: complete, and calls have the types that they return."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import srn_kernels as srn

ROOT = Path(srn.__file__).parents[1]
MODULES = ("srn_kernels", "functional", "linalg", "reference")
# Its methods are called by torch, through ``apply``, which torch gives no types.
CALLED_BY_TORCH = "srn_kernels.core.autograd.StableRankNormFunction."


def pyright(*arguments: str) -> dict[str, Any]:
    """What pyright says of this source, with the packages of this interpreter."""
    pytest.importorskip("pyright", reason="pyright is not installed (the extra 'dev')")
    folder = Path(sys.executable).parent
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson", *arguments],
        cwd=ROOT,
        env=os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("{"), done.stdout + done.stderr
    return json.loads(done.stdout)


def public_names() -> Iterator[str]:
    """Where pyright finds each public function and class: in the module that defines it."""
    for name in MODULES:
        module = importlib.import_module(name if "srn" in name else f"srn_kernels.{name}")
        for key, thing in vars(module).items():
            if key.startswith("_") or not (inspect.isclass(thing) or inspect.isfunction(thing)):
                continue
            if key in getattr(module, "__all__", ()) or thing.__module__ == module.__name__:
                yield f"{thing.__module__}.{thing.__qualname__}"


def test_every_public_name_has_complete_types() -> None:
    found = pyright("--verifytypes", "srn_kernels", "--ignoreexternal")["typeCompleteness"]
    symbols = {symbol["name"]: symbol for symbol in found["symbols"]}
    public = set(public_names())
    assert len(public) > 30
    assert public <= symbols.keys()
    wrong = {
        name: [d["message"] for d in symbol["diagnostics"] if "docstring" not in d["message"]]
        for name, symbol in symbols.items()
        if any(name == p or name.startswith(p + ".") for p in public)
        and not name.startswith(CALLED_BY_TORCH)
        and (symbol["isTypeAmbiguous"] or not symbol["isTypeKnown"])
    }
    # A class with untyped members is not complete either; its members are named already.
    assert not {name: why for name, why in wrong.items() if why}


def test_calls_have_the_types_that_they_return_and_mistakes_are_seen() -> None:
    found = pyright()
    assert found["summary"]["filesAnalyzed"]
    assert not [
        f"{Path(d['file']).name}:{d['range']['start']['line'] + 1}: {d['message']}"
        for d in found["generalDiagnostics"]
    ]
