"""The one way through a round: begin makes W_hat visible for a call, end takes it away again."""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Sequence

import torch
from torch import nn

from srn_kernels.core.record import Round
from srn_kernels.model import recompute, rounds
from srn_kernels.model.freshness import State, moved
from srn_kernels.model.hooks import Guard
from srn_kernels.model.look import Seen, look
from srn_kernels.model.refuse import refuse_surroundings
from srn_kernels.model.shadow import Lease, Shadow, lock
from srn_kernels.model.weight import NormalizedWeight

_TRACING = (
    "torch.jit.trace cannot record a normalised model; trace srn_kernels.export(model), a plain "
    "copy with the same output"
)
_OTHER_THREAD = (
    "this model is in a training forward in another thread; training one model from several "
    "threads is not supported (evaluation is)"
)


class _Leases(threading.local):
    def __init__(self) -> None:
        self.stack: list[Lease] = []


_leases = _Leases()


# --- a call that uses W_hat -----------------------------------------------------------------------


def begin(
    root: object, module: nn.Module, entries: Sequence[NormalizedWeight], groups: int = 1
) -> Lease:
    """Makes W_hat of ``entries`` visible for a call of ``module``, to be undone by :func:`end`.

    ``root`` stands for the round: a Group, or the module of a layer on its own. ``groups``: see
    :func:`srn_kernels.apply_stable_rank_norm`.
    """
    lease = Lease(root, module)
    _leases.stack.append(lease)
    try:
        with lock:
            todo = [e for e in entries if e.shadow is None]
            if len(todo) < len(entries):
                _join(lease, module, entries)
                todo = [e for e in entries if e.shadow is None]
            if todo:
                shadow = Shadow(root, todo, groups)
                lease.held.append(shadow)
                fill(shadow)
    except BaseException:
        _leases.stack.remove(lease)
        with lock:
            lease.close()
        raise
    return lease


def end(root: object) -> None:
    """Undoes the latest :func:`begin` of ``root``; the parameters are visible again."""
    stack = _leases.stack
    if not stack or stack[-1].root is not root:
        return  # begin itself was never reached
    lease = stack.pop()
    with lock:
        lease.close()


def called(root: object) -> nn.Module | None:
    """What was called, if the innermost call on this thread that uses W_hat is of ``root``."""
    stack = _leases.stack
    return stack[-1].module if stack and stack[-1].root is root else None


def is_shared(shadow: Shadow) -> bool:
    """Whether the innermost call on this thread has found this shared W_hat to serve it."""
    stack = _leases.stack
    return (
        bool(stack) and shadow in stack[-1].shared and stack[-1].graphed == torch.is_grad_enabled()
    )


def _join(lease: Lease, module: nn.Module, entries: Sequence[NormalizedWeight]) -> None:
    """What a call does about W_hat that others have made visible."""
    me = threading.get_ident()
    found = list({id(e.shadow): e.shadow for e in entries if e.shadow is not None}.values())
    for shadow in found:
        if shadow.thread != me:
            continue
        if shadow.root is lease.root and not shadow.shared and not _is_running(module):
            _discard(shadow)
        elif shadow.shared and not shadow.serves([e for e in entries if e.shadow is shadow]):
            fill(shadow)
    lease.shared = [s for s in found if s.shared and s.thread == me]
    others = [s for s in found if s.thread != me and s.users > 0]
    if not others:
        return
    # A backward may recompute in a thread of its own what a shared round computed.
    recomputing = recompute.in_backward() and all(s.shared for s in others)
    todo = [e for e in entries if e.shadow is None]
    iterate = may_iterate(todo or entries) or any(s.iterated for s in others)
    if iterate and not recomputing:
        raise RuntimeError(_OTHER_THREAD)
    for shadow in others:
        if shadow.lacks_graph():
            fill(shadow)  # the same values, now with a graph
        shadow.users += 1
        lease.held.append(shadow)


def _is_running(module: object) -> bool:
    """Whether a call of ``module`` other than the one now starting is on this thread's stack."""
    calls, frame = {nn.Module._call_impl.__code__: 0, Guard.__call__.__code__: 0}, sys._getframe()
    while frame is not None and max(calls.values()) < 2:
        if frame.f_code in calls:
            caller = frame.f_locals.get("self")
            calls[frame.f_code] += module in (caller, getattr(caller, "module", None))
        frame = frame.f_back
    return max(calls.values()) >= 2


def _discard(shadow: Shadow) -> None:
    """Clears what a call left behind that an interrupt tore out of its forward."""
    _leases.stack[:] = [x for x in _leases.stack if shadow not in x.held]
    shadow.users = 1
    shadow.leave()


# --- W_hat for a context --------------------------------------------------------------------------


def share(
    entries: Sequence[NormalizedWeight], groups: int, pending: Sequence[NormalizedWeight]
) -> Lease:
    """Makes W_hat of ``entries`` visible to whatever runs until the lease is closed.

    ``pending``: entries that are measured, and gathered within.
    """
    lease = Lease(object())
    lease.pending = pending
    with lock:
        todo = [e for e in entries if e.shadow is None]
        if todo:
            shadow = Shadow(lease.root, todo, groups)
            shadow.shared = True
            try:
                fill(shadow)
            except BaseException:
                lease.close()
                raise
            lease.held.append(shadow)
    return lease


def unshare(lease: Lease) -> None:
    """Undoes :func:`share`."""
    with lock:
        lease.close()


# --- the round itself -----------------------------------------------------------------------------


def may_iterate(entries: Sequence[NormalizedWeight]) -> bool:
    """u and v move only where gradients are on and something of the round can train."""
    return torch.is_grad_enabled() and any(e.training for e in entries) and _can_train(entries)


def _can_train(entries: Sequence[NormalizedWeight]) -> bool:
    # mostly the first one can
    return entries[0].trainable() or any(e.trainable() for e in entries)


def fill(shadow: Shadow) -> None:
    """Computes the round of a shadow and installs its W_hat."""
    entries = shadow.entries
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError(_TRACING)
    refuse_surroundings(entries)
    if recompute.in_backward():
        records = recompute.own_rounds(shadow.root, entries)
        if records is not None:
            shadow.install(rounds.repeat(entries, records))
            _move_late(entries, records)
            return
    if entries[0].pending is not None and all(e.pending is not None for e in entries):
        # measured on shards, and gathered now
        shadow.install(rounds.repeat(entries, [e.pending for e in entries]))
        return
    for entry in entries:
        if len(entry.sites) > 1:
            entry.share_state()
    seen = look(entries)
    iterations = prepare(seen)
    before = recompute.records_of(entries)
    if shadow.groups == 1:
        outs = rounds.normalize(seen, iterations, keep=True)
    else:
        outs = []
        for places in _consecutive(entries, shadow.groups):
            part = [iterations[i] for i in places]
            outs += rounds.normalize(seen.part(places), part, keep=True, early=True)
    finish(shadow.root, seen, iterations, before)
    shadow.iterated = shadow.iterated or any(iterations)
    shadow.install(outs)


def prepare(seen: Seen) -> list[int]:
    """The iterations a round makes, after u and v that do not fit have converged."""
    if not all(seen.fitting):
        unknown = [e for e, known in zip(seen.entries, seen.fitting, strict=True) if not known]
        if stale := [e for e in unknown if _must_converge(e)]:
            rounds.converge(stale)
    return iterations_of(seen)


def iterations_of(seen: Seen) -> list[int]:
    """How often a round moves u and v of each layer."""
    if not (torch.is_grad_enabled() and any(seen.training) and _can_train(seen.entries)):
        return [0] * len(seen.entries)
    pairs = zip(seen.layers, seen.training, strict=True)
    return [layer.n_power_iterations if training else 0 for layer, training in pairs]


def _must_converge(entry: NormalizedWeight) -> bool:
    state = entry.state()
    if state is State.NEW:  # a draw and looks at numbers are not for torch.func's transforms
        plain = torch._C._functorch.peek_interpreter_stack() is None
        return plain or entry.fit.is_written(entry.weight)
    return state in (State.STALE, State.UNSET)


def finish(root: object, seen: Seen, iterations: Sequence[int], before: Sequence[Round]) -> None:
    """What a round leaves in its weights: u and v that fit, and its own record."""
    moved(seen.fits, seen.weights, seen.versions, iterations)
    recompute.link_waiting(root, seen.entries, before)
    if not torch.is_grad_enabled():  # a reentrant checkpoint's, perhaps
        for entry in seen.entries:
            if entry.training:
                entry.apart = entry.record


def _move_late(entries: Sequence[NormalizedWeight], records: Sequence[Round]) -> None:
    """Moves u and v after the repetition of rounds that ran in training without gradients."""
    late = [
        e
        for e, record in zip(entries, records, strict=True)
        if e.apart is record and not record.moved and e.training
    ]
    if not late or not any(iterations := iterations_of(seen := look(late))):
        return
    with torch.no_grad():
        rounds.move(seen, iterations)
    for record in records:
        record.moved = True
    for entry in late:
        entry.become(State.FRESH)


def _consecutive(entries: Sequence[NormalizedWeight], n: int) -> list[range]:
    """At most ``n`` runs of entries with about the same number of elements each."""
    sizes = [e.weight.numel() for e in entries]
    ends = list(itertools.accumulate(sizes))
    # entry i goes where its middle lies
    parts = [int(n * (end - size / 2) / ends[-1]) for end, size in zip(ends, sizes, strict=True)]
    starts = [i for i in range(len(parts)) if i == 0 or parts[i] != parts[i - 1]]
    return [range(a, b) for a, b in zip(starts, [*starts[1:], len(parts)], strict=True)]
