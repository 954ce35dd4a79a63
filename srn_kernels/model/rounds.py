"""W_hat of many wrapped layers, in as few op calls as their devices allow."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from srn_kernels.core.arguments import is_dense
from srn_kernels.core.autograd import plain_eager, refuse_batched, run_round
from srn_kernels.core.guard import are_plain, check_tensor, serving
from srn_kernels.core.plan import Plan, make_plan
from srn_kernels.core.record import Round as RoundRecord
from srn_kernels.maths.bound import bounded
from srn_kernels.maths.matrix import first_vector, round_vectors
from srn_kernels.model.weight import LayerConstants, NormalizedWeight, is_split, version_of

_FIRST = 2**63 - 1  # a sequence number behind that of every ordinary node


_AUTOCAST_TYPES = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention)


def _constants(entry: NormalizedWeight, weight: Tensor) -> LayerConstants:
    known = entry.constants
    if known is None or known.settings is not entry.settings or known.shape != weight.shape:
        known = entry.constants = LayerConstants(entry, weight)
    return known


def _build_plan(
    layers: tuple[LayerConstants, ...],
    iterations: tuple[int, ...],
    out_dtypes: tuple[torch.dtype, ...],
    backend: str,
) -> Plan:
    return make_plan(
        tuple((c.rows, c.columns) for c in layers),
        tuple(c.target_rank for c in layers),
        iterations,
        tuple(c.dim for c in layers),
        tuple(c.settings.eps for c in layers),
        out_dtypes,
        tuple(c.label for c in layers),
        backend,
        layers[0].settings.gradient,
        layers[0].rule.name,
    )


_cached_plan = functools.lru_cache(maxsize=256)(_build_plan)


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype that autocast computes in on a device type; None where it is off."""
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return None
    return torch.get_autocast_dtype(device)


def _out_dtypes(
    entries: Sequence[NormalizedWeight], weights: Sequence[Tensor], device: str
) -> tuple[torch.dtype, ...]:
    """The weights' dtypes, or autocast's where the layer would cast its weight anyway."""
    autocast = autocast_dtype(device)
    if autocast is None:
        return tuple(w.dtype for w in weights)
    return tuple(
        autocast
        if w.dtype != torch.float64 and isinstance(e.sites[0][0], _AUTOCAST_TYPES)
        else w.dtype
        for e, w in zip(entries, weights, strict=True)
    )


def _matrix(weight: Tensor) -> Tensor:
    """The weight as the ops take it: dense, and a vector as a matrix of one row."""
    if weight.dim() == 1:
        weight = weight.unsqueeze(0)
    return weight if is_dense(weight) else weight.contiguous()


def _kind(entry: NormalizedWeight, weight: Tensor) -> tuple[Any, ...]:
    """What all weights of one op call have in common: device, whether processes hold them together,
    state dtype, backend, kind of gradient and rule; a tensor subclass is a call of its own."""
    settings, rule = entry.settings, entry.settings.chosen_rule
    backend = settings.backend if rule.kernels else "reference"
    split = alone = False
    if type(weight) is not nn.Parameter:
        split = is_split(weight)
        alone = not (split or torch.compiler.is_compiling() or are_plain([weight])) and id(weight)
    float64 = weight.dtype == torch.float64
    return weight.device, split, float64, backend, settings.gradient, rule.name, alone


def _backend(split: bool, backend: str, entries: Sequence[Any], weights: Sequence[Tensor]) -> str:
    """What serves them; it does not matter for DTensors."""
    return "reference" if split else serving(backend, weights, [e.label for e in entries])


def _runner(split: bool) -> Callable[..., tuple[Tensor, ...]]:
    if not split:
        return run_round
    from srn_kernels.core.split import run_split

    return run_split


def _check_split(entries: Sequence[NormalizedWeight]) -> None:
    from srn_kernels.core import split

    for entry in entries:
        split.check(entry.weight, entry.settings, entry.label)


def measure_entries(entries: Sequence[NormalizedWeight], iterations: Sequence[int]) -> RoundRecord:
    """A round of DTensor weights without its W_hat: u, v move, and what W_hat needs is kept."""
    from srn_kernels.core import split

    weights = [_matrix(e.weight.detach()) for e in entries]
    plan = _cached_plan(
        tuple([_constants(e, e.weight) for e in entries]), tuple(iterations), (), "reference"
    )
    blocks = [
        split.block_of(w, d, name)
        for w, d, name in zip(weights, plan.dims, plan.names, strict=True)
    ]
    record = RoundRecord(plan, entries)
    record.round_state, record.stats = split.measure(
        plan,
        [w.to_local() for w in weights],
        blocks,
        [e.u for e in entries],
        [e.v for e in entries],
    )
    return record


def normalize_entries(
    entries: Sequence[NormalizedWeight],
    iterations: Sequence[int],
    record: bool = True,
    state: Sequence[tuple[Tensor, Tensor]] | None = None,
    early: bool = False,
    only_state: bool = False,
) -> list[Tensor]:
    """W_hat of each entry, differentiable, all layers in as few op calls as their devices allow.

    ``state`` replaces the entries' own u, v; ``record`` keeps what a recomputation needs;
    ``early`` lets backward run this part's node as soon as its gradients are complete;
    ``only_state``: for what happens to u and v.
    """
    compiling = torch.compiler.is_compiling()
    constants, plan_for = (LayerConstants, _build_plan) if compiling else (_constants, _cached_plan)
    weights = [e.weight for e in entries]
    for entry, weight in zip(entries, weights, strict=True):
        if entry.parameter is not weight and not compiling:
            check_tensor(weight, entry.label)
    refuse_batched(weights)
    groups: dict[Any, list[int]] = {}
    for i, weight in enumerate(weights):
        groups.setdefault(_kind(entries[i], weight), []).append(i)
    outs: list[Any] = [None] * len(entries)
    for (device, split, _, backend, *_), group in groups.items():
        chosen = [entries[i] for i in group]
        raw = [weights[i] for i in group]
        layers = tuple([constants(e, w) for e, w in zip(chosen, raw, strict=True)])
        plan = plan_for(
            layers,
            tuple([iterations[i] for i in group]),
            _out_dtypes(chosen, raw, device.type),
            _backend(split, backend, chosen, raw),
        )
        if state is None:
            us, vs = [e.u for e in chosen], [e.v for e in chosen]
        else:
            us, vs = zip(*[state[i] for i in group], strict=True)
        kept = RoundRecord(plan, chosen) if record else None
        if split and not only_state:
            _check_split(chosen)
        results = _runner(split)(plan, kept, [_matrix(w) for w in raw], us, vs)
        if early and not split and results[0].grad_fn is not None:
            # The engine takes the latest node that is ready; rounds are made before all layers.
            results[0].grad_fn._set_sequence_nr(_FIRST)
        for place, i in enumerate(group):
            out = results[place]
            if layers[place].scales and not only_state:
                out = _bounded(entries[i], out, plan, place, *results[-2:])
            outs[i] = out.squeeze(0) if raw[place].dim() == 1 else out
            if kept is not None:
                entries[i].record = (kept, place)
    return outs


def _bounded(
    entry: NormalizedWeight, out: Tensor, plan: Plan, place: int, round_state: Tensor, stats: Tensor
) -> Tensor:
    """W_hat with its soft bound and gain, from the round's own u, v and scalars."""
    weight, dim, offset = entry.matrix_weight(), plan.dims[place], plan.offsets[place]
    pair = round_vectors(round_state, offset, weight, dim, plan.pairs[place])
    u, v = (first_vector(x) for x in pair)
    s = entry.settings
    return bounded(
        out,
        weight,
        u,
        v,
        stats[place],
        dim,
        s.sigma_max,
        s.grad_through_sigma,
        entry.gain,
        plain_eager(),
    )


def repeat_entries(
    entries: Sequence[NormalizedWeight], records: Sequence[tuple[RoundRecord, int]]
) -> list[Tensor]:
    """W_hat of the given rounds once more, bit for bit, on nodes of their own.

    ``records[i]``: the round of ``entries[i]`` and its place in it.
    """
    outs: list[Any] = [None] * len(entries)
    groups: dict[int, list[int]] = {}
    for i, (record, _) in enumerate(records):
        groups.setdefault(id(record), []).append(i)
    for group in groups.values():
        group.sort(key=lambda i: records[i][1])
        parts: dict[Any, list[int]] = {}
        for i in group:
            parts.setdefault(_kind(entries[i], entries[i].weight), []).append(i)
        for part in parts.values():
            for i, out in zip(part, _repeat(entries, records, part), strict=True):
                outs[i] = out
    return outs


def _repeat(
    entries: Sequence[NormalizedWeight],
    records: Sequence[tuple[RoundRecord, int]],
    part: Sequence[int],
) -> list[Tensor]:
    chosen, places = [entries[i] for i in part], [records[i][1] for i in part]
    record = records[part[0]][0]
    weights = [e.weight for e in chosen]
    device, split, _, backend, *_ = _kind(chosen[0], weights[0])
    dtypes = record.plan.out_dtypes
    plan = _cached_plan(
        tuple([_constants(e, w) for e, w in zip(chosen, weights, strict=True)]),
        (-1,) * len(part),
        tuple([dtypes[p] for p in places]) if dtypes else _out_dtypes(chosen, weights, device.type),
        _backend(split, backend, chosen, weights),
    )
    round_state, stats = record.round_state, record.stats
    if len(part) < len(record.plan.dims):
        bounds = [*record.plan.offsets, record.plan.state_size]
        round_state = torch.cat([round_state[bounds[p] : bounds[p + 1]] for p in places])
        stats = stats[places]
    # Its backward counts as one of the original round.
    kept = RoundRecord(plan, [*chosen, record])
    us, vs = [e.u for e in chosen], [e.v for e in chosen]
    matrices = [_matrix(w) for w in weights]
    results = _runner(split)(plan, kept, matrices, us, vs, round_state, stats)
    outs = []
    for place, (entry, out) in enumerate(zip(chosen, results, strict=False)):
        if entry.settings.scales:
            out = _bounded(entry, out, plan, place, *results[-2:])
        outs.append(out.squeeze(0) if entry.weight.dim() == 1 else out)
    return outs


def converge(
    entries: Sequence[NormalizedWeight], iterations: int | None = None, provisional: bool = False
) -> None:
    """Runs the power iteration until u, v fit the weights (``init_iterations`` unless given)."""
    entries = [e for e in entries if not e.weight.is_meta]
    with torch.no_grad():
        redrawn = []
        for entry in entries:
            pair, drawn = (entry.u, entry.v), entry.drawn_state()
            if entry.is_untouched() and not entry.unset:
                redrawn.append((pair, [x.clone() for x in pair], drawn))
            elif not entry.unset and all(x.isfinite().all() and x.any() for x in pair):
                continue
            for x, start in zip(pair, drawn, strict=True):
                x.copy_(start)
        steps = [e.settings.init_iterations if iterations is None else iterations for e in entries]
        busy = [i for i, n in enumerate(steps) if n > 0]
        chosen, counts = [entries[i] for i in busy], [steps[i] for i in busy]
        normalize_entries(chosen, counts, record=False, only_state=True)
        for pair, before, drawn in redrawn:
            # a zero or non-finite weight has moved nothing
            if all(torch.equal(x, start) for x, start in zip(pair, drawn, strict=True)):
                for x, old in zip(pair, before, strict=True):
                    x.copy_(old)
        for entry in entries:
            entry.mark_fresh()
            versions = (version_of(entry.u), version_of(entry.v))
            entry.provisional = versions if provisional else None
