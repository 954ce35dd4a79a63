"""The Python around a training round, on 4 x 4 matrices that no forward calls.

pytest benchmarks/measure/bench_rounds.py --benchmark-only
"""

from __future__ import annotations

import pytest
from torch import nn

import srn_kernels as srn


class Bag(nn.Module):
    """Layers that a forward normalises and does not call."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(layers))

    def forward(self) -> None:
        pass


@pytest.mark.parametrize("layers", [11, 50, 150, 300])
def bench_a_training_forward(benchmark, layers: int) -> None:
    model = srn.apply_stable_rank_norm(Bag(layers), 0.7)
    model()
    benchmark(model)
