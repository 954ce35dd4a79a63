"""Forwards that run once more in a backward (activation checkpointing) see their own W_hat again.

torch.utils.checkpoint(use_reentrant=True), and others of its kind, are autograd Functions that
run the model without gradients in their forward and once more, with them, in their backward. The
one thing that both calls have in common is the Function's context.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from srn_kernels.core.record import Round as RoundRecord
from srn_kernels.model.weight import NormalizedWeight

_ROUNDS = "_srn_rounds"  # ctx.__dict__[_ROUNDS]: {id(entry): its record} of a checkpoint


def in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def checkpoints() -> list[Any]:
    """Contexts of the Functions around this call whose backward will come, innermost first."""
    if torch.compiler.is_compiling():
        return []
    found, frame = [], sys._getframe()
    while frame is not None:
        code = frame.f_code
        if code.co_argcount and code.co_varnames[0] == "ctx":
            ctx = frame.f_locals["ctx"]
            # without gradients around the whole Function there are no edges
            if isinstance(ctx, torch.autograd.function.FunctionCtx) and ctx.next_functions:
                found.append(ctx)
        frame = frame.f_back
    return found


def remember(entries: Sequence[NormalizedWeight]) -> None:
    """Ties the rounds in use to the checkpoint that runs now, for its backward."""
    if torch.is_grad_enabled() or not any(e.training for e in entries):
        return
    around = checkpoints()
    if around:
        rounds = around[0].__dict__.setdefault(_ROUNDS, {})
        rounds.update({id(e): e.record for e in entries if e.record is not None})


def records_of(entries: Sequence[NormalizedWeight]) -> list[RoundRecord]:
    """The distinct last rounds of ``entries``."""
    return list({id(e.record[0]): e.record[0] for e in entries if e.record is not None}.values())


def remembered(entries: Sequence[NormalizedWeight]) -> list[tuple[RoundRecord, int]] | None:
    """The rounds that a recomputation of ``entries`` has to repeat."""
    for ctx in checkpoints():
        known = ctx.__dict__.get(_ROUNDS, {})
        if all(id(e) in known for e in entries):
            return [known[id(e)] for e in entries]
    if any(e.record is None for e in entries):
        return None
    return [_own_round(e) for e in entries]


def links(before: Sequence[RoundRecord]) -> list[weakref.ref[RoundRecord]]:
    """The rounds up to ``before`` whose backward is still to come, while their graphs live."""
    waiting = {id(x): x for record in before for x in (record, *record.waiting())}
    return [weakref.ref(x) for x in waiting.values() if x.graphed and not x.backward_seen]


def link_waiting(entries: Sequence[NormalizedWeight], before: Sequence[RoundRecord]) -> None:
    """Links the last rounds of ``entries`` to those before them that wait for a backward."""
    earlier = links(before)
    for record in records_of(entries):
        record.earlier = earlier


def _own_round(entry: NormalizedWeight) -> tuple[RoundRecord, int]:
    """The round of the forward that a backward computes again: the one that waits for it."""
    record, place = entry.record
    waiting = [r for r in record.waiting() if any(x is entry for x in r.layers)]
    if not waiting:
        return record, place
    if record.graphed or len(waiting) > 1:
        raise RuntimeError(
            f"layer {entry.label!r} is computed again in a backward (activation checkpointing) "
            "while several of its forwards wait for one; run those forwards inside "
            "srn_kernels.shared_round(model), so that they share one W_hat"
        )
    # Since then there were forwards without gradients only.
    (record,) = waiting
    return record, next(i for i, x in enumerate(record.layers) if x is entry)
