"""Surroundings of the tests of GPU kernels."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

EMPTY = torch.empty


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton plans of many tiles of few elements, so that small layers go through every phase."""
    from srn_kernels.backends.tiling import layout
    from srn_kernels.backends.tiling.config import KB, LaunchConfig
    from srn_kernels.backends.triton import launch

    def config(device: torch.device, model_bytes: int, is_backward: bool) -> LaunchConfig:
        return LaunchConfig(
            programs=3,
            block=8192,
            tile_bytes=24 * KB,
            min_rows=4,
            max_slabs=40,
            column_bytes=3 * KB,
            lookahead_bytes=40 * KB,
            protected_bytes=50 * KB,
        )

    monkeypatch.setattr(launch, "device_config", config)
    monkeypatch.setattr(layout, "WIDEST_ROW", 1024)
    launch.plan_for.cache_clear()
    yield
    launch.plan_for.cache_clear()


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workspaces start as NaN: a sum that was not written shows."""

    def poisoned_empty(*args, **kwargs) -> Tensor:
        t = EMPTY(*args, **kwargs)
        return t.fill_(math.nan) if t.is_floating_point() else t

    monkeypatch.setattr(torch, "empty", poisoned_empty)
