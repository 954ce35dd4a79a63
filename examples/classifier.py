"""A classifier under stable rank normalisation, beside the same one without.

SRN holds the gap between training and test down by bounding how many directions each layer acts in.
Labels are partly wrong here, so that there is something to learn by heart.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import srn_kernels as srn


def data(n: int, wrong: float, seed: int) -> tuple[Tensor, Tensor]:
    """Two classes in 64 dimensions, told apart by 2; a share of the labels is wrong."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 64, generator=generator)
    y = (x[:, 0] + x[:, 1] > 0).long()
    return x, torch.where(torch.rand(n, generator=generator) < wrong, 1 - y, y)


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return (model.eval()(x).argmax(1) == y).float().mean().item()


def trained(rank_ratio: float | None) -> tuple[float, float]:
    """Accuracy on the training and on the test data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    model.append(nn.Linear(64, 2))
    if rank_ratio is not None:  # the last layer is left free, to give logits their scale
        srn.apply_stable_rank_norm(model, rank_ratio, exclude=["4"])
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    x, y = data(256, 0.2, seed=1)
    for _ in range(150):
        model.train()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return accuracy(model, x, y), accuracy(model, *data(2048, 0.0, seed=2))


gaps = {}
for name, rank_ratio in (("without", None), ("SN", 1.0), ("SRN-10", 0.1)):
    train, test = trained(rank_ratio)
    gaps[name] = train - test
    print(f"{name:8}  training {train:.3f}  test {test:.3f}  gap {gaps[name]:.3f}")
assert gaps["SRN-10"] < gaps["without"]
