"""The Python around a training round, on 4 x 4 matrices: kept from the last, or made anew and kept.

pytest benchmarks/measure/bench_rounds.py --benchmark-only
"""

from __future__ import annotations

import pytest
from torch import nn

import srn_kernels as srn
from srn_kernels.model import root


class Bag(nn.Module):
    """Layers that a forward normalises and does not call."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(layers))

    def forward(self) -> None:
        pass


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "anew"])
@pytest.mark.parametrize("layers", [11, 150])
def bench_a_training_forward(benchmark, layers: int, kept: bool) -> None:
    model = srn.apply_stable_rank_norm(Bag(layers), 0.7)
    model()
    this = model.__dict__[root.ROUND]
    assert this.steady
    benchmark.group = f"{layers} layers"
    if kept:
        benchmark(model)
    else:
        benchmark.pedantic(
            model, setup=this.steady.clear, rounds=500, iterations=1, warmup_rounds=20
        )
