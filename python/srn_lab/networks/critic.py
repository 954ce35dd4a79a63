"""The critic of the neural divergence: a DCGAN discriminator without any normalisation.

Convolutions of 5x5 at stride 2 with 64, 128 and 256 filters, swish, He initialisation and one dense
output, as in the metric's reference setting (Gulrajani et al. 2019).
"""

from __future__ import annotations

import itertools

from torch import Tensor, nn


class Critic(nn.Module):
    """Image (B, channels, side, side) -> one value an image, (B,); a side of at least 8 pixels."""

    def __init__(self, resolution: int, channels: int = 3, width: int = 64) -> None:
        super().__init__()
        if resolution < 8 or resolution % 8:
            raise ValueError(f"resolution must be a multiple of 8, got {resolution}")
        widths = [channels, width, 2 * width, 4 * width]
        layers: list[nn.Module] = []
        for channels_in, channels_out in itertools.pairwise(widths):
            layers += [nn.Conv2d(channels_in, channels_out, 5, stride=2, padding=2), nn.SiLU()]
        self.features = nn.Sequential(*layers)
        self.dense = nn.Linear(widths[-1] * (resolution // 8) ** 2, 1)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(self.features(x).flatten(1)).squeeze(1)
