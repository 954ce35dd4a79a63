"""What a wrapped layer carries: its settings, its u and v, and whether they fit the weight."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from srn_kernels import backends
from srn_kernels.autograd import Plan, RoundRecord, plain_eager, refuse_batched, run_round
from srn_kernels.block import block_size, state_vectors
from srn_kernels.bound import bounded
from srn_kernels.functional import (
    FLOATING,
    check_count,
    check_eps,
    check_gradient,
    effective_rank,
    is_dense,
    make_plan,
)
from srn_kernels.reference import round_vectors, state_dtype

KEY = "_srn"  # module.__dict__[KEY]: {parameter name: NormalizedWeight}


@dataclass(frozen=True)
class Settings:
    """The checked keywords of one wrapped parameter; ``dim`` is resolved and not negative."""

    rank_ratio: float = 0.7
    stable_rank: float | None = None
    n_power_iterations: int = 1
    eps: float = 1e-12
    dim: int = 0
    init_iterations: int = 15
    backend: str = "auto"
    gradient: str = "frozen"
    preserve: int = 1
    sigma_max: float | None = None
    grad_through_sigma: bool = True
    gain: bool = False

    def __post_init__(self) -> None:
        check_ratio(self.rank_ratio)
        if self.stable_rank is not None and not (
            isinstance(self.stable_rank, (int, float)) and 1 <= self.stable_rank < math.inf
        ):
            raise ValueError(
                f"stable_rank must be a finite number >= 1 or None, got {self.stable_rank!r}"
            )
        check_count(self.n_power_iterations, "n_power_iterations", 1)
        check_count(self.init_iterations, "init_iterations", 0)
        check_eps(self.eps)
        backends.check_name(self.backend)
        check_gradient(self.gradient)
        check_count(self.preserve, "preserve", 0)
        check_sigma_max(self.sigma_max)
        for argument in ("grad_through_sigma", "gain"):
            if not isinstance(getattr(self, argument), bool):
                raise TypeError(f"{argument} must be a bool, got {getattr(self, argument)!r}")
        if self.preserve != 1 and self.backend not in ("auto", "reference"):
            raise ValueError(
                f"preserve={self.preserve} is served by plain PyTorch, backend 'auto' or "
                f"'reference', not by {self.backend!r}"
            )

    @property
    def scales(self) -> bool:
        """Whether W_hat gets a factor of its own."""
        return self.gain or self.sigma_max is not None

    def target_rank(self, rows: int, columns: int) -> float:
        """The stable rank r to keep below; inf means spectral normalisation alone."""
        if self.stable_rank is not None:
            return effective_rank(self.stable_rank, rows, columns)
        if self.rank_ratio == 1:
            return math.inf
        return effective_rank(max(1.0, self.rank_ratio * min(rows, columns)), rows, columns)


def check_ratio(value: float) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"rank_ratio must be a number, got {value!r}")
    if not 0 < value <= 1:
        raise ValueError(f"rank_ratio must be in (0, 1], got {value}")
    return value


def check_sigma_max(value: float | None) -> None:
    if value is None:
        return
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"sigma_max must be a number or None, got {value!r}")
    if not 0 < value < math.inf:
        raise ValueError(f"sigma_max must be positive and finite, or None, got {value}")


class Owner:
    """Identity of the round that a wrapped parameter belongs to."""


class NormalizedWeight:
    """One distinct Parameter that is normalised, and every module attribute that holds it."""

    def __init__(self, module: nn.Module, name: str, label: str, settings: Settings) -> None:
        self.settings = settings
        self.label = label  # for messages, and the seed of u and v
        self.sites: list[tuple[nn.Module, str]] = [(module, name)]
        self.u_name, self.v_name = name + "_u", name + "_v"  # buffers of the first site
        self.owner: Owner | None = None
        self.stale = True  # u and v do not belong to the present weight
        self.unset = True  # u and v hold no numbers yet
        self.loading: str | None = None  # between the two hooks of load_state_dict
        self._forget()

    def _forget(self) -> None:
        self.parameter: Tensor | None = None  # as of the last look at the weight
        self.version = -1
        self.backward_seen = False  # since u and v last moved
        self.active: Any = None  # the Activation whose W_hat shadows the parameter now
        self.record: tuple[RoundRecord, int] | None = None  # the last round, and our place in it
        self.constants: LayerConstants | None = None

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["stale"] = self.is_stale()
        for key in ("parameter", "version", "backward_seen", "active", "record", "constants"):
            del state[key]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    @property
    def weight(self) -> Tensor:
        """The raw parameter."""
        module, name = self.sites[0]
        return module._parameters[name]

    @property
    def u(self) -> Tensor:
        return self.sites[0][0]._buffers[self.u_name]

    @property
    def v(self) -> Tensor:
        return self.sites[0][0]._buffers[self.v_name]

    @property
    def gain(self) -> Tensor | None:
        """The learnable gain, a Parameter (1,) of every site, if there is one."""
        if not self.settings.gain:
            return None
        module, name = self.sites[0]
        return module._parameters[name + "_gain"]

    def set_gain(self, gain: Tensor) -> None:
        """Registers the gain at every site."""
        for module, name in self.sites:
            module.register_parameter(name + "_gain", gain)

    @property
    def training(self) -> bool:
        if len(self.sites) == 1:
            return self.sites[0][0].training
        return any(module.training for module, _ in self.sites)

    def wants_gradient(self) -> bool:
        """Whether W_hat has something to differentiate in."""
        return self.weight.requires_grad or (self.settings.gain and self.gain.requires_grad)

    def trainable(self) -> bool:
        """Whether anything of this weight's modules can train."""
        return any(
            p is not None and p.requires_grad
            for module, _ in self.sites
            for p in module._parameters.values()
        )

    def matrix_weight(self) -> Tensor:
        """The weight with at least two dimensions: a vector is a matrix of one row."""
        w = self.weight
        return w.unsqueeze(0) if w.dim() == 1 else w

    def matrix_shape(self) -> tuple[int, int]:
        w = self.weight
        if w.dim() == 1:
            return 1, w.numel()
        rows = w.shape[self.settings.dim]
        return rows, w.numel() // rows

    def target_rank(self) -> float:
        return self.settings.target_rank(*self.matrix_shape())

    def is_stale(self) -> bool:
        """Whether the weight was replaced, or written with no backward since u, v last moved."""
        if self.stale:
            return True
        weight = self.weight
        if self.parameter is None:  # a fresh copy: its u and v came with it
            return False
        if weight is not self.parameter:
            return True
        if weight.is_inference() or weight._version == self.version:
            return False
        # A change after a backward of this weight's round is an optimiser step.
        return not self.backward_seen

    def mark_fresh(self) -> None:
        """u and v belong to the weight as it is now."""
        self.stale = self.unset = self.backward_seen = False
        self.parameter = self.weight
        self.version = -1 if self.parameter.is_inference() else self.parameter._version

    def set_state(self, u: Tensor, v: Tensor) -> None:
        """Registers u and v as the buffers of every site; tied sites share them."""
        for module, name in self.sites:
            for suffix, value in (("_u", u), ("_v", v)):
                if name + suffix in module._buffers:
                    module._buffers[name + suffix] = value
                else:
                    module.register_buffer(name + suffix, value)

    def share_state(self) -> None:
        """Ties u and v of tied sites again after something replaced the buffers one by one."""
        module, name = self.sites[0]
        for other, other_name in self.sites[1:]:
            for suffix in ("_u", "_v"):
                other._buffers[other_name + suffix] = module._buffers[name + suffix]

    def drawn_state(self) -> tuple[Tensor, Tensor]:
        """u (rows,) and v (columns,) of norm 1, or blocks (rows, size), (columns, size) that keep
        several singular values, from a draw that depends on the label and shape alone."""
        weight = self.weight
        generator = torch.Generator("cpu").manual_seed(
            zlib.crc32(f"{self.label}:{tuple(weight.shape)}".encode())
        )
        dtype = state_dtype(weight.dtype)
        rows, columns = self.matrix_shape()
        size = block_size(self.settings.preserve, rows, columns)
        shapes = [(n,) if size == 1 else (n, size) for n in (rows, columns)]
        drawn = [
            torch.randn(n, generator=generator, dtype=torch.float64, device="cpu") for n in shapes
        ]
        return tuple((x / x.norm()).to(dtype).to(weight.device) for x in drawn)


def check_weight(weight: Tensor | None, label: str) -> None:
    """Raises the one clear error for a parameter that cannot be normalised."""
    if weight is None:
        raise ValueError(f"{label} is None")
    if isinstance(weight, nn.parameter.UninitializedTensorMixin):
        raise ValueError(f"{label} is not initialised yet: run a forward of its lazy module first")
    if weight.dtype not in FLOATING:
        raise TypeError(f"{label} must be real floating-point, got {weight.dtype}")
    if weight.dim() == 0:
        raise ValueError(f"{label} must have at least one dimension")


_AUTOCAST_TYPES = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention)


class LayerConstants:
    """What a round needs of one layer beside its tensors; compared by identity, so made once."""

    __slots__ = ("columns", "dim", "label", "rows", "scales", "settings", "shape", "target_rank")

    def __init__(self, entry: NormalizedWeight, weight: Tensor) -> None:
        self.shape = weight.shape
        self.settings = entry.settings
        self.scales = entry.settings.scales
        self.label = entry.label
        self.dim = entry.settings.dim if weight.dim() > 1 else 0
        self.rows, self.columns = entry.matrix_shape()
        self.target_rank = entry.settings.target_rank(self.rows, self.columns)


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
        () if layers[0].settings.preserve == 1 else tuple(c.settings.preserve for c in layers),
    )


_cached_plan = functools.lru_cache(maxsize=256)(_build_plan)


def _out_dtypes(
    entries: Sequence[NormalizedWeight], weights: Sequence[Tensor], device: str
) -> tuple[torch.dtype, ...]:
    """The weights' dtypes, or autocast's where the layer would cast its weight anyway."""
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return tuple(w.dtype for w in weights)
    autocast = torch.get_autocast_dtype(device)
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


def normalize_entries(
    entries: Sequence[NormalizedWeight],
    iterations: Sequence[int],
    record: bool = True,
    state: Sequence[tuple[Tensor, Tensor]] | None = None,
) -> list[Tensor]:
    """W_hat of each entry, differentiable, all layers in as few op calls as their devices allow.

    ``state`` replaces the entries' own u, v; ``record`` keeps what a recomputation needs.
    """
    compiling = torch.compiler.is_compiling()
    constants, plan_for = (LayerConstants, _build_plan) if compiling else (_constants, _cached_plan)
    weights = [module._parameters[name] for module, name in [e.sites[0] for e in entries]]
    refuse_batched(weights)
    # One call takes one device, state dtype, backend, kind of gradient and kind of state.
    groups: dict[Any, list[int]] = {}
    for i, weight in enumerate(weights):
        settings = entries[i].settings
        block = settings.preserve != 1
        backend = "reference" if block else settings.backend
        key = weight.device, weight.dtype == torch.float64, backend, settings.gradient, block
        groups.setdefault(key, []).append(i)
    outs: list[Any] = [None] * len(entries)
    for (device, _, backend, *_), group in groups.items():
        chosen = [entries[i] for i in group]
        raw = [weights[i] for i in group]
        layers = tuple([constants(e, w) for e, w in zip(chosen, raw, strict=True)])
        plan = plan_for(
            layers,
            tuple([iterations[i] for i in group]),
            _out_dtypes(chosen, raw, device.type),
            backends.resolve(backend, device.type, state_dtype(raw[0].dtype)),
        )
        if state is None:
            us, vs = [e.u for e in chosen], [e.v for e in chosen]
        else:
            us, vs = zip(*[state[i] for i in group], strict=True)
        kept = RoundRecord(plan, chosen) if record else None
        results = run_round(plan, kept, *[_matrix(w) for w in raw], *us, *vs)
        for place, i in enumerate(group):
            out = results[place]
            if layers[place].scales:
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
    if plan.preserve:
        size = block_size(plan.preserve[place], *entry.matrix_shape())
        u, v = (x[:, 0] for x in state_vectors(round_state, offset, weight, dim, size))
    else:
        u, v = round_vectors(round_state, offset, weight, dim)
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


def repeat_entry(entry: NormalizedWeight) -> Tensor:
    """W_hat of the entry's last round once more, bit for bit, on a node of its own."""
    record, place = entry.record
    start, weight = record.plan.offsets[place], entry.weight
    plan = _cached_plan(
        (_constants(entry, weight),),
        (-1,),
        record.plan.out_dtypes[place : place + 1],
        record.plan.backend,
    )
    out, *numbers = run_round(
        plan,
        None,
        _matrix(weight),
        entry.u,
        entry.v,
        record.round_state[start : start + plan.state_size],
        record.stats[place : place + 1],
    )
    if entry.settings.scales:
        out = _bounded(entry, out, plan, 0, *numbers)
    return out.squeeze(0) if weight.dim() == 1 else out


def converge(entries: Sequence[NormalizedWeight], iterations: int | None = None) -> None:
    """Runs the power iteration until u, v fit the weights (``init_iterations`` unless given)."""
    entries = [e for e in entries if not e.weight.is_meta]
    with torch.no_grad():
        for entry in entries:
            pair = (entry.u, entry.v)
            if entry.unset or not all(x.isfinite().all() and x.any() for x in pair):
                for x, drawn in zip(pair, entry.drawn_state(), strict=True):
                    x.copy_(drawn)
        steps = [e.settings.init_iterations if iterations is None else iterations for e in entries]
        busy = [i for i, n in enumerate(steps) if n > 0]
        normalize_entries([entries[i] for i in busy], [steps[i] for i in busy], record=False)
        for entry in entries:
            entry.mark_fresh()


class KeepState:
    """``module._apply`` of a wrapped layer: moves u and v along, but never changes their dtype.

    They stay float32 (float64 for a float64 weight), with every bit, whatever ``.half()`` or
    ``.to(dtype)`` does to the module.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, fn: Any, recurse: bool = True) -> nn.Module:
        module = self.module
        entries = module.__dict__[KEY]
        before = {
            name: (module._buffers[name + "_u"], module._buffers[name + "_v"], entry.is_stale())
            for name, entry in entries.items()
        }
        type(module)._apply(module, fn, recurse)
        for name, entry in entries.items():
            dtype = state_dtype(module._parameters[name].dtype)
            *old_pair, stale = before[name]
            for suffix, old in zip(("_u", "_v"), old_pair, strict=True):
                new = module._buffers[name + suffix]
                if old.is_meta and not new.is_meta:
                    entry.unset = stale = True  # to_empty: memory without numbers
                if new.dtype != dtype:
                    moved = torch.empty_like(new, dtype=dtype) if old.is_meta else old
                    module._buffers[name + suffix] = moved.to(device=new.device, dtype=dtype)
            if stale:
                entry.stale = True
            else:
                entry.mark_fresh()
        return module
