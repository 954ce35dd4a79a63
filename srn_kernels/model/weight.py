"""What a wrapped layer carries: its settings, its u and v, and whether they fit the weight."""

from __future__ import annotations

import copy
import pickle
import zlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from srn_kernels.core.arguments import (
    FLOATING,
)
from srn_kernels.core.record import RoundRecord
from srn_kernels.maths.matrix import state_dtype
from srn_kernels.maths.top_k import block_size
from srn_kernels.model.settings import Settings

KEY = "_srn"  # module.__dict__[KEY]: {parameter name: NormalizedWeight}


FORM = "_srn_form"  # module.__dict__[FORM]: {parameter name: what convert took it from}


class Owner:
    """Identity of the round that a wrapped parameter belongs to."""


def is_split(weight: Tensor) -> bool:
    """Whether a tensor is a DTensor: FSDP2's shards, tensor parallelism."""
    kind = type(weight)
    return kind is not nn.Parameter and kind is not Tensor and kind.__name__ == "DTensor"


def version_of(weight: Tensor) -> int:
    """A number that changes with every write in place that autograd sees."""
    if weight.is_inference():
        return -1
    # foreach and fused optimisers write the local part alone
    return weight._version + (weight._local_tensor._version if is_split(weight) else 0)


def is_flattened(entry: NormalizedWeight) -> bool:
    """Whether FSDP1 owns the weight, which is whole only while its unit's forward runs."""
    module, name = entry.sites[0]
    weight = module._parameters.get(name)
    return weight is None or getattr(weight, "_fsdp_flattened", False)


# Versions that tensors start with when they are copied or unpickled.
_COPIED = copy.deepcopy(nn.Parameter(torch.zeros(1)))._version


_COPIED_BUFFER = copy.deepcopy(torch.zeros(1))._version


_UNPICKLED = pickle.loads(pickle.dumps(nn.Parameter(torch.zeros(1))))._version


# what a copy of an entry starts without
_PASSING = (
    "parameter",
    "version",
    "born",
    "backward_seen",
    "active",
    "shadowed",
    "covered",
    "pending",
    "record",
    "constants",
)


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
        # Versions of u and v as wrapping left them. Untouched, they are formed anew at the first
        # forward, from the draw again: a weight may have been initialised through .data, or made
        # equal over ranks, in between, and the same weight gives the same bits.
        self.provisional: tuple[int, int] | None = None
        self.managed = False  # FSDP2 swaps shards and gathered weights
        self.loading: str | None = None  # between the two hooks of load_state_dict
        self._forget()

    def _forget(self) -> None:
        self.parameter: Tensor | None = None  # as of the last look at the weight
        self.version = -1
        self.born: int | None = None  # a copy not looked at yet: the version it started with
        self.backward_seen = False  # since u and v last moved
        self.active: Any = None  # the Activation whose W_hat shadows the parameter now
        self.shadowed = False  # whether any does, also in a traced round
        self.covered: Tensor | None = None  # the raw weight, where FSDP1 keeps it as an attribute
        self.pending: tuple[RoundRecord, int] | None = None  # measured, but W_hat is not made yet
        self.record: tuple[RoundRecord, int] | None = None  # the last round, and our place in it
        self.constants: LayerConstants | None = None

    def __getstate__(self) -> dict[str, Any]:
        if self.active is not None:  # the copy would keep this W_hat for ever
            raise RuntimeError(
                f"a model cannot be copied or pickled inside a forward or a shared_round, where "
                f"{self.label!r} is in use; do it afterwards"
            )
        state = self.__dict__.copy()
        state["stale"] = self.is_written()
        state["provisional"] = (_COPIED_BUFFER,) * 2 if self.is_untouched() else None
        for key in _PASSING:
            del state[key]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()
        self.born, self.provisional = _UNPICKLED, None

    def __deepcopy__(self, memo: dict[int, Any]) -> NormalizedWeight:
        twin = memo[id(self)] = object.__new__(type(self))
        state = copy.deepcopy(self.__getstate__(), memo)
        twin.__setstate__(state)
        twin.born, twin.provisional = _COPIED, state["provisional"]
        return twin

    @property
    def weight(self) -> Tensor:
        """The raw parameter."""
        module, name = self.sites[0]
        weight = module._parameters.get(name)
        if weight is None:  # FSDP1 sets plain tensors as attributes
            weight = module.__dict__.get(name) if self.covered is None else self.covered
        if weight is None:
            raise RuntimeError(self.lost())
        return weight

    def lost(self) -> str:
        """What to say where the Parameter is no longer in its module."""
        module, name = self.sites[0]
        if parametrize.is_parametrized(module, name):
            kinds = ", ".join(type(p).__name__ for p in module.parametrizations[name])
            return (
                f"{self.label!r}: the parametrization {kinds} was put over a normalised weight; "
                "take it off (torch.nn.utils.parametrize.remove_parametrizations), or take this "
                "normalisation off before (srn_kernels.remove_stable_rank_norm)"
            )
        how = "set to None" if name in module._parameters else "deleted or moved"
        return (
            f"{self.label!r}: the Parameter {name!r} of a normalised {type(module).__name__} was "
            f"{how}; set it again, or call remove_stable_rank_norm before changing it"
        )

    @property
    def u(self) -> Tensor:
        u = self.sites[0][0]._buffers[self.u_name]
        return u.to_local() if is_split(u) else u  # tensor parallelism replicates buffers

    @property
    def v(self) -> Tensor:
        v = self.sites[0][0]._buffers[self.v_name]
        return v.to_local() if is_split(v) else v

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
        return self.weight.requires_grad or any(
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

    def is_untouched(self) -> bool:
        """Whether u and v are still what wrapping made them."""
        known = self.provisional
        return known is not None and known == (version_of(self.u), version_of(self.v))

    def is_stale(self) -> bool:
        """Whether u and v have to converge before they serve this weight."""
        return self.is_written() or (self.provisional is not None and self.is_untouched())

    def is_written(self) -> bool:
        """Whether the weight was replaced, or written with no backward since u, v last moved."""
        if self.stale:
            return True
        weight, known = self.weight, self.parameter
        if known is None:  # u and v came with the copy
            return self.born is not None and version_of(weight) > self.born
        if weight is not known:
            # torch.func.functional_call and FSDP1 put plain tensors in the place of Parameters
            if not isinstance(weight, nn.Parameter):
                return False
            if not (self.managed or is_split(weight) != is_split(known)):
                return True
            weight = known  # the same values were only distributed, if they were not written before
        plain = type(weight) is nn.Parameter and not weight.is_inference()
        if (weight._version if plain else version_of(weight)) == self.version:
            return False
        # A change after a backward of this weight's round is an optimiser step.
        return not self.backward_seen

    def mark_fresh(self) -> None:
        """u and v belong to the weight as it is now."""
        self.stale = self.unset = self.backward_seen = False
        self.born = None
        weight = self.weight
        if not isinstance(weight, nn.Parameter):
            if self.sites[0][1] not in self.sites[0][0]._parameters:  # FSDP1: let it free its own
                self.parameter = None
            return
        if self.managed and not is_split(weight):  # gathered: the shards are what is written
            known = self.parameter
            weight = known if known is not None and is_split(known) else None
        self.parameter = weight
        self.version = -1 if weight is None else version_of(weight)

    def written(self) -> int:
        """The version of what optimisers write, also while FSDP2 shows a gathered weight."""
        known = self.parameter
        weight = known if self.managed and known is not None else self.weight
        return version_of(weight) + (version_of(self.gain) if self.settings.gain else 0)

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


def check_weight(module: nn.Module, weight: Tensor | None, label: str) -> None:
    """Raises the one clear error for a parameter of ``module`` that cannot be normalised."""
    if weight is None:
        raise ValueError(f"{label} is None")
    if isinstance(weight, nn.parameter.UninitializedTensorMixin):
        raise ValueError(f"{label} is not initialised yet: run a forward of its lazy module first")
    if weight.dtype not in FLOATING:
        raise TypeError(f"{label} must be real floating-point, got {weight.dtype}")
    if weight.dim() == 0:
        raise ValueError(f"{label} must have at least one dimension")
    if getattr(weight, "_fsdp_flattened", False):
        raise ValueError(
            f"{label} is flattened by FullyShardedDataParallel; normalise the model before "
            "wrapping it, or use fully_shard"
        )
    if getattr(module, "sparse", False) and isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        raise ValueError(
            f"{label} has sparse gradients (sparse=True), but every element of a weight acts on "
            "its normalisation; use sparse=False"
        )


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
        before = {}
        for name, entry in entries.items():
            pair = module._buffers[name + "_u"], module._buffers[name + "_v"]
            before[name] = (*pair, entry.is_written(), entry.is_untouched())
        type(module)._apply(module, fn, recurse)
        for name, entry in entries.items():
            dtype = state_dtype(module._parameters[name].dtype)
            *old_pair, stale, untouched = before[name]
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
            if untouched:
                entry.provisional = (version_of(entry.u), version_of(entry.v))
        return module
