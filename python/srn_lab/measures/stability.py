"""How steady a loss is over training (Figure 11)."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def roughness(losses: Sequence[float], window: int = 25) -> float:
    """Standard deviation of the second half of a loss curve about its own moving average.

    The average over ``window`` steps takes out the trend, so a loss that falls or rises smoothly is
    steady; half the curve or less than the window: what there is.
    """
    if len(losses) < 4:
        raise ValueError(f"losses must hold at least 4 steps, got {len(losses)}")
    late = torch.tensor(losses, dtype=torch.float64)[len(losses) // 2 :]
    width = min(window, len(late))
    trend = late.unfold(0, width, 1).mean(dim=1)
    start = (width - 1) // 2
    return (late[start : start + len(trend)] - trend).square().mean().sqrt().item()
