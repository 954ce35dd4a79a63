"""The Python around rounds, on 4 x 4 matrices.

pytest benchmarks/measure/bench_rounds.py --benchmark-only
"""

from __future__ import annotations

import pytest
import torch
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


class Chain(Bag):
    """Layers that are called."""

    def forward(self) -> None:
        for layer in self.layers:
            layer(self.input)


@pytest.mark.parametrize("layers", [11, 150])
def bench_a_forward_in_a_shared_round(benchmark, layers: int) -> None:
    model = Chain(layers)
    model.input = torch.ones(1, 4)
    srn.apply_stable_rank_norm(model, 0.7)
    with srn.shared_round(model):
        model()
        benchmark(model)
