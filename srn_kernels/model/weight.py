"""What a wrapped layer carries: one Parameter, its settings, and its u and v."""

from __future__ import annotations

import copy
import zlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from srn_kernels.core.guard import check_new, check_tensor
from srn_kernels.core.record import Round
from srn_kernels.maths.matrix import matrix_shape, state_dtype, vector_shape
from srn_kernels.model.freshness import Freshness, State, is_split, version_of
from srn_kernels.model.settings import Settings

FORM = "_srn_form"  # module.__dict__[FORM]: {parameter name: its formats.Origin}
KEY = "_srn"  # module.__dict__[KEY]: {parameter name: NormalizedWeight}


class Owner:
    """Identity of the group that a wrapped parameter belongs to."""

    def __init__(self) -> None:
        self.lost = False  # whether another group has taken one of its weights


# what a copy of an entry starts without
_PASSING = ("shadow", "shadowed", "pending", "record", "apart", "layer", "fit")


class NormalizedWeight:
    """One distinct Parameter that is normalised, and every module attribute that holds it."""

    def __init__(self, module: nn.Module, name: str, label: str, settings: Settings) -> None:
        self.settings = settings
        self.label = label  # for messages, and the seed of u and v
        self.sites: list[tuple[nn.Module, str]] = []
        self.recurrent = False  # whether one of them is a recurrent layer
        self.add_site(module, name)
        self.u_name, self.v_name = name + "_u", name + "_v"  # buffers of the first site
        self.owner: Owner | None = None
        self.fit = Freshness()
        self._start()

    def _start(self) -> None:
        self.shadow: Any = None  # the Shadow whose W_hat is in front of the parameter now
        self.shadowed = False  # whether any is, also in a traced round
        self.pending: Round | None = None  # has measured us, but W_hat is not made yet
        self.record: Round | None = None  # the last
        self.apart: Round | None = None  # the last without gradients in training
        self.layer: Any = None  # what rounds know of it beside its tensors

    def add_site(self, module: nn.Module, name: str) -> None:
        """Takes note of a module that has this Parameter under a name."""
        self.sites.append((module, name))
        self.recurrent = self.recurrent or isinstance(module, nn.RNNBase)
        self.layer = None

    # A copy keeps the state of u and v: the Parameter and the vectors are copied along with it, so
    # that a later replacement of the copy's own is seen.

    def __getstate__(self) -> dict[str, Any]:
        if self.shadowed:
            raise RuntimeError(
                f"a model cannot be copied or pickled inside a forward or a shared_round, where "
                f"{self.label!r} is in use; do it afterwards"
            )
        state = {k: v for k, v in self.__dict__.items() if k not in _PASSING}
        state["fit"] = (self.fit.now(self.weight, self.u, self.v), self.fit.managed)
        state["tensors"] = (self.weight, self.u, self.v)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        (now, managed), tensors = state.pop("fit"), state.pop("tensors")
        self.__dict__.update(state)
        self._start()
        self.fit = Freshness()
        self.fit.managed = managed
        self.fit.become(now, *tensors)

    def __deepcopy__(self, memo: dict[int, Any]) -> NormalizedWeight:
        twin = memo[id(self)] = object.__new__(type(self))
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    @property
    def weight(self) -> Tensor:
        """The raw Parameter; RuntimeError where something else has taken its place."""
        module, name = self.sites[0]
        weight = module._parameters.get(name)
        if weight is None:
            raise hidden(module, name, self.label)
        return weight

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
        return matrix_shape(self.matrix_weight(), self.settings.dim)

    def target_rank(self) -> float:
        return self.settings.target_rank(*self.matrix_shape())

    def state(self) -> State:
        """Whether u and v fit the weight as it is now."""
        return self.fit.now(self.weight, self.u, self.v)

    def become(self, state: State) -> None:
        """Takes note that u and v are in this state, of the weight as it is now."""
        self.fit.become(state, self.weight, self.u, self.v)

    def written(self) -> int:
        """The version of what optimisers write."""
        version = self.fit.written(self.weight)
        return version + (version_of(self.gain) if self.settings.gain else 0)

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
        sizes = self.matrix_shape()
        pairs = self.settings.chosen_rule.pairs(*sizes)
        shapes = [vector_shape(n, pairs) for n in sizes]
        drawn = [
            torch.randn(n, generator=generator, dtype=torch.float64, device="cpu") for n in shapes
        ]
        return tuple((x / x.norm()).to(dtype).to(weight.device) for x in drawn)


def hidden(module: nn.Module, name: str, label: str) -> RuntimeError:
    """The error for a Parameter that something else has put aside."""
    if parametrize.is_parametrized(module, name):
        kinds = ", ".join(type(p).__name__ for p in module.parametrizations[name])
        cause = (
            f"the parametrization {kinds} was put over it; take it off "
            "(torch.nn.utils.parametrize.remove_parametrizations), and parametrize before wrapping"
        )
    elif name + "_orig" in module._parameters:
        cause = (
            f"another hook keeps it as {name}_orig (torch.nn.utils.prune, spectral_norm); take "
            "that off, and prune before wrapping"
        )
    elif name in module._parameters:
        cause = "it is None; set it again"
    elif "_is_fsdp_managed_module" in module.__dict__:
        cause = (
            "FullyShardedDataParallel (FSDP1) flattened it, which is not supported; use fully_shard"
        )
    else:
        cause = "it was deleted or moved; set it again"
    return RuntimeError(
        f"layer {label!r} cannot be normalised: {type(module).__name__}.{name} is no longer its "
        f"Parameter: {cause}"
    )


def check_weight(module: nn.Module, weight: Tensor | None, label: str) -> None:
    """Raises the one clear error for a parameter of ``module`` that cannot be normalised."""
    if weight is None:
        raise ValueError(f"{label} is None")
    if isinstance(weight, nn.parameter.UninitializedTensorMixin):
        raise ValueError(f"{label} is not initialised yet: run a forward of its lazy module first")
    check_tensor(weight, label)
    if weight.dim() == 0:
        raise ValueError(f"{label} must have at least one dimension")
    check_new(weight, label)
    if getattr(weight, "_fsdp_flattened", False):
        raise ValueError(
            f"{label} is flattened by FullyShardedDataParallel (FSDP1), which is not supported; "
            "use fully_shard"
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
            before[name] = module._buffers[name + "_u"], module._buffers[name + "_v"], entry.state()
        type(module)._apply(module, fn, recurse)
        for name, entry in entries.items():
            dtype = state_dtype(entry.weight.dtype)
            *old_pair, state = before[name]
            for suffix, old in zip(("_u", "_v"), old_pair, strict=True):
                new = module._buffers[name + suffix]
                if old.is_meta and not new.is_meta:
                    state = State.UNSET  # to_empty: memory without numbers
                if new.dtype != dtype:
                    moved = torch.empty_like(new, dtype=dtype) if old.is_meta else old
                    module._buffers[name + suffix] = moved.to(device=new.device, dtype=dtype)
            entry.layer = None
            entry.become(state)
        return module
