"""FSDP2: layers whose weights are shards until their unit gathers them.

A root's round measures them on the shards; each unit makes W_hat when it has gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from srn_kernels.model import recompute, rounds
from srn_kernels.model.begin import begin, end, finish, may_iterate, prepare
from srn_kernels.model.freshness import is_split
from srn_kernels.model.hooks import hook
from srn_kernels.model.look import look
from srn_kernels.model.weight import NormalizedWeight

_UNIT = "_srn_unit"  # module.__dict__[_UNIT]: its _Unit
_FSDP1 = (
    "layer {!r} is managed by FullyShardedDataParallel (FSDP1), which shows weights that are whole "
    "only while it gathers them; use torch.distributed.fsdp.fully_shard"
)


def _measure(group: object, entries: Sequence[NormalizedWeight]) -> None:
    """A round of shards: all but W_hat, which each FSDP2 unit makes when it has gathered."""
    seen = look(entries)
    iterations = prepare(seen)
    before = recompute.records_of(entries)
    record = rounds.measure(seen, iterations)
    record.iterated = any(iterations)
    record.written = [(e, e.written()) for e in entries]
    for entry in entries:
        entry.record = entry.pending = record
    finish(group, seen, iterations, before)


def _is_measured(entries: Sequence[NormalizedWeight]) -> bool:
    """Whether a round around this one has measured them, and its numbers still serve."""
    if any(e.pending is None for e in entries):
        return False
    record = entries[0].pending
    moves = record.iterated or not may_iterate(entries)
    return moves and all(e.written() == version for e, version in record.written)


def find_units(group: Any) -> None:
    """Finds out which modules of a Group's root FSDP2 manages; RuntimeError for FSDP1."""
    group.units = _units(group.root)
    members: dict[nn.Module, list[NormalizedWeight]] = {}
    for entry in group.current():
        module = entry.sites[0][0]
        unit = group.units.get(id(module))
        if unit is not None:
            members.setdefault(unit, []).append(entry)
        elif "_is_fsdp_managed_module" in module.__dict__ and not is_split(entry.weight):
            group.units = None
            raise RuntimeError(_FSDP1.format(entry.label))
    for unit, entries in members.items():
        unit.__dict__[_UNIT] = _Unit(entries)
        # after FSDP's own hook, which gathers
        hook(unit, _unit_enter, _unit_exit, outermost=False)


def _units(root: nn.Module) -> dict[int, nn.Module]:
    """The nearest FSDP2 unit at or above each module, by ``id`` of the module, below ``root``."""
    units: dict[int, nn.Module] = {}

    def visit(module: nn.Module, unit: nn.Module | None) -> None:
        if isinstance(module, FSDPModule):
            unit = module
        if unit is not None:
            units[id(module)] = unit
        for child in module.children():
            visit(child, unit)

    visit(root, None)
    return units


def divide(
    group: Any, entries: Sequence[NormalizedWeight]
) -> tuple[list[NormalizedWeight], list[NormalizedWeight]]:
    """The entries of a Group whose weights are here, and those that FSDP2 has yet to gather.

    Those are measured, and each unit makes W_hat when it has gathered them; layers that keep
    several singular values normalise themselves.
    """
    if group.units is None:
        find_units(group)
    here, shards = [], []
    for entry in entries:
        unit = group.units.get(id(entry.sites[0][0]))
        entry.fit.managed = entry.fit.managed or unit is not None
        if unit is not None and is_split(entry.weight) and not entry.settings.chosen_rule.split:
            continue  # what is summed over processes does not tell several singular values
        (here if unit is None or not is_split(entry.weight) else shards).append(entry)
    if not shards or _is_measured(shards):
        return here, []
    _measure(group, shards)
    return here, shards


class _Unit:
    """The wrapped weights that one FSDP2 unit gathers."""

    def __init__(self, entries: Sequence[NormalizedWeight]) -> None:
        self.entries = entries


def _unit_enter(module: nn.Module, args: Any) -> None:
    unit: _Unit = module.__dict__[_UNIT]
    entries = [e for e in unit.entries if e.pending is not None]
    if entries:  # else no root has started a round
        begin(unit, module, entries)


def _unit_exit(module: nn.Module, args: Any, output: Any) -> None:
    end(module.__dict__[_UNIT])
