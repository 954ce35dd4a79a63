"""The round that training repeats: nothing has changed since the last one but the weights' values.

A root's round first goes through :func:`srn_kernels.activation.begin`, which allows for everything
that can happen to a model. What it found is kept here as plain tuples. As long as every assumption
is seen to hold, layer by layer, the next round is one loop, one autograd node and another loop.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from srn_kernels import backends
from srn_kernels.core.arguments import is_dense
from srn_kernels.core.autograd import plain_eager, run_round
from srn_kernels.core.plan import Plan
from srn_kernels.core.record import Round as RoundRecord
from srn_kernels.maths.matrix import state_dtype
from srn_kernels.maths.rules import named
from srn_kernels.model import recompute
from srn_kernels.model.begin import may_iterate
from srn_kernels.model.rounds import autocast_dtype
from srn_kernels.model.shadow import Activation
from srn_kernels.model.weight import NormalizedWeight

Edges = Sequence[tuple[nn.Module, str, nn.Module]]


def steady_key(root: nn.Module, entries: Sequence[NormalizedWeight]) -> tuple[Any, ...] | None:
    """What decides about a whole round beside its layers; a :class:`Steady` serves one such key."""
    if not entries:
        return None
    weight = entries[0].weight
    return (
        torch.is_grad_enabled(),
        root.training,
        weight.requires_grad,
        autocast_dtype(weight.device.type),
    )


class _Repeated(Activation):
    """An activation of plain layers."""

    sites: Sequence[tuple[NormalizedWeight, dict[str, Any], str]] = ()

    def leave(self) -> None:
        self.users -= 1
        if self.users > 0:
            return
        for entry, attributes, name in self.sites:
            if entry.active is self:
                entry.active = None
                entry.shadowed = False
                attributes.pop(name, None)


def _is_plain(entry: NormalizedWeight) -> bool:
    """Whether a round of this layer is one Parameter in, and one attribute out."""
    module, name = entry.sites[0]
    weight = module._parameters.get(name)
    return (
        len(entry.sites) == 1
        and type(weight) is nn.Parameter
        and entry.parameter is weight
        and weight.dim() > 1
        and is_dense(weight)
        and not weight.is_inference()
        and not isinstance(module, nn.RNNBase)
        and not entry.settings.scales
        and not entry.managed
        and entry.covered is None
        and entry.pending is None
        and entry.provisional is None
        and type(entry.u) is Tensor
        and type(entry.v) is Tensor
    )


class Steady:
    """One round of a root as it was when ``begin`` last made it, to be made again."""

    def __init__(self, root: Any, entries: Sequence[NormalizedWeight], edges: Edges) -> None:
        self.root = root  # a Round
        self.entries = list(entries)
        self.plan: Plan = entries[0].record[0].plan
        self.weights = [e.weight for e in entries]
        self.us, self.vs = [e.u for e in entries], [e.v for e in entries]
        self.edges = [(parent.__dict__, key, child) for parent, key, child in edges]
        self.witness = next((w for w in self.weights if w.requires_grad), None)
        self.moves = [n > 0 for n in self.plan.iterations]
        self.trains = any(e.training for e in entries)
        self.backend = entries[0].settings.backend
        self.device = self.weights[0].device.type
        self.state_dtype = state_dtype(self.weights[0].dtype)
        self.sites = [(e, e.sites[0][0].__dict__, e.sites[0][1]) for e in entries]
        self.rows = [
            (
                entry,
                attributes,
                name,
                entry.u_name,
                entry.v_name,
                entry.weight,
                entry.u,
                entry.v,
                entry.settings,
                attributes["training"],
                entry.weight.dtype,
                entry.weight.is_cuda,
            )
            for entry, attributes, name in self.sites
        ]

    @classmethod
    def of(cls, root: Any, entries: Sequence[NormalizedWeight], edges: Edges) -> Steady | None:
        """What a round just made leaves to be repeated; None if a layer of it is not plain."""
        if not plain_eager() or any(e.record is None for e in entries):
            return None
        record = entries[0].record[0]
        plan = record.plan
        if (
            not named(plan.rule).kernels
            or len(plan.dims) != len(entries)
            or min(plan.iterations) < 0
        ):
            return None
        for place, entry in enumerate(entries):
            if entry.record[0] is not record or entry.record[1] != place or not _is_plain(entry):
                return None
        return cls(root, entries, edges)

    def _would_iterate(self) -> bool:
        if not self.trains:
            return False
        if self.witness is not None and self.witness.requires_grad and torch.is_grad_enabled():
            return True
        return may_iterate(self.entries)

    def holds(self) -> bool:
        """Whether ``begin`` would do now what it did when this was made."""
        if (
            self._would_iterate() is not any(self.moves)
            or recompute.in_backward()
            or not plain_eager()
            or torch._C._get_tracing_state() is not None
            or backends.resolve(self.backend, self.device, self.state_dtype) != self.plan.backend
        ):
            return False
        for attributes, key, child in self.edges:
            if attributes["_modules"].get(key) is not child:
                return False
        last, owner = self.root.last(), self.root.owner
        for (
            entry,
            attributes,
            name,
            u_name,
            v_name,
            weight,
            u,
            v,
            settings,
            training,
            dtype,
            on_cuda,
        ) in self.rows:
            buffers = attributes["_buffers"]
            if (
                attributes["_parameters"].get(name) is not weight
                or buffers.get(u_name) is not u
                or buffers.get(v_name) is not v
                or attributes["training"] is not training
                or (weight._version != entry.version and not entry.backward_seen)
                or weight.dtype is not dtype
                or weight.is_cuda is not on_cuda
                or entry.active is not None
                or entry.stale
                or entry.parameter is not weight
                or entry.provisional is not None
                or entry.settings is not settings
                or entry.owner is not owner
                or entry.record[0] is not last
            ):
                return False
        return True

    def run(self) -> Activation:
        """The round, with its W_hat installed."""
        record = RoundRecord(self.plan, self.entries)
        outs = run_round(self.plan, record, self.weights, self.us, self.vs)
        record.earlier = recompute.links([self.root.last()])
        self.root.last = weakref.ref(record)
        activation = _Repeated(self.root, self.entries)
        activation.iterated = any(self.moves)
        activation.outs, activation.sites = outs[: len(self.sites)], self.sites
        layers = zip(self.sites, self.weights, self.moves, strict=True)
        for place, ((entry, attributes, name), weight, moved) in enumerate(layers):
            entry.record = (record, place)
            if moved:  # what NormalizedWeight.mark_fresh comes to
                entry.version = weight._version
                entry.backward_seen = False
            entry.active = activation
            entry.shadowed = True
            attributes[name] = outs[place]
        return activation
