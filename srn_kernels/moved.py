"""The modules of versions before 0.2, which whole-model pickles of that time ask for."""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_NAMES = "activation checkpoint entries layers parametrization recompute rounds state units"
OLD = frozenset(f"srn_kernels.{name}" for name in _NAMES.split())


class Finder(importlib.abc.MetaPathFinder):
    """Asked for modules that no other finder knows."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name in OLD:
            raise ModuleNotFoundError(
                f"{name} was part of srn_kernels before 0.2: a model pickled whole with it cannot "
                "be loaded; save its state_dict with that version, and load that with this one",
                name=name,
            )
        return None


def install() -> None:
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.append(Finder())
