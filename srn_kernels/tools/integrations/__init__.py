"""Callbacks for trainers of others; each imports its package when it is asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from srn_kernels.tools.integrations.huggingface import TrainerHistory
    from srn_kernels.tools.integrations.pytorch_lightning import LightningHistory

__all__ = ["LightningHistory", "TrainerHistory"]

_PLACES = {"LightningHistory": "pytorch_lightning", "TrainerHistory": "huggingface"}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; there are {__all__}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
