"""What ``groups=n`` costs: the rounds of a model, forward and backward, in one node and in n.

    python -m benchmarks.bench_groups [--repeats N] [--budget SECONDS] [--save]

Prints medians of paired, interleaved runs and their ratio to one group; --save keeps them and
brings docs/distributed.md up to date. The layers' own forward and backward are left out: W_hat goes
straight into a sum.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

import srn_kernels as srn
from benchmarks import store, tables
from benchmarks.models import ResNetDiscriminator
from benchmarks.timing import Body, measure

GROUPS = (1, 2, 4, 8)
WORKLOAD = "sngan_cifar_resnet_D"  # the matrices of the model below
ROWS = store.RESULTS / "groups.jsonl"
DOCUMENT = store.HERE.parent / "docs" / "distributed.md"


def round_of(model: nn.Module) -> None:
    """One round forward and backward, with a gradient for every layer."""
    layers = [m for m in model.modules() if srn.is_normalized(m)]
    with srn.shared_round(model):
        outs = [layer.weight for layer in layers]
    torch.autograd.backward(outs, [torch.ones_like(out) for out in outs])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds a number of groups")
    parser.add_argument("--save", action="store_true", help="keep the rows, and publish them")
    arguments = parser.parse_args()
    bodies = {}
    for n in GROUPS:
        torch.manual_seed(0)
        model = srn.apply_stable_rank_norm(
            ResNetDiscriminator((128, 128, 128, 128), 2), 0.5, groups=n
        )
        bodies[n] = Body(lambda model=model: round_of(model), lambda model=model: model.zero_grad())
    base = replace(store.environment(), workload=WORKLOAD, rank_ratio=0.5, mode="forward_backward")
    samples = measure(bodies, repeats=arguments.repeats, budget=arguments.budget)
    rows = []
    for n in GROUPS:
        row = replace(base, provider=f"groups={n}")
        rows.append(row.with_result("time_ms", samples.spread(n), 1e3))
        over = samples.paired(n, 1, lambda t, base: t / base)
        rows.append(row.with_result("time_over_one_group_x", over))
    print(table(rows))
    if arguments.save:
        store.append(rows, ROWS)
        DOCUMENT.write_text(tables.replaced(DOCUMENT.read_text(), table(rows)))


def table(rows: Sequence[store.Row]) -> str:
    """The block of docs/distributed.md: one run."""
    lines = []
    for n in GROUPS:
        time, over = (r for r in rows if r.provider == f"groups={n}")
        times = f"{over.p50:.2f} ({over.p20:.2f} to {over.p80:.2f})"
        lines.append([time.provider, tables.number(time.p50), times])
    header = ["", "ms", "times one group (20th to 80th percentile)"]
    grid = tables.Grid("A round of 11 layers, forward and backward", header, lines)
    made = "Made by `python -m benchmarks.bench_groups --save`."
    return "\n\n".join([grid.markdown(), tables.caption(rows), made])


if __name__ == "__main__":
    main()
