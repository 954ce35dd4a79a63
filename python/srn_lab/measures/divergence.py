"""Neural divergence: the loss of a fresh critic trained to tell generated from real images.

Settings after Gulrajani et al. (2019): WGAN-GP's loss with weight 10, Adam at 2e-4 decayed
linearly, the critic's weights averaged. As in Table 4 the number is the critic's loss, penalty
included, so higher is better: the critic separates the two less.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from srn_lab.methods.losses import Loss, between, gradient_penalty
from srn_lab.networks.critic import Critic


@dataclass(frozen=True)
class DivergenceConfig:
    """The critic and its training; the defaults are the reference's."""

    steps: int = 100_000
    batch_size: int = 256
    width: int = 64
    learning_rate: float = 2e-4
    gp_weight: float = 10.0
    ema: float = 0.999
    batches: int = 10_000
    """Over which the final loss is averaged."""


def neural_divergence(
    real: Tensor,
    sample: Callable[[int, torch.Generator], Tensor],
    config: DivergenceConfig | None = None,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> float:
    """The critic's mean loss on held-out ``real`` (N, C, H, W) and on ``sample(count, random)``."""
    config = config or DivergenceConfig()
    random = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        critic = Critic(real.shape[-1], real.shape[1], config.width).to(device)
    average = AveragedModel(critic, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
    optimizer = torch.optim.Adam(
        critic.parameters(), lr=config.learning_rate, betas=(0.0, 0.9), foreach=True
    )
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * (1 - step / config.steps)
        loss = _loss(critic, _batches(real, sample, config, random, device), config, random)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(critic)
    losses = [
        _loss(average, _batches(real, sample, config, random, device), config, random).item()
        for _ in range(config.batches)
    ]
    return sum(losses) / len(losses)


def _batches(
    real: Tensor,
    sample: Callable[[int, torch.Generator], Tensor],
    config: DivergenceConfig,
    random: torch.Generator,
    device: torch.device | str,
) -> tuple[Tensor, Tensor]:
    index = torch.randint(len(real), (config.batch_size,), generator=random)
    fake = sample(config.batch_size, random)
    # Pixels come in steps of 1/127.5; noise of that size hides the grid, which G does not have.
    noise = torch.rand(real[index].shape, generator=random) / 127.5
    return (real[index] + noise).to(device), fake.to(device)


def _loss(
    critic: torch.nn.Module,
    images: tuple[Tensor, Tensor],
    config: DivergenceConfig,
    random: torch.Generator,
) -> Tensor:
    real, fake = images
    middle = between(real, fake, random)
    on_real, on_fake, on_middle = critic(torch.cat([real, fake, middle])).split(len(real))
    penalty = gradient_penalty(on_middle, middle)
    return Loss.WASSERSTEIN.discriminator(on_real, on_fake) + config.gp_weight * penalty
