"""The way of a round: begin makes W_hat visible for a call, end takes it away again."""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from srn_kernels.core.autograd import refuse_batched
from srn_kernels.model import recompute
from srn_kernels.model.refuse import refuse_surroundings
from srn_kernels.model.rounds import converge, normalize_entries, repeat_entries
from srn_kernels.model.shadow import Activation, _lock
from srn_kernels.model.weight import NormalizedWeight

_TRACING = (
    "torch.jit.trace cannot record a normalised model; trace srn_kernels.export(model), a plain "
    "copy with the same output"
)


class Frame:
    """One call that is using W_hat: what it has to give back when it ends."""

    __slots__ = ("held", "pending", "root")

    def __init__(self, root: object) -> None:
        self.root = root
        self.held: list[Activation] = []
        self.pending: Sequence[NormalizedWeight] = ()

    def close(self) -> None:
        for activation in self.held:
            activation.leave()
        for entry in self.pending:
            entry.pending = None


class _Frames(threading.local):
    def __init__(self) -> None:
        self.stack: list[Frame] = []


_frames = _Frames()


def _is_running(module: object) -> bool:
    """Whether a call of ``module`` other than the one now starting is on this thread's stack."""
    calls, frame = 0, sys._getframe()
    while frame is not None and calls < 2:
        if frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") is module:
            calls += 1
        frame = frame.f_back
    return calls >= 2


def _discard(activation: Activation) -> None:
    """Clears what a call left behind that an interrupt tore out of its forward."""
    _frames.stack[:] = [f for f in _frames.stack if activation not in f.held]
    activation.users = 1
    activation.leave()


def begin(
    root: object, module: nn.Module, entries: Sequence[NormalizedWeight], groups: int = 1
) -> Frame:
    """Makes W_hat of ``entries`` visible for a call of ``module``, to be undone by :func:`end`.

    ``root`` stands for the round: a Round, or the module of a layer on its own. ``groups``: see
    :func:`srn_kernels.apply_stable_rank_norm`.
    """
    frame = Frame(root)
    _frames.stack.append(frame)
    me = threading.get_ident()
    with _lock:
        found = {id(e.active): e.active for e in entries if e.active is not None}
        for activation in found.values():
            if activation.thread != me:
                continue
            if activation.root is root and not activation.shared and not _is_running(module):
                _discard(activation)
            elif activation.shared and (activation.lacks_graph() or activation.outdated()):
                fill(activation)
        others = [a for a in found.values() if a.thread != me and a.users > 0]
        todo = [e for e in entries if e.active is None]
        if others:
            # A backward may recompute in a thread of its own what a shared round computed.
            recomputing = recompute.in_backward() and all(a.shared for a in others)
            iterate = may_iterate(todo or entries) or any(a.iterated for a in others)
            if iterate and not recomputing:
                raise RuntimeError(
                    "this model is in a training forward in another thread; training one model "
                    "from several threads is not supported (evaluation is)"
                )
            for activation in others:
                if activation.lacks_graph():
                    fill(activation)  # the same values, now with a graph
                activation.users += 1
                frame.held.append(activation)
        if todo:
            activation = Activation(root, todo, groups)
            fill(activation)
            frame.held.append(activation)
        recompute.remember(entries)
    return frame


def begin_again(steady: Any) -> bool:
    """:func:`begin` by way of a :class:`srn_kernels.steady.Steady`; False if it does not hold."""
    with _lock:
        if not steady.holds():
            return False
        frame = Frame(steady.root)
        _frames.stack.append(frame)
        frame.held.append(steady.run())
        recompute.remember(steady.entries)
    return True


def end(root: object) -> None:
    """Undoes the latest :func:`begin` of ``root``; the parameters are visible again."""
    stack = _frames.stack
    if not stack or stack[-1].root is not root:
        return  # begin itself was never reached
    frame = stack.pop()
    with _lock:
        frame.close()


def share(
    entries: Sequence[NormalizedWeight], groups: int, pending: Sequence[NormalizedWeight]
) -> Frame:
    """Makes W_hat of ``entries`` visible to whatever runs until :func:`unshare`.

    ``pending``: entries that are measured, and gathered within.
    """
    frame = Frame(object())
    frame.pending = pending
    with _lock:
        todo = [e for e in entries if e.active is None]
        if todo:
            activation = Activation(frame.root, todo, groups)
            activation.shared = True
            try:
                fill(activation)
            except BaseException:
                frame.close()
                raise
            frame.held.append(activation)
    return frame


def unshare(frame: Frame) -> None:
    """Undoes :func:`share`."""
    with _lock:
        frame.close()


def may_iterate(entries: Sequence[NormalizedWeight]) -> bool:
    """u and v move only where gradients are on and something of the round can train."""
    return (
        any(e.training for e in entries)
        and (torch.is_grad_enabled() or bool(recompute.checkpoints()))
        and any(e.trainable() for e in entries)
    )


def fill(activation: Activation) -> None:
    """Computes the round of an activation and installs its W_hat."""
    entries = activation.entries
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError(_TRACING)
    refuse_batched([e.weight for e in entries])
    refuse_surroundings(entries)
    if recompute.in_backward():
        records = recompute.remembered(entries)
        if records is not None:
            activation.install(repeat_entries(entries, records))
            return
    if all(e.pending is not None for e in entries):  # measured on shards, and gathered now
        activation.install(repeat_entries(entries, [e.pending for e in entries]))
        return
    for entry in entries:
        if len(entry.sites) > 1:
            entry.share_state()
    iterations = prepare(entries)
    before = recompute.records_of(entries)
    if activation.groups == 1:
        outs = normalize_entries(entries, iterations)
    else:
        outs = []
        for part in _consecutive(entries, activation.groups):
            outs += normalize_entries(entries[part], iterations[part], early=True)
    moved(entries, iterations)
    recompute.link_waiting(entries, before)
    activation.iterated = activation.iterated or any(iterations)
    activation.install(outs)


def prepare(entries: Sequence[NormalizedWeight]) -> list[int]:
    """The iterations a round of ``entries`` makes, after stale u and v have converged."""
    # A draw and looks at numbers are not for torch.func's transforms.
    eager = torch._C._functorch.peek_interpreter_stack() is None
    stale = [e for e in entries if (e.is_stale() if eager else e.is_written())]
    if stale:
        converge(stale)
    iterate = may_iterate(entries)
    return [e.settings.n_power_iterations if iterate and e.training else 0 for e in entries]


def moved(entries: Sequence[NormalizedWeight], iterations: Sequence[int]) -> None:
    for entry, n in zip(entries, iterations, strict=True):
        if n > 0 or entry.parameter is None:
            entry.mark_fresh()
        if n > 0:
            entry.provisional = None


def _consecutive(entries: Sequence[NormalizedWeight], n: int) -> list[slice]:
    """At most ``n`` runs of entries with about the same number of elements each."""
    sizes = [e.weight.numel() for e in entries]
    ends = list(itertools.accumulate(sizes))
    # entry i goes where its middle lies
    parts = [int(n * (end - size / 2) / ends[-1]) for end, size in zip(ends, sizes, strict=True)]
    starts = [i for i in range(len(parts)) if i == 0 or parts[i] != parts[i - 1]]
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(parts)], strict=True)]
