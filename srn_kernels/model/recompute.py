"""Forwards that run once more in a backward (activation checkpointing) see their own W_hat again.

With use_reentrant=False a forward runs with gradients, and so does its repetition: what is repeated
is the round that waits for a backward. With use_reentrant=True the forward runs without gradients,
inside an autograd Function, and only its repetition has them. A layer in such a part of a model
sees the W_hat of the round around it, which waits for a backward. A whole model in such a part has
made a round without gradients, in training: this one is repeated, and u and v, which it could not
move, move then.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence

import torch

from srn_kernels.core.record import Round
from srn_kernels.model.freshness import is_split, version_of
from srn_kernels.model.weight import NormalizedWeight


def in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _is_reentrant() -> bool:
    """Whether a repetition runs without the hooks of torch's non-reentrant checkpoint."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is None or hooks[0].__module__ != "torch.utils.checkpoint"


def records_of(entries: Sequence[NormalizedWeight]) -> list[Round]:
    """The distinct last rounds of ``entries``."""
    return [x for x in dict.fromkeys([e.record for e in entries]) if x is not None]


def link_waiting(
    root: object, entries: Sequence[NormalizedWeight], before: Sequence[Round]
) -> None:
    """Links the rounds of ``entries`` just made to those before them that wait for a backward."""
    found = dict.fromkeys([x for record in before for x in (record, *record.waiting())])
    open_ = [x for x in found if x.graphed and not x.backward_seen]
    # The graph of a reentrant checkpoint does not hold the round whose W_hat it used.
    kept = [x for x in open_ if x.checkpointed and not x.repeated]
    earlier = [weakref.ref(x) for x in open_ if not x.checkpointed]
    for record in records_of(entries):
        record.root, record.kept, record.earlier = root, kept, earlier


def note_use(entries: Iterable[NormalizedWeight]) -> None:
    """Notes that layers ran without gradients in a round: in a reentrant checkpoint, perhaps."""
    for entry in entries:
        if entry.record is not None:
            entry.record.checkpointed = True


def own_rounds(root: object, entries: Sequence[NormalizedWeight]) -> list[Round] | None:
    """The rounds that a repetition of ``entries``, called as ``root``, has to repeat."""
    if any(e.record is None for e in entries):
        return None
    reentrant = _is_reentrant()
    records = [_own_round(root, e, reentrant) for e in entries]
    for entry, record in zip(entries, records, strict=True):
        record.repeated = True
        whole = not entry.fit.managed and not is_split(entry.weight)
        version = record.versions[record.place_of(entry.fit)] if whole else None
        if whole and version_of(entry.weight) != version:
            raise RuntimeError(
                f"the weight of layer {entry.label!r} was changed in place between a forward and "
                "its repetition in a backward (activation checkpointing); run backward before the "
                "optimiser's step"
            )
    return records


def _own_round(root: object, entry: NormalizedWeight, reentrant: bool) -> Round:
    record = entry.record
    waiting = [r for r in record.waiting() if any(x is entry.fit for x in r.layers)]
    apart = entry.apart if reentrant else None
    if apart is not None and apart.root is root:
        if root is not entry.sites[0][0] or (apart is record and not waiting):
            return apart
        if not apart.moved:  # the layer alone, and in a round with gradients: which is meant?
            raise _ambiguous(entry)
    if not waiting:
        return record
    if record.graphed or len(waiting) > 1:
        raise _ambiguous(entry)
    # Since then there were forwards without gradients only.
    return waiting[0]


def _ambiguous(entry: NormalizedWeight) -> RuntimeError:
    return RuntimeError(
        f"layer {entry.label!r} is computed again in a backward (activation checkpointing) while "
        "several of its forwards wait for one; run those forwards inside "
        "srn_kernels.shared_round(model), so that they share one W_hat"
    )
