"""Small models and measures that several test files use."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import srn_kernels as srn
from srn_kernels import functional


class Discriminator(nn.Module):
    """Conv, transposed conv and a one-output head, on (n, 3, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.up = nn.ConvTranspose2d(12, 6, 4, stride=2, padding=1)
        self.head = nn.Linear(6 * 16 * 16, 1)

    def features(self, x: Tensor) -> Tensor:
        return torch.relu(self.up(torch.relu(self.conv(x)))).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def images(n: int = 2) -> Tensor:
    return torch.randn(n, 3, 8, 8)


def check_it_trains(model: nn.Module, steps: int, lr: float) -> None:
    """The loss falls, on the same images in double precision."""
    x, optimizer = images().double(), torch.optim.Adam(model.parameters(), lr)
    losses = []
    for _ in range(steps):
        loss = (model(x) - 1).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {k: b.clone() for k, b in model.named_buffers() if k.endswith(("_u", "_v"))}


def same_state(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(b, before[k]) for k, b in state(model).items())


def matrix(layer: nn.Module, weight: Tensor) -> Tensor:
    dim = 1 if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 0
    return weight.movedim(dim, 0).flatten(1)


def sigma_max(layer: nn.Module, name: str = "weight") -> float:
    """The largest singular value of W_hat, by SVD."""
    return torch.linalg.matrix_norm(
        matrix(layer, srn.normalized_weight(layer, name)).double(), 2
    ).item()


def wrapped_layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if srn.is_normalized(m)]


def is_raw(model: nn.Module) -> bool:
    """Whether every wrapped layer shows its Parameter again."""
    return all(
        "weight" not in m.__dict__ and isinstance(m.weight, nn.Parameter)
        for m in wrapped_layers(model)
    )


def wrapped(rank_ratio: float = 0.3, double: bool = False) -> Discriminator:
    """A discriminator whose layers are all normalised."""
    model = Discriminator()
    if double:
        model.double()
    return srn.apply_stable_rank_norm(model, rank_ratio)


def plain_w_hat(layer: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """W_hat of a training forward by the functional core, from copies of u and v; and those."""
    dim = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
    u, v = layer.weight_u.clone(), layer.weight_v.clone()
    target = max(1.0, 0.3 * min(len(u), len(v)))  # the rank_ratio of wrapped
    (out,) = functional.stable_rank_normalize([layer.weight], [u], [v], [target], dims=[dim])
    return out, u, v


def snapshot(model: nn.Module) -> dict[str, object]:
    """What looking at a model, or a call that fails, must leave alone."""
    found: dict[str, object] = {k: v.clone() for k, v in model.state_dict().items()}
    for name, module in model.named_modules():
        found[f"{name}: attributes"] = sorted(module.__dict__)
        found[f"{name}: hooks"] = (
            len(module._forward_pre_hooks),
            len(module._forward_hooks),
            len(module._load_state_dict_pre_hooks),
        )
    return found


def assert_untouched(model: nn.Module, before: dict[str, object]) -> None:
    after = snapshot(model)
    assert after.keys() == before.keys()
    for key, value in before.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, after[key]), key
        else:
            assert value == after[key], key
