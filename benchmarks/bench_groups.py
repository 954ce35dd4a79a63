"""What ``groups=n`` costs: the rounds of a model, forward and backward, in one node and in n.

    python -m benchmarks.bench_groups [--repeats N] [--budget SECONDS]

Prints medians of paired, interleaved runs and their ratio to one group. The layers' own forward and
backward are left out: W_hat goes straight into a sum.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

import srn_kernels as srn
from benchmarks.models import ResNetDiscriminator
from benchmarks.timing import Body, measure

GROUPS = (1, 2, 4, 8)


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
    arguments = parser.parse_args()
    bodies = {}
    for n in GROUPS:
        torch.manual_seed(0)
        model = srn.apply_stable_rank_norm(
            ResNetDiscriminator((128, 128, 128, 128), 2), 0.5, groups=n
        )
        bodies[n] = Body(lambda model=model: round_of(model), lambda model=model: model.zero_grad())
    parameters = sum(m.weight.numel() for m in model.modules() if srn.is_normalized(m))
    count = len(srn.report(model))
    print(f"{count} layers, {parameters / 1e6:.1f} M weights, {torch.get_num_threads()} threads")
    samples = measure(bodies, repeats=arguments.repeats, budget=arguments.budget)
    for n in GROUPS:
        time, ratio = samples.spread(n), samples.paired(n, 1, lambda t, base: t / base)
        print(f"groups={n}: {time.p50 * 1e3:.2f} ms, {ratio.p50:.3f} of one group")


if __name__ == "__main__":
    main()
