"""Rounds that torch.compile traces; they write tensors, booleans and None only."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from srn_kernels.model import rounds
from srn_kernels.model.begin import iterations_of
from srn_kernels.model.look import look
from srn_kernels.model.shadow import put, take
from srn_kernels.model.weight import NormalizedWeight

_TRACED = "_srn_traced"  # module.__dict__[_TRACED]: what a traced call of it has to undo


def enter(entries: Sequence[NormalizedWeight]) -> list[NormalizedWeight]:
    """Makes W_hat visible where it is not yet; returns the weights for :func:`leave`."""
    # dynamo guards this attribute, but not what a module's __dict__ holds
    todo = [e for e in entries if not e.shadowed]
    if not todo:
        return todo
    seen = look(todo)
    outs = rounds.normalize(seen, iterations_of(seen))
    for entry in todo:
        entry.fit.forget()
    put(todo, outs)
    return todo


def leave(entries: Sequence[NormalizedWeight]) -> None:
    """Undoes :func:`enter`."""
    take(entries)


def enter_layer(module: nn.Module, entries: Sequence[NormalizedWeight]) -> None:
    """:func:`enter` for a layer on its own; inside a round nothing is written, which a traced
    checkpoint would refuse."""
    traced = enter(entries)
    if traced:
        module.__dict__[_TRACED] = traced


def leave_layer(module: nn.Module) -> bool:
    """Undoes :func:`enter_layer`; whether there was anything to undo."""
    if _TRACED not in module.__dict__:
        return False
    leave(module.__dict__.pop(_TRACED))
    return True
