"""The compiled extensions: what the build wrote down about them, and loading those that fit."""

from __future__ import annotations

import functools
import importlib
import json
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

AGAIN = "pip install --force-reinstall --no-deps . in the sources"
PACKAGE = Path(__file__).resolve().parents[1]


@functools.cache
def record() -> dict[str, Any]:
    """What setup.py wrote: torch's version and CUDA, and for each module None or why it is missing.

    Empty where the package is used as it is, without a build.
    """
    path = Path(__file__).with_name("built.json")
    return json.loads(path.read_text()) if path.exists() else {}


def _release(version: str) -> list[str]:
    return version.split("+")[0].split(".")[:2]


def unfit(name: str) -> str | None:
    """Why a module must not be loaded: it may crash in a torch it was not compiled against."""
    was, now = record().get("torch"), torch.__version__
    if reason := record().get("modules", {}).get(name):
        # no build gives a torch without CUDA the CUDA kernels
        in_vain = name.endswith("_cuda") and torch.version.cuda is None
        return reason if in_vain else f"{reason}; to build it: {AGAIN}"
    if was is not None and _release(was) != _release(now):
        return f"{name} was built against torch {was}, this is {now}; to build it again: {AGAIN}"
    return None


def load(name: str) -> tuple[ModuleType | None, str | None]:
    """An extension, or None and the reason why it is not live."""
    if reason := unfit(name):
        return None, reason
    try:
        return importlib.import_module(name), None
    except ImportError as error:
        reason = f"the extension {name} is not built ({error})"
        if installed := hidden():
            reason += f"; the package in {installed} is, but {PACKAGE} hides it: run Python from "
            reason += "another folder"
        return None, reason


@functools.cache
def hidden() -> Path | None:
    """An installed, built package before which this one is found: a clone that Python runs in."""
    for found in metadata.distributions(name=PACKAGE.name):
        other = Path(str(found.locate_file(PACKAGE.name))).resolve()
        if other != PACKAGE and (other / "backends" / "built.json").exists():
            return other
    return None
