"""Hooks of spectral norm as people have them: with a soft bound, a stable rank, and other turns."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.spectral_norm import SpectralNorm


class StableRankHook:
    """The attributes and arithmetic of the public hook, for dim 0 where it is right."""

    def __init__(self, name: str, rank_ratio: float) -> None:
        self.name, self.dim, self.n_power_iterations, self.eps = name, 0, 1, 1e-12
        self.rank_ratio = rank_ratio

    def compute_weight(self, module: nn.Module, do_power_iteration: bool) -> torch.Tensor:
        weight = getattr(module, self.name + "_orig")
        u, v = (getattr(module, self.name + s) for s in ("_u", "_v"))
        w = weight.flatten(1)
        if do_power_iteration:
            with torch.no_grad():
                v.copy_(F.normalize(w.T @ u, dim=0))
                u.copy_(F.normalize(w @ v, dim=0))
            u, v = u.clone(), v.clone()
        w = w / (u @ w @ v)
        if self.rank_ratio <= 0.9999:
            e = torch.outer(u, v)
            limit = (self.rank_ratio * min(w.shape) - 1) ** 0.5
            if (w - e).norm() > limit:
                w = e + (w - e) * limit / (w - e).norm()
        return w.reshape(weight.shape)

    def __call__(self, module: nn.Module, inputs: object) -> None:
        setattr(module, self.name, self.compute_weight(module, module.training))


def add_stable_rank_hook(module: nn.Module, rank_ratio: float) -> nn.Module:
    weight = module._parameters.pop("weight")
    module.register_parameter("weight_orig", weight)
    module.weight = weight.data
    module.register_buffer("weight_u", F.normalize(torch.randn(weight.shape[0]), dim=0))
    module.register_buffer("weight_v", F.normalize(torch.randn(weight[0].numel()), dim=0))
    module.register_forward_pre_hook(StableRankHook("weight", rank_ratio))
    return module


class SoftHook(SpectralNorm):
    """A subclass of torch's hook with a bound and a logged sigma."""

    def compute_weight(self, module: nn.Module, do_power_iteration: bool) -> torch.Tensor:
        hard = super().compute_weight(module, do_power_iteration)
        raw = getattr(module, self.name + "_orig")
        u, v = (getattr(module, self.name + s) for s in ("_u", "_v"))
        sigma = torch.dot(u, self.reshape_weight_to_matrix(raw) @ v)
        getattr(module, self.name + "_sigma").copy_(sigma.detach())
        return hard * sigma / torch.clamp_min(sigma / self.coeff, 1.0)


class ScaledHook(SoftHook):
    """The same attributes, but a hard bound: W coeff / sigma."""

    def compute_weight(self, module: nn.Module, do_power_iteration: bool) -> torch.Tensor:
        return SpectralNorm.compute_weight(self, module, do_power_iteration) * self.coeff


class DetachedHook(SpectralNorm):
    """W / sigma with sigma held constant in the gradient."""

    def compute_weight(self, module: nn.Module, do_power_iteration: bool) -> torch.Tensor:
        hard = SpectralNorm.compute_weight(self, module, do_power_iteration).detach()
        raw = getattr(module, self.name + "_orig")
        return raw * (hard / raw.detach())


class ConvolutionHook(SoftHook):
    """Keeps u, v of the operator on inputs of one size, as DUE's and i-ResNet's convolutions."""


def add_hook(layer: nn.Module, kind: type, coeff: float | None = None) -> nn.Module:
    hook = kind("weight", 1, 0, 1e-12)
    if coeff is not None:
        hook.coeff = coeff
    weight = layer._parameters.pop("weight")
    layer.register_parameter("weight_orig", weight)
    layer.weight = weight.data
    for name, size in (("u", weight.shape[0]), ("v", weight[0].numel())):
        layer.register_buffer(f"weight_{name}", F.normalize(torch.randn(size), dim=0))
    if kind in (SoftHook, ScaledHook, ConvolutionHook):
        layer.register_buffer("weight_sigma", torch.ones(1))
    layer.register_forward_pre_hook(hook)
    return layer
