"""Callbacks for Lightning and transformers: ``from srn_kernels.integrations import ...``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from srn_kernels.tools import integrations

if TYPE_CHECKING:
    from srn_kernels.tools.integrations import LightningHistory, TrainerHistory

__all__ = ["LightningHistory", "TrainerHistory"]


def __getattr__(name: str) -> Any:
    return getattr(integrations, name)
