"""What one ``srn_kernels.convert_spectral_norm`` call changes in a spectrally normalised model.

The model is a U-Net discriminator in the shape of Real-ESRGAN's (Wang et al. 2021): ten
convolutions, of which all but the first and the last carry torch's spectral normalisation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import Enum

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, spectral_norm

import srn_kernels as srn
from srn_kernels import functional as srn_functional
from srn_kernels.tools.doctor.examine import compare, training_round
from srn_kernels.tools.doctor.factory import Inputs
from srn_kernels.tools.paired import Spread, paired_ms, ratios
from srn_lab.methods.method import matrix_layers


class SnStyle(str, Enum):
    """Which of torch's two spectral normalisations the model starts with."""

    LEGACY = "legacy"
    PARAMETRIZATION = "parametrization"


_SETTLING_FORWARDS = 30

_WRAPPERS: dict[SnStyle, Callable[[nn.Module], nn.Module]] = {
    SnStyle.LEGACY: spectral_norm,
    SnStyle.PARAMETRIZATION: parametrizations.spectral_norm,
}


class UNetDiscriminator(nn.Module):
    """Image (B, channels, H, W) -> one logit a pixel (B, 1, H, W); H and W are multiples of 8.

    Three strided convolutions down, three convolutions up with summed skip connections, two more at
    full size. ``wrap`` is applied to the eight inner convolutions; with 64 features their weights
    are 128x1024, 256x2048, 512x4096, 256x4608, 128x2304, 64x1152 and twice 64x576 as matrices.
    """

    def __init__(
        self,
        num_feat: int = 64,
        channels: int = 3,
        wrap: Callable[[nn.Module], nn.Module] = lambda layer: layer,
    ) -> None:
        super().__init__()
        widths = [num_feat * 2**level for level in range(4)]

        def conv(channels_in: int, channels_out: int) -> nn.Module:
            return wrap(nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False))

        def strided(channels_in: int, channels_out: int) -> nn.Module:
            layer = nn.Conv2d(channels_in, channels_out, 4, stride=2, padding=1, bias=False)
            return wrap(layer)

        pairs = list(itertools.pairwise(widths))
        self.stem = nn.Conv2d(channels, num_feat, 3, padding=1)
        self.down = nn.ModuleList(strided(narrow, wide) for narrow, wide in pairs)
        self.up = nn.ModuleList(conv(wide, narrow) for narrow, wide in reversed(pairs))
        self.tail = nn.ModuleList(conv(num_feat, num_feat) for _ in range(2))
        self.head = nn.Conv2d(num_feat, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = _activate(self.stem(x))
        skips = []
        for layer in self.down:
            skips.append(h)
            h = _activate(layer(h))
        for layer in self.up:
            h = F.interpolate(h, scale_factor=2, mode="bilinear", align_corners=False)
            h = _activate(layer(h)) + skips.pop()
        for layer in self.tail:
            h = _activate(layer(h))
        return self.head(h)


@dataclass(frozen=True)
class OverheadConfig:
    """What is timed: ``batch`` images of ``size`` x ``size``, forward and backward in training."""

    style: SnStyle = SnStyle.PARAMETRIZATION
    num_feat: int = 64
    size: int = 64
    batch: int = 1
    repeats: int = 15
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_feat", "size", "batch", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.size % 8:
            raise ValueError(f"size must be a multiple of 8, got {self.size}")


@dataclass(frozen=True)
class Overhead:
    """The result of :func:`measure_overhead`; times are spreads over the repeats, in ms.

    ``step_ms`` is forward and backward of the whole model, without normalisation (plain), with
    torch's and converted. ``normalisation_ms`` is forward and backward of the weights alone.
    """

    config: OverheadConfig
    normalised_layers: int
    max_abs_output: float
    max_abs_output_difference: float
    step_ms: dict[str, Spread]
    normalisation_ms: dict[str, Spread]
    step_ratio: Spread
    """torch over converted, round by round: above 1, the converted model is faster."""
    normalisation_ratio: Spread

    def to_dict(self) -> dict:
        """Plain numbers with the unit in each key, ready for JSON."""
        return {
            "config": asdict(self.config),
            "normalised_layers": self.normalised_layers,
            "max_abs_output": self.max_abs_output,
            "max_abs_output_difference": self.max_abs_output_difference,
            "step": {name: spread.to_dict("ms") for name, spread in self.step_ms.items()},
            "normalisation_alone": {
                name: spread.to_dict("ms") for name, spread in self.normalisation_ms.items()
            },
            "step_torch_over_converted": self.step_ratio.to_dict("ratio"),
            "normalisation_torch_over_converted": self.normalisation_ratio.to_dict("ratio"),
        }


def measure_overhead(config: OverheadConfig) -> Overhead:
    """Convert a twin of the model in one call, compare the outputs, time both and the plain one.

    The three models take turns within every repeat; nothing else should run on the machine.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        plain = UNetDiscriminator(config.num_feat)
        image = torch.rand(config.batch, 3, config.size, config.size) * 2 - 1
        peer = UNetDiscriminator(config.num_feat, wrap=_WRAPPERS[config.style])
        # Not a deepcopy: torch's parametrization lives on a class that copies share, so taking it
        # off the copy takes it off the original.
        twin = UNetDiscriminator(config.num_feat, wrap=_WRAPPERS[config.style])
    _settle(peer)
    twin.load_state_dict(peer.state_dict())
    converted = srn.convert_spectral_norm(twin)

    difference = compare(peer, converted, inputs := Inputs((image,), {}))

    models = {"plain": plain, "torch": peer, "converted": converted}
    steps = paired_ms(
        {name: training_round(model, inputs) for name, model in models.items()},
        repeats=config.repeats,
    )
    alone = paired_ms(
        {"torch": _torch_weights_step(peer), "converted": _converted_weights_step(converted)},
        repeats=config.repeats,
    )
    return Overhead(
        config=config,
        normalised_layers=len(_converted_layers(converted)),
        max_abs_output=difference.scale,
        max_abs_output_difference=difference.largest,
        step_ms={name: Spread.of(sample) for name, sample in steps.items()},
        normalisation_ms={name: Spread.of(sample) for name, sample in alone.items()},
        step_ratio=Spread.of(ratios(steps["torch"], steps["converted"])),
        normalisation_ratio=Spread.of(ratios(alone["torch"], alone["converted"])),
    )


def _settle(model: nn.Module) -> None:
    """Training forwards until u and v are near the top singular pairs, as in a trained model.

    torch's legacy form starts with random u and v, where sigma = u^T W v has even a random sign.
    """
    with torch.no_grad():
        for _ in range(_SETTLING_FORWARDS):
            model(torch.zeros(1, 3, 8, 8))


def _activate(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2)


def _torch_weights_step(model: nn.Module) -> Callable[[], None]:
    """Training forward and backward of torch's spectral norm, without the convolutions."""
    layers = [layer for _, layer in matrix_layers(model) if _has_torch_sn(layer)]
    upstream = [torch.ones_like(layer.weight) for layer in layers]

    def weight(layer: nn.Module) -> Tensor:
        # The legacy form computes in its pre-forward hook, the parametrization when it is read.
        for hook in layer._forward_pre_hooks.values():
            hook(layer, None)
        return layer.weight

    def step() -> None:
        model.zero_grad()
        torch.autograd.backward([weight(layer) for layer in layers], upstream)

    return step


def _converted_weights_step(model: nn.Module) -> Callable[[], None]:
    layers = _converted_layers(model)
    weights = [layer.weight for layer in layers]
    us, vs = [layer.weight_u for layer in layers], [layer.weight_v for layer in layers]
    upstream = [torch.ones_like(weight) for weight in weights]
    no_rank_bound = [math.inf] * len(layers)

    def step() -> None:
        model.zero_grad()
        normalised = srn_functional.stable_rank_normalize(weights, us, vs, no_rank_bound)
        torch.autograd.backward(normalised, upstream)

    return step


def _has_torch_sn(layer: nn.Module) -> bool:
    return hasattr(layer, "weight_orig") or hasattr(layer, "parametrizations")


def _converted_layers(model: nn.Module) -> list[nn.Module]:
    return [layer for _, layer in matrix_layers(model) if srn.is_normalized(layer)]
