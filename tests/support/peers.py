"""Models as people have them: written here, with the structure and the wrapping habits of the
projects they are named after. Hooks like those that exist are in peer_hooks.py."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm
from torch.nn.utils import spectral_norm as legacy_spectral_norm

# --- Real-ESRGAN: a U-Net of legacy spectral norm, first and last layer plain ---------------------


class UNetDiscriminator(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        norm = legacy_spectral_norm
        self.first = nn.Conv2d(3, width, 3, 1, 1)
        widths = [width, 2 * width, 4 * width, 8 * width]
        self.down = nn.ModuleList(
            norm(nn.Conv2d(a, b, 4, 2, 1, bias=False)) for a, b in itertools.pairwise(widths)
        )
        self.up = nn.ModuleList(
            norm(nn.Conv2d(a, b, 3, 1, 1, bias=False))
            for a, b in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.extra = nn.Sequential(
            norm(nn.Conv2d(width, width, 3, 1, 1, bias=False)),
            nn.LeakyReLU(0.2),
            norm(nn.Conv2d(width, width, 3, 1, 1, bias=False)),
        )
        self.last = nn.Conv2d(width, 1, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = [F.leaky_relu(self.first(x), 0.2)]
        for conv in self.down:
            features.append(F.leaky_relu(conv(features[-1]), 0.2))
        y = features.pop()
        for conv in self.up:
            y = F.interpolate(y, scale_factor=2, mode="bilinear")
            y = F.leaky_relu(conv(y), 0.2) + features.pop()
        return self.last(self.extra(y))


# --- BigGAN: layer classes with u0 and sv0, a throw-away iteration in evaluation ------------------


class OwnNorm:
    """Keeps u alone; every use of the weight iterates, and training keeps the result."""

    def keep(self, size: int, eps: float, count: int = 1, transpose: bool = False) -> None:
        self.num_itrs, self.num_svs, self.transpose, self.eps = 1, count, transpose, eps
        for i in range(count):
            self.register_buffer(f"u{i}", torch.randn(1, size))
            self.register_buffer(f"sv{i}", torch.ones(1))

    def W_(self) -> Tensor:
        w = self.weight.flatten(1)
        w, u = (w.T if self.transpose else w), self.u0
        for _ in range(self.num_itrs):
            with torch.no_grad():
                v = F.normalize(u @ w, eps=self.eps)
                u = F.normalize(v @ w.T, eps=self.eps)
        if self.training:
            self.u0.copy_(u)
        sigma = (v @ w.T @ u.T).squeeze()
        if self.training:
            self.sv0.copy_(sigma.detach())
        return self.weight / sigma


class OwnConv(nn.Conv2d, OwnNorm):
    def __init__(self, *arguments, eps: float = 1e-6, **keywords) -> None:
        nn.Conv2d.__init__(self, *arguments, **keywords)
        self.keep(self.out_channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.W_(), self.bias, self.stride, self.padding)


class OwnLinear(nn.Linear, OwnNorm):
    def __init__(self, *arguments, eps: float = 1e-6, transpose: bool = False, **keywords) -> None:
        nn.Linear.__init__(self, *arguments, **keywords)
        self.keep(self.in_features if transpose else self.out_features, eps, 2, transpose)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.W_(), self.bias)


class OwnEmbedding(nn.Embedding, OwnNorm):
    def __init__(self, *arguments, eps: float = 1e-6, **keywords) -> None:
        nn.Embedding.__init__(self, *arguments, **keywords)
        self.keep(self.num_embeddings, eps)

    def forward(self, y: Tensor) -> Tensor:
        return F.embedding(y, self.W_())


class ClassConditional(nn.Module):
    """Layers through functools.partial, a projection head, orthogonal initialisation at the end."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        conv = functools.partial(OwnConv, kernel_size=3, padding=1)
        self.block = nn.ModuleDict(
            {
                "conv1": conv(3, width),
                "conv2": conv(width, width),
                "shortcut": OwnConv(3, width, kernel_size=1),
            }
        )
        self.linear, self.embed = OwnLinear(width, 1), OwnEmbedding(5, width)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear, nn.Embedding)):
                nn.init.orthogonal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.block["conv2"](F.relu(self.block["conv1"](F.relu(x))))
        y = F.relu(F.avg_pool2d(y, 2) + self.block["shortcut"](F.avg_pool2d(x, 2))).sum((2, 3))
        labels = torch.arange(len(x)) % 5
        return self.linear(y) + (self.embed(labels) * y).sum(1, keepdim=True)


class MimicryConv(nn.Conv2d):
    def __init__(self, *arguments, **keywords) -> None:
        super().__init__(*arguments, **keywords)
        self.num_iters, self.eps = 1, 1e-12
        self.register_buffer("sn_u", torch.randn(1, self.out_channels))
        self.register_buffer("sn_sigma", torch.ones(1))

    def sn_weights(self) -> Tensor:
        w = self.weight.flatten(1)
        with torch.no_grad():
            v = F.normalize(self.sn_u @ w)
            u = F.normalize(v @ w.T)
        sigma = u @ w @ v.T
        if self.training:
            with torch.no_grad():
                self.sn_u.copy_(u)
                self.sn_sigma.copy_(sigma.squeeze(0))
        return self.weight / sigma

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.sn_weights(), self.bias, self.stride, self.padding)


class Mimicry(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            MimicryConv(3, 6, 3, padding=1), nn.ReLU(), MimicryConv(6, 8, 3, stride=2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


# --- SPADE: wraps what it is given, then deletes the bias, and asks the weight for its size -------


def spectral_instance(layer: nn.Module) -> nn.Sequential:
    layer = legacy_spectral_norm(layer)
    if getattr(layer, "bias", None) is not None:
        del layer.bias
        layer.register_parameter("bias", None)
    return nn.Sequential(layer, nn.InstanceNorm2d(layer.weight.size(0), affine=False))


class Patches(nn.Module):
    """A list of stages whose outputs are all returned."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        stages = [nn.Sequential(nn.Conv2d(3, width, 4, 2, 2), nn.LeakyReLU(0.2))]
        for i in range(2):
            conv = nn.Conv2d(width * 2**i, width * 2 ** (i + 1), 4, 2, 2)
            stages.append(nn.Sequential(spectral_instance(conv), nn.LeakyReLU(0.2)))
        stages.append(nn.Sequential(nn.Conv2d(4 * width, 1, 4, 1, 2)))
        for i, stage in enumerate(stages):
            self.add_module(f"model{i}", stage)

    def forward(self, x: Tensor) -> Tensor:
        outputs = [x]
        for stage in self.children():
            outputs.append(stage(outputs[-1]))
        return torch.cat([y.flatten(1) for y in outputs[1:]], 1)


# --- HiFi-GAN: grouped one-dimensional convolutions, spectral norm in one scale, weight norm in two


class Scale(nn.Module):
    def __init__(self, use_spectral_norm: bool) -> None:
        super().__init__()
        norm = legacy_spectral_norm if use_spectral_norm else weight_norm
        self.convs = nn.ModuleList(
            [
                norm(nn.Conv1d(1, 8, 15, 1, padding=7)),
                norm(nn.Conv1d(8, 8, 11, 2, groups=4, padding=5)),
                norm(nn.Conv1d(8, 16, 11, 4, groups=8, padding=5)),
            ]
        )
        self.conv_post = norm(nn.Conv1d(16, 1, 3, 1, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.1)
        return self.conv_post(x).flatten(1)


class Scales(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.discriminators = nn.ModuleList([Scale(True), Scale(False), Scale(False)])

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)[:, None]
        return torch.cat([d(x) for d in self.discriminators], 1)


# --- Self-Attention GAN: a wrapper module with u and v as Parameters, that iterates in evaluation -


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module, name: str = "weight", power_iterations: int = 1) -> None:
        super().__init__()
        self.module, self.name, self.power_iterations = module, name, power_iterations
        w = module._parameters.pop(name)
        rows = w.shape[0]
        module.register_parameter(name + "_u", self.vector(rows))
        module.register_parameter(name + "_v", self.vector(w.numel() // rows))
        module.register_parameter(name + "_bar", nn.Parameter(w.data))

    @staticmethod
    def vector(size: int) -> nn.Parameter:
        return nn.Parameter(F.normalize(torch.randn(size), dim=0), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        u, v, w = (getattr(self.module, f"{self.name}_{part}") for part in ("u", "v", "bar"))
        for _ in range(self.power_iterations):
            v.data = F.normalize(w.data.flatten(1).T @ u.data, dim=0)
            u.data = F.normalize(w.data.flatten(1) @ v.data, dim=0)
        sigma = u.dot(w.flatten(1) @ v)
        setattr(self.module, self.name, w / sigma)
        return self.module(x)


class SelfAttention(nn.Module):
    """A generator's transposed convolutions, normalised along dimension 0, and an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.l1 = nn.Sequential(Wrapper(nn.Conv2d(3, 8, 4, 2, 1)), nn.LeakyReLU(0.1))
        self.query, self.value = nn.Conv2d(8, 2, 1), nn.Conv2d(8, 8, 1)
        self.gamma = nn.Parameter(torch.full((1,), 0.5))
        self.l2 = nn.Sequential(Wrapper(nn.ConvTranspose2d(8, 4, 4, 2, 1)), nn.ReLU())
        self.last = nn.Sequential(nn.Conv2d(4, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.l1(x)
        q, v = self.query(y).flatten(2), self.value(y).flatten(2)
        attention = torch.softmax(q.transpose(1, 2) @ q, -1)
        y = y + self.gamma * (v @ attention.transpose(1, 2)).view_as(y)
        return self.last(self.l2(y)).flatten(1)


# --- Projected GAN: one discriminator a feature scale, and a train() that never reaches the root --


class Projected(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 6, 3, padding=1).requires_grad_(False)

        def conv(*arguments, **keywords) -> nn.Module:
            return parametrizations.spectral_norm(nn.Conv2d(*arguments, **keywords))

        self.heads = nn.ModuleDict(
            {str(i): nn.Sequential(conv(6, 8, 4, 2, 1), nn.SiLU(), conv(8, 1, 4)) for i in range(2)}
        )

    def train(self, mode: bool = True) -> nn.Module:
        self.features.train(False)
        self.heads.train(mode)
        return self

    def eval(self) -> nn.Module:
        return self.train(False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        small = F.avg_pool2d(y, 2)
        return torch.cat(
            [
                self.heads["0"](y).flatten(1),
                self.heads["1"](F.interpolate(small, size=y.shape[2:])).flatten(1),
            ],
            1,
        )


# --- sngan_projection: initialises through .data after wrapping -----------------------------------


class InitialisedAfterwards(nn.Module):
    def __init__(self, norm: Callable[[nn.Module], nn.Module] = legacy_spectral_norm) -> None:
        super().__init__()
        self.c1, self.c2 = norm(nn.Conv2d(3, 8, 3, 1, 1)), norm(nn.Conv2d(8, 8, 3, 1, 1))
        self.l3 = norm(nn.Linear(8, 1))
        for layer in (self.c1, self.c2, self.l3):
            nn.init.xavier_uniform_(layer.weight.data, math.sqrt(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.l3(F.relu(self.c2(F.relu(self.c1(x)))).sum((2, 3)))


MODELS = {  # the model, and how many of its weights are normalised
    "Real-ESRGAN": (UNetDiscriminator, 8),
    "BigGAN": (ClassConditional, 5),
    "mimicry": (Mimicry, 2),
    "SPADE": (Patches, 2),
    "HiFi-GAN": (Scales, 4),
    "Self-Attention GAN": (SelfAttention, 2),
    "Projected GAN": (Projected, 4),
    "sngan_projection": (InitialisedAfterwards, 3),
}


def pictures(seed: int = 0) -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def trained(make: Callable[[], nn.Module], steps: int = 5) -> nn.Module:
    model = make()
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-3)
    for step in range(steps):
        optimiser.zero_grad()
        model(pictures(step)).square().mean().backward()
        optimiser.step()
    return model


# --- the public stable_rank hook ---


# --- hooks as SNGP's, DUE's and invertible ResNets' code has them: W / max(1, sigma / coeff) ------
