"""FSDP2: layers whose weights are shards until their unit gathers them.

A root's round measures them on the shards; each unit makes W_hat when it has gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from srn_kernels.model import recompute
from srn_kernels.model.begin import begin, end, may_iterate, moved, prepare
from srn_kernels.model.hooks import hook
from srn_kernels.model.rounds import measure_entries
from srn_kernels.model.weight import NormalizedWeight, is_split

_UNIT = "_srn_unit"  # module.__dict__[_UNIT]: its _Unit


def _measure(entries: Sequence[NormalizedWeight]) -> None:
    """A round of shards: all but W_hat, which each FSDP2 unit makes when it has gathered."""
    iterations = prepare(entries)
    before = recompute.records_of(entries)
    record = measure_entries(entries, iterations)
    record.iterated = any(iterations)
    record.written = [e.written() for e in entries]
    for place, entry in enumerate(entries):
        entry.record = entry.pending = (record, place)
    moved(entries, iterations)
    recompute.link_waiting(entries, before)


def _measured(entries: Sequence[NormalizedWeight]) -> bool:
    """Whether a round around this one has measured them, and its numbers still serve."""
    if any(e.pending is None for e in entries):
        return False
    record = entries[0].pending[0]
    moves = record.iterated or not (may_iterate(entries) and any(e.training for e in entries))
    return moves and record.written == [e.written() for e in record.layers]


def look(this: Any) -> None:
    """Finds out which modules of a Round's root FSDP1 and FSDP2 manage."""
    this.flattened = flattened(this.root)
    this.units = fsdp_units(this.root)
    members: dict[nn.Module, list[NormalizedWeight]] = {}
    for entry in this.current():
        unit = this.units.get(id(entry.sites[0][0]))
        if unit is not None:
            members.setdefault(unit, []).append(entry)
    for unit, entries in members.items():
        unit.__dict__[_UNIT] = _Unit(entries)
        # after FSDP's own hook, which gathers
        hook(unit, _unit_enter, _unit_exit, outermost=False)


def divide(
    this: Any, entries: Sequence[NormalizedWeight]
) -> tuple[list[NormalizedWeight], list[NormalizedWeight]]:
    """The entries of a Round whose weights are here, and those that FSDP2 has yet to gather.

    Those are measured, and each unit makes W_hat when it has gathered them; layers in units of
    FSDP1, and those that keep several singular values, normalise themselves.
    """
    if this.units is None:
        look(this)
    here, shards = [], []
    for entry in entries:
        module = entry.sites[0][0]
        if id(module) in this.flattened:
            continue
        unit = this.units.get(id(module))
        entry.managed = entry.managed or unit is not None
        if unit is not None and is_split(entry.weight) and entry.settings.preserve != 1:
            continue  # what is summed over processes does not tell several singular values
        (here if unit is None or not is_split(entry.weight) else shards).append(entry)
    if not shards or _measured(shards):
        return here, []
    _measure(shards)
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


def fsdp_units(root: nn.Module) -> dict[int, nn.Module]:
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


def flattened(root: nn.Module) -> set[int]:
    """``id`` of the modules whose weights a FullyShardedDataParallel (FSDP1) below ``root``
    flattens: they are whole only while its forward runs."""
    return {
        id(module)
        for wrapper in root.modules()
        if isinstance(wrapper, FullyShardedDataParallel)
        for module in wrapper.modules()
    }
