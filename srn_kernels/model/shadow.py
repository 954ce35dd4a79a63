"""W_hat in front of the parameter while a model runs, and the calls that use it.

Attribute look-up finds a module's ``__dict__`` before its parameters, which stay what they are.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from srn_kernels.backends import host
from srn_kernels.model.weight import NormalizedWeight

lock = threading.RLock()


def put(entries: Sequence[NormalizedWeight], outs: Sequence[Tensor]) -> None:
    """Shows W_hat at every site of the weights."""
    for entry in entries:
        entry.shadowed = True
    _loops().set_attributes([e.sites for e in entries], outs)
    _flatten(entries)


def take(entries: Sequence[NormalizedWeight]) -> list[Tensor | None]:
    """Shows the parameters again; returns what stood in front of them."""
    for entry in entries:
        entry.shadowed = False
    outs = _loops().take_attributes([e.sites for e in entries])
    _flatten(entries)
    return outs


def _loops() -> Any:
    return host.PYTHON if torch.compiler.is_compiling() else host  # C++ cannot be traced


def _flatten(entries: Sequence[NormalizedWeight]) -> None:
    """Recurrent layers read a list, not the attribute."""
    for entry in entries:
        if entry.recurrent:
            for module, _ in entry.sites:
                if isinstance(module, nn.RNNBase):
                    flat = [getattr(module, n, None) for n in module._flat_weights_names]
                    module.__dict__["_flat_weights"] = flat


class Shadow:
    """W_hat of some weights, in front of their parameters until the last user leaves."""

    def __init__(self, root: object, entries: Sequence[NormalizedWeight], groups: int = 1) -> None:
        self.root = root
        self.entries = list(entries)
        self.thread = threading.get_ident()
        self.users = 1
        self.iterated = False
        self.shared = False
        self.groups = groups  # consecutive parts, each with a node of its own
        self.outs: Sequence[Tensor] = ()
        self.shown: dict[int, tuple[Tensor, int]] = {}  # shared: W_hat and version, by id of entry

    def install(self, outs: Sequence[Tensor]) -> None:
        self.outs = outs
        if self.shared:
            pairs = zip(self.entries, outs, strict=True)
            self.shown = {id(e): (out, e.written()) for e, out in pairs}
        try:
            for entry in self.entries:
                entry.shadow = self
            put(self.entries, outs)
        except BaseException:  # an interrupt, half way
            for entry in self.entries:
                entry.shadow = None
            take(self.entries)
            raise

    def lacks_graph(self) -> bool:
        """Whether gradients are wanted now that this W_hat cannot deliver."""
        return torch.is_grad_enabled() and any(
            e.wants_gradient() and not out.requires_grad
            for e, out in zip(self.entries, self.outs, strict=True)
        )

    def serves(self, entries: Sequence[NormalizedWeight]) -> bool:
        """Whether this shared W_hat is that of these weights as they are now, with the gradients
        that are wanted now."""
        graphed = torch.is_grad_enabled()
        for entry in entries:
            out, version = self.shown[id(entry)]
            if entry.written() != version:
                return False
            if graphed and entry.wants_gradient() and not out.requires_grad:
                return False
        return True

    def leave(self) -> list[NormalizedWeight]:
        """One user less; the last takes W_hat away. Returns the weights where it was gone."""
        self.users -= 1
        if self.users > 0:
            return []
        shown, outs = self.entries, self.outs
        if any(e.shadow is not self for e in shown):  # another, or an error, has come between
            outs = [x for e, x in zip(shown, outs, strict=False) if e.shadow is self]
            shown = [e for e in shown if e.shadow is self]
        for entry in shown:
            entry.shadow = None
        seen = take(shown)
        if all(map(operator.is_, seen, outs)):
            return []
        return [e for e, out, x in zip(shown, outs, seen, strict=True) if x is not out]


class Lease:
    """One call that is using W_hat: what it has to give back when it ends."""

    __slots__ = ("graphed", "held", "module", "pending", "root", "shared")

    def __init__(self, root: object, module: nn.Module | None = None) -> None:
        self.root, self.module = root, module  # whose round, and what was called
        self.held: list[Shadow] = []
        self.shared: Sequence[Shadow] = ()  # W_hat of others that serves this call
        self.graphed = torch.is_grad_enabled()
        self.pending: Sequence[NormalizedWeight] = ()

    def close(self) -> None:
        """Raises RuntimeError, after everything was given back, if something had replaced W_hat."""
        gone = [entry for shadow in self.held for entry in shadow.leave()]
        self.held = []
        for entry in self.pending:
            entry.pending = None
        if gone:
            raise RuntimeError(
                f"the weight of layer {gone[0].label!r} was set during a forward, which went on "
                "without its normalisation; set weights between forwards"
            )
