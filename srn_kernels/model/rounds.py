"""W_hat of many wrapped layers, in as few op calls as their devices allow."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from srn_kernels import backends
from srn_kernels.backends import host
from srn_kernels.core.arguments import is_dense
from srn_kernels.core.autograd import refuse_batched, run_round
from srn_kernels.core.guard import serving
from srn_kernels.core.plan import Plan, make_plan
from srn_kernels.core.record import Round
from srn_kernels.model.freshness import State
from srn_kernels.model.look import Kind, Layer, Seen, explain, look
from srn_kernels.model.weight import NormalizedWeight

_FIRST = 2**63 - 1  # a sequence number behind that of every ordinary node


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype that autocast computes in on a device type; None where it is off."""
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return None
    return torch.get_autocast_dtype(device)


# --- plans: all that is kept from one round to the next -------------------------------------------


def _parts(layers: tuple[Layer, ...]) -> list[tuple[Kind, list[int]]]:
    """The layers of each op call."""
    parts: dict[Kind, list[int]] = {}
    for i, layer in enumerate(layers):
        parts.setdefault(layer.kind, []).append(i)
    return list(parts.items())


def _plan(
    layers: tuple[Layer, ...],
    iterations: tuple[int, ...],
    autocast: torch.dtype | None,
    backend: str,
    out_dtypes: tuple[torch.dtype, ...] | None = None,
) -> Plan:
    """The constants of one op call. W_hat has the weights' dtypes, or autocast's where the layer
    would cast its weight anyway, unless ``out_dtypes`` says."""
    if out_dtypes is None:
        out_dtypes = tuple(
            x.dtype if autocast is None or not x.autocasts else autocast for x in layers
        )
    return make_plan(
        tuple((x.rows, x.columns) for x in layers),
        tuple(x.target_rank for x in layers),
        iterations,
        tuple(x.dim for x in layers),
        tuple(x.settings.eps for x in layers),
        out_dtypes,
        tuple(x.label for x in layers),
        backend,
        layers[0].settings.gradient,
        layers[0].rule.name,
        tuple(x.scaling for x in layers),
    )


_cached_parts = functools.lru_cache(maxsize=256)(_parts)
_cached_plan = functools.lru_cache(maxsize=256)(_plan)


def _plan_of(kind: Kind, seen: Seen, iterations: Sequence[int], out_dtypes: Any = None) -> Plan:
    if kind.split:
        backend = "reference"  # what runs is core.split
    elif kind.alone:
        dims = [x.dim for x in seen.layers]
        backend = serving(kind.backend, seen.weights, [kind.alone], dims)
    else:
        what, dims = (kind.device.type, kind.state_dtype), [x.dim for x in seen.layers]
        backend = backends.choose(kind.backend, *what, seen.weights, dims)
    return (_plan if torch.compiler.is_compiling() else _cached_plan)(
        tuple(seen.layers),
        tuple(iterations),
        autocast_dtype(kind.device.type),
        backend,
        out_dtypes,
    )


# --- one round ------------------------------------------------------------------------------------


def _matrices(weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """The weights as the ops take them: dense, and a vector as a matrix of one row."""
    if not torch.compiler.is_compiling() and host.are_contiguous_matrices(weights):
        return weights
    return [_matrix(w) for w in weights]


def _gains(seen: Seen) -> list[Tensor]:
    """The gains of the layers that have one."""
    return [e.gain for e, x in zip(seen.entries, seen.layers, strict=True) if x.scaling.gain]


def _matrix(weight: Tensor) -> Tensor:
    if weight.dim() == 1:
        weight = weight.unsqueeze(0)
    return weight if is_dense(weight) else weight.contiguous()


def _runner(kind: Kind) -> Callable[..., tuple[Tensor, ...]]:
    """What runs a round of these layers: one op, or ops with a sum over processes in between."""
    if not kind.split:
        return run_round
    from srn_kernels.core import split  # torch.distributed only where it is in use

    return split.run_split


def _check_split(seen: Seen) -> None:
    """Raises for a W_hat that DTensors do not offer; their u and v move all the same."""
    from srn_kernels.core import split

    for layer, weight in zip(seen.layers, seen.weights, strict=True):
        split.check(weight, layer.settings, layer.label)


def normalize(
    seen: Seen, iterations: Sequence[int], *, keep: bool = False, early: bool = False
) -> Sequence[Tensor]:
    """W_hat of each layer, differentiable.

    ``keep``: what a recomputation needs is kept in the entries; ``early`` lets backward run this
    part's node as soon as its gradients are complete.
    """
    refuse_batched(seen.weights)
    parts = (_parts if torch.compiler.is_compiling() else _cached_parts)(tuple(seen.layers))
    if len(parts) == 1:
        return _run(parts[0][0], seen, iterations, keep, early)
    outs: list[Any] = [None] * len(seen.entries)
    for kind, places in parts:
        part = _run(kind, seen.part(places), [iterations[i] for i in places], keep, early)
        for i, out in zip(places, part, strict=True):
            outs[i] = out
    return outs


def _run(
    kind: Kind, seen: Seen, iterations: Sequence[int], keep: bool, early: bool
) -> Sequence[Tensor]:
    """:func:`normalize` of the layers of one op call."""
    plan = _plan_of(kind, seen, iterations)
    record = Round(plan, seen.fits) if keep else None
    if kind.split:
        _check_split(seen)
    try:
        given = (_matrices(seen.weights), seen.us, seen.vs)
        results = _runner(kind)(plan, record, *given, gains=_gains(seen))
    except (RuntimeError, ValueError, TypeError, IndexError):
        explain(seen)
        raise
    if record is not None:
        for entry in seen.entries:
            entry.record = record
    if early and not kind.split and results[0].grad_fn is not None:
        # The engine takes the latest node that is ready; rounds are made before all layers.
        results[0].grad_fn._set_sequence_nr(_FIRST)
    return _finish(seen, results)


def _finish(seen: Seen, results: Sequence[Tensor]) -> Sequence[Tensor]:
    """W_hat as the layers see it, from what the op returned: vectors are matrices of one row."""
    *outs, _, _ = results
    for place, layer in enumerate(seen.layers):
        if not layer.plain:
            outs[place] = outs[place].squeeze(0)
    return outs


def measure(seen: Seen, iterations: Sequence[int]) -> Round:
    """A round of DTensor weights without its W_hat: u, v move, and what W_hat needs is kept."""
    from srn_kernels.core import split

    weights = _matrices([w.detach() for w in seen.weights])
    plan = _cached_plan(tuple(seen.layers), tuple(iterations), None, "reference", ())
    blocks = [split.block_of(w, x.dim, x.label) for w, x in zip(weights, seen.layers, strict=True)]
    record = Round(plan, seen.fits)
    local = [w.to_local() for w in weights]
    record.round_state, record.stats = split.measure(plan, local, blocks, seen.us, seen.vs)
    return record


def repeat(entries: Sequence[NormalizedWeight], records: Sequence[Round]) -> list[Tensor]:
    """W_hat of the given rounds once more, bit for bit, on nodes of their own.

    ``records[i]``: the round of ``entries[i]``.
    """
    outs: list[Any] = [None] * len(entries)
    whole = look(entries)
    parts: dict[Any, list[int]] = {}
    for i, record in enumerate(records):
        parts.setdefault((id(record), whole.layers[i].kind), []).append(i)
    for (_, kind), part in parts.items():
        record = records[part[0]]
        by_place = sorted((record.place_of(entries[i].fit), i) for i in part)
        places, part = [p for p, _ in by_place], [i for _, i in by_place]
        seen = whole.part(part)
        dtypes = record.plan.out_dtypes  # none where shards were measured
        wanted = tuple([dtypes[p] for p in places]) if dtypes else None
        plan = _plan_of(kind, seen, (-1,) * len(part), wanted)
        if dtypes:  # the same bits: a part of a round may be another backend's by itself
            plan = plan._replace(backend=record.plan.backend)
        round_state, stats = record.round_state, record.stats
        if len(part) < len(record.plan.dims):
            bounds = [*record.plan.offsets, record.plan.state_size]
            round_state = torch.cat([round_state[bounds[p] : bounds[p + 1]] for p in places])
            stats = stats[places]
        # Its backward counts as one of the original round.
        kept = Round(plan, [*seen.fits, record])
        vectors = (seen.us, seen.vs, round_state, stats)
        results = _runner(kind)(plan, kept, _matrices(seen.weights), *vectors, gains=_gains(seen))
        for i, out in zip(part, _finish(seen, results), strict=True):
            outs[i] = out
    return outs


def converge(
    entries: Sequence[NormalizedWeight], iterations: int | None = None, provisional: bool = False
) -> None:
    """Runs the power iteration until u, v fit the weights (``init_iterations`` unless given).

    ``provisional``: for layers just wrapped, whose first round does it again.
    """
    entries = [e for e in entries if not e.weight.is_meta]
    with torch.no_grad():
        redrawn = []
        for entry in entries:
            pair, drawn, state = (entry.u, entry.v), entry.drawn_state(), entry.state()
            if state is State.NEW:
                redrawn.append((pair, [x.clone() for x in pair], drawn))
            elif state is not State.UNSET and all(x.isfinite().all() and x.any() for x in pair):
                continue
            for x, start in zip(pair, drawn, strict=True):
                x.copy_(start)
        steps = [e.settings.init_iterations if iterations is None else iterations for e in entries]
        busy = [i for i, n in enumerate(steps) if n > 0]
        if busy:
            move(look([entries[i] for i in busy]), [steps[i] for i in busy])
        for pair, before, drawn in redrawn:
            # a zero or non-finite weight has moved nothing
            if all(torch.equal(x, start) for x, start in zip(pair, drawn, strict=True)):
                for x, old in zip(pair, before, strict=True):
                    x.copy_(old)
        for entry in entries:
            entry.become(State.NEW if provisional else State.FRESH)


def move(seen: Seen, iterations: Sequence[int]) -> None:
    """What a round does to u and v."""
    refuse_batched(seen.weights)
    for kind, places in _cached_parts(tuple(seen.layers)):
        part = seen.part(places)
        plan = _plan_of(kind, part, [iterations[i] for i in places])
        given = (_matrices(part.weights), part.us, part.vs)
        _runner(kind)(plan, None, *given, gains=_gains(part))


# --- looking, without changing anything -----------------------------------------------------------


def settled(entry: NormalizedWeight) -> tuple[Tensor, Tensor]:
    """u and v as the next forward would use them: the entry's own, or a converged copy."""
    state = entry.state()
    if state in (State.FRESH, State.UNSEEN) or entry.weight.is_meta:
        return entry.u, entry.v
    drawn = state is not State.STALE or not (entry.u.isfinite().all() and entry.v.isfinite().all())
    pair = entry.drawn_state() if drawn else (entry.u.clone(), entry.v.clone())
    if entry.settings.init_iterations:
        with torch.no_grad():
            own = look([entry])._replace(us=pair[:1], vs=pair[1:])
            move(own, [entry.settings.init_iterations])
    return pair


def current_weights(entries: Sequence[NormalizedWeight]) -> list[Tensor]:
    """W_hat now, as an evaluation would use it; differentiable; no state changes."""
    seen = look(entries)
    us, vs = zip(*[settled(e) for e in entries], strict=True)
    return normalize(seen._replace(us=us, vs=vs), [0] * len(entries))
