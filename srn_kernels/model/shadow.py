"""Where W_hat lives while a model runs: it shadows the raw parameter in its module's ``__dict__``.

Attribute look-up finds it there before the parameter, which stays what and where it is.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from srn_kernels.model.weight import NormalizedWeight

_lock = threading.RLock()


class Activation:
    """W_hat of some entries, installed in their modules until the last user leaves."""

    def __init__(self, root: object, entries: Sequence[NormalizedWeight], groups: int = 1) -> None:
        self.root = root
        self.entries = list(entries)
        self.thread = threading.get_ident()
        self.users = 1
        self.iterated = False
        self.shared = False
        self.groups = groups  # consecutive parts, each with a node of its own
        self.outs: list[Tensor] = []
        self.versions: list[int] = []

    def install(self, outs: Sequence[Tensor]) -> None:
        self.outs = list(outs)
        self.versions = [e.written() for e in self.entries] if self.shared else []
        for entry, out in zip(self.entries, outs, strict=True):
            entry.active = self
            shadow(entry, out)

    def lacks_graph(self) -> bool:
        """Whether gradients are wanted now that this W_hat cannot deliver."""
        return torch.is_grad_enabled() and any(
            e.wants_gradient() and not out.requires_grad
            for e, out in zip(self.entries, self.outs, strict=True)
        )

    def outdated(self) -> bool:
        return any(e.written() != v for e, v in zip(self.entries, self.versions, strict=True))

    def leave(self) -> None:
        self.users -= 1
        if self.users > 0:
            return
        for entry in self.entries:
            if entry.active is self:
                entry.active = None
                unshadow(entry)


def shadow(entry: NormalizedWeight, out: Tensor) -> None:
    entry.shadowed = True
    module, name = entry.sites[0]
    if name not in module._parameters and entry.covered is None:  # FSDP1
        entry.covered = module.__dict__[name]
    for module, name in entry.sites:
        module.__dict__[name] = out
        if isinstance(module, nn.RNNBase):  # recurrent layers read a list, not the attribute
            flat = [getattr(module, n) for n in module._flat_weights_names]
            module.__dict__["_flat_weights"] = flat


def unshadow(entry: NormalizedWeight) -> None:
    entry.shadowed = False
    for module, name in entry.sites:
        module.__dict__.pop(name, None)
        if entry.covered is not None:
            module.__dict__[name] = entry.covered
        if isinstance(module, nn.RNNBase):
            flat = [getattr(module, n, None) for n in module._flat_weights_names]
            module.__dict__["_flat_weights"] = flat
    entry.covered = None
