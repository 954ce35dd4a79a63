"""One look at the layers of a round: their weights, their u and v, and whether these fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from srn_kernels.core.guard import are_plain, check_tensor
from srn_kernels.maths.bound import Scaling
from srn_kernels.maths.matrix import state_dtype
from srn_kernels.model.freshness import Freshness, is_split, known_to_fit, versions_of
from srn_kernels.model.weight import NormalizedWeight, hidden

_AUTOCAST_TYPES = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention)


class Kind(NamedTuple):
    """What all layers of one op call have in common."""

    device: torch.device
    split: bool  # whether processes hold the weights together
    state_dtype: torch.dtype
    backend: str
    gradient: str
    rule: str
    alone: str  # the label of a tensor subclass, which is a call of its own


class Layer:
    """What a round needs of one layer beside its tensors; compared by identity, so made once."""

    def __init__(self, entry: NormalizedWeight, weight: Tensor) -> None:
        settings = entry.settings
        self.settings, self.label = settings, entry.label
        self.shape, self.dtype, self.device = weight.shape, weight.dtype, weight.device
        self.type = type(weight)  # FSDP2 shows now a DTensor, now a plain Parameter
        vector = weight.dim() == 1
        self.dim = 0 if vector else settings.dim
        self.rows = 1 if vector else weight.shape[settings.dim]
        self.columns = weight.numel() // self.rows
        self.target_rank = settings.target_rank(self.rows, self.columns)
        self.rule, split = settings.chosen_rule, is_split(weight)
        self.kind = Kind(
            weight.device,
            split,
            state_dtype(weight.dtype),
            settings.backend if self.rule.kernels else "reference",
            settings.gradient,
            self.rule.name,
            "" if split or _is_plain(weight) else entry.label,
        )
        self.tied = len(entry.sites) > 1
        self.n_power_iterations = settings.n_power_iterations
        self.scaling = Scaling(
            settings.sigma_max or 0.0, settings.grad_through_sigma, settings.gain
        )
        self.plain = not vector  # W_hat is what the op returns
        self.autocasts = weight.dtype != torch.float64 and isinstance(
            entry.sites[0][0], _AUTOCAST_TYPES
        )

    def describes(self, weight: Tensor) -> bool:
        """Whether all this is still so."""
        return (
            weight.shape == self.shape
            and weight.device == self.device
            and is_split(weight) is self.kind.split
            and (self.kind.split or _is_plain(weight) is not bool(self.kind.alone))
        )


def _is_plain(weight: Tensor) -> bool:
    return torch.compiler.is_compiling() or are_plain([weight])


class Seen(NamedTuple):
    """What one look at the layers of a round has found, layer by layer."""

    entries: Sequence[NormalizedWeight]
    layers: Sequence[Layer]
    weights: Sequence[Tensor]
    us: Sequence[Tensor]
    vs: Sequence[Tensor]
    training: Sequence[bool]
    versions: Sequence[int]  # of the weights; 0 where a compiler traces
    fits: Sequence[Freshness]
    fitting: Sequence[bool]  # whether u and v are known to serve the weight

    def part(self, places: Sequence[int]) -> Seen:
        return Seen(*([column[i] for i in places] for column in self))


def look(entries: Sequence[NormalizedWeight]) -> Seen:
    """The weights of a round with their u and v; RuntimeError names a layer whose weight is hidden
    or no longer belongs to its u and v."""
    compiling, n = torch.compiler.is_compiling(), len(entries)
    sites = [e.sites[0] for e in entries]
    modules = [module.__dict__ for module, _ in sites]
    weights = [x["_parameters"].get(name) for x, (_, name) in zip(modules, sites, strict=True)]
    if type(None) in map(type, weights):
        place = next(i for i, w in enumerate(weights) if w is None)
        raise hidden(*sites[place], entries[place].label)
    fits = [e.fit for e in entries]
    versions = [0] * n if compiling else versions_of(weights)
    fitting = [True] * n if compiling else known_to_fit(fits, weights, versions)
    layers, us, vs = [], [], []
    for entry, attributes, weight, fit in zip(entries, modules, weights, fitting, strict=True):
        layer = None if compiling else entry.layer
        if (
            layer is None
            or layer.settings is not entry.settings
            or layer.dtype is not weight.dtype
            or not ((fit and layer.type is type(weight)) or layer.describes(weight))
        ):
            if not compiling:
                check_tensor(weight, entry.label)
            layer = Layer(entry, weight)
            if not compiling:
                _check_vectors(entry, layer)
                entry.layer = layer
        layers.append(layer)
        buffers = attributes["_buffers"]
        us.append(buffers[entry.u_name])
        vs.append(buffers[entry.v_name])
    if set(map(type, us)) != {Tensor}:  # tensor parallelism replicates buffers
        us, vs = [e.u for e in entries], [e.v for e in entries]
    training = [
        x["training"] or (layer.tied and e.training)
        for x, layer, e in zip(modules, layers, entries, strict=True)
    ]
    return Seen(entries, layers, weights, us, vs, training, versions, fits, fitting)


def explain(seen: Seen) -> None:
    """After an op has refused its arguments: names a weight that changed without a new Parameter
    (``.data``), if there is one."""
    for entry, layer, weight in zip(seen.entries, seen.layers, seen.weights, strict=True):
        if not layer.describes(weight):
            entry.layer = None
            _check_vectors(entry, Layer(entry, weight))


def _check_vectors(entry: NormalizedWeight, layer: Layer) -> None:
    """Raises for a weight that was given another shape or dtype behind our back (``.data``)."""
    pairs = layer.rule.pairs(layer.rows, layer.columns)
    for x, size in ((entry.u, layer.rows), (entry.v, layer.columns)):
        right = x.numel() == size * pairs and x.dtype == layer.kind.state_dtype
        if not right or x.device != layer.device:
            raise RuntimeError(
                f"layer {layer.label!r}: its weight is now {layer.dtype} of shape "
                f"{tuple(layer.shape)} on {layer.device}, but its u and v are {x.dtype} on "
                f"{x.device} for another; move it with module.to(...), and take normalisation off "
                "(remove_stable_rank_norm) before changing the shape"
            )
