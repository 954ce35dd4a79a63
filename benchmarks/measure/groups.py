"""What ``groups=n`` costs: the rounds of a model, forward and backward, in one node and in n.

The layers' own forward and backward are left out: W_hat goes straight into a sum.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

import srn_kernels as srn
from benchmarks.cases.models import ResNetDiscriminator
from benchmarks.measure import store
from benchmarks.measure.timing import Body, measure

GROUPS = (1, 2, 4, 8)
WORKLOAD = "sngan_cifar_resnet_D"  # the matrices of the model below
RESULTS = "groups.jsonl"


def round_of(model: nn.Module) -> None:
    """One round forward and backward, with a gradient for every layer."""
    layers = [m for m in model.modules() if srn.is_normalized(m)]
    with srn.shared_round(model):
        outs = [layer.weight for layer in layers]
    torch.autograd.backward(outs, [torch.ones_like(out) for out in outs])


def run(repeats: int, budget: float, base: store.Row) -> list[store.Row]:
    """Medians of paired, interleaved runs, and their ratio to one group; seconds of budget each."""
    bodies = {}
    for n in GROUPS:
        torch.manual_seed(0)
        model = srn.apply_stable_rank_norm(
            ResNetDiscriminator((128, 128, 128, 128), 2), 0.5, groups=n
        )
        bodies[n] = Body(lambda model=model: round_of(model), lambda model=model: model.zero_grad())
    base = replace(base, workload=WORKLOAD, rank_ratio=0.5, mode="forward_backward")
    samples = measure(bodies, repeats=repeats, budget=budget)
    rows = []
    for n in GROUPS:
        row = replace(base, provider=f"groups={n}")
        rows.append(row.with_result("time_ms", samples.spread(n), 1e3))
        over = samples.paired(n, 1, lambda t, base: t / base)
        rows.append(row.with_result("time_over_one_group_x", over))
    return rows
