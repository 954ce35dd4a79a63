"""Rounds: one fused normalisation of all layers of a root, each time that the root is called.

A layer that is called outside any round makes one of its own.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from srn_kernels.core.record import RoundRecord
from srn_kernels.model import recompute
from srn_kernels.model.begin import Frame, begin, begin_again, end, may_iterate, share, unshare
from srn_kernels.model.hooks import hook, unhook
from srn_kernels.model.refuse import Named, refuse_script
from srn_kernels.model.rounds import normalize_entries
from srn_kernels.model.shadow import shadow, unshadow
from srn_kernels.model.steady import Steady, steady_key
from srn_kernels.model.weight import KEY, NormalizedWeight, Owner, is_flattened, is_split

ROUND = "_srn_round"  # root.__dict__[ROUND]: its Round


READERS = "_srn_reads"  # module.__dict__[READERS]: children whose weights it reads itself


_TRACED = "_srn_traced"  # module.__dict__[_TRACED]: what a traced call of it has to undo


_REPLICA = (
    "nn.DataParallel is not supported: its replicas would run on raw weights; use "
    "DistributedDataParallel"
)


def _enter_traced(entries: Sequence[NormalizedWeight]) -> list[NormalizedWeight]:
    # dynamo guards this attribute, but not what a module's __dict__ holds
    todo = [e for e in entries if not e.shadowed]
    if not todo:
        return todo
    iterate = may_iterate(todo)
    iterations = [e.settings.n_power_iterations if iterate and e.training else 0 for e in todo]
    outs = normalize_entries(todo, iterations, record=False)
    for entry, out in zip(todo, outs, strict=True):
        entry.parameter = None  # an eager look takes the weight as it then is
        entry.provisional = None
        entry.born = None
        shadow(entry, out)
    return todo


class Round:
    """The layers that one root normalises together."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.owner = Owner()
        self.entries: list[NormalizedWeight] = []
        self.edges: list[tuple[nn.Module, str, nn.Module]] = []
        self.skipped: list[tuple[str, str]] = []
        self.groups = 1  # consecutive parts, each with a node of its own
        self.units: dict[int, nn.Module] | None = None  # FSDP2's, by id of the module
        self.flattened: set[int] = set()  # id of modules whose weights FSDP1 gathers
        self.traced: list[NormalizedWeight] = []
        self.steady: dict[Any, Steady] = {}
        self.last: weakref.ref[RoundRecord] | None = None  # the last that ``steady`` knows of

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "steady": {}, "last": None}

    def current(self) -> list[NormalizedWeight]:
        """The entries that still belong to this round (fuse may have taken some over)."""
        if any(e.owner is not self.owner for e in self.entries):
            self.entries = [e for e in self.entries if e.owner is self.owner]
        return self.entries

    def add(self, entries: Sequence[NormalizedWeight]) -> None:
        for entry in entries:
            entry.owner = self.owner
        self.entries = [*self.current(), *entries]
        self.edges = _edges(self.root, self.entries)
        self.steady.clear()  # knows of neither new layers nor new sites

    def keep(self, key: Any, frame: Frame) -> None:
        """Keeps a round that :func:`begin` has just made, for the next of the same key."""
        made = [a for a in frame.held if a.root is self and len(a.entries) == len(self.entries)]
        steady = Steady.of(self, self.entries, self.edges) if made and self.groups == 1 else None
        if steady is not None:
            self.steady[key] = steady
            self.last = weakref.ref(self.entries[0].record[0])

    def is_distributed(self) -> bool:
        """Whether processes hold weights of this round together, now or at an earlier forward."""
        if not (dist.is_available() and dist.is_initialized()):
            return False
        return self.units is not None or any(is_split(e.weight) for e in self.current())

    def check_structure(self) -> None:
        """Raises if a layer of the round is no longer part of the model."""
        for place, (parent, key, child) in enumerate(self.edges):
            present = parent._modules.get(key)
            if present is not child:
                if present is not None and any(m is child for m in present.modules()):
                    self.edges[place] = parent, key, present  # wrapped in another module
                    self.units = None
                    if type(present).__name__ == "FullyShardedDataParallel":
                        _units().look(self)
                    continue
                raise RuntimeError(
                    f"submodule {key!r} of {type(parent).__name__} was replaced after wrapping; "
                    "call srn_kernels.apply_stable_rank_norm(model) to normalise the new one, or "
                    "srn_kernels.fuse(model) to leave it as it is"
                )


def _units() -> Any:
    from srn_kernels.model import fsdp  # torch.distributed only where it is in use

    return fsdp


def _edges(
    root: nn.Module, entries: Sequence[NormalizedWeight]
) -> list[tuple[nn.Module, str, nn.Module]]:
    """The links (parent, key, child) on the way from the root to every wrapped module."""
    wrapped = {id(module) for e in entries for module, _ in e.sites}
    edges: dict[tuple[int, str], tuple[nn.Module, str, nn.Module]] = {}
    seen: dict[int, bool] = {}

    def visit(module: nn.Module) -> bool:
        if id(module) in seen:
            return seen[id(module)]
        seen[id(module)] = leads = id(module) in wrapped
        for key, child in module._modules.items():
            if child is not None and visit(child):
                edges[(id(module), key)] = (module, key, child)
                leads = True
        seen[id(module)] = leads
        return leads

    visit(root)
    return list(edges.values())


def _root_enter(root: nn.Module, args: Any) -> None:
    if "_is_replica" in root.__dict__:
        raise RuntimeError(_REPLICA)
    this: Round = root.__dict__[ROUND]
    if not torch.compiler.is_compiling():
        _begin_round(this)
    elif any(is_split(e.weight) for e in this.entries):
        _begin_untraced(this)
    else:
        this.traced = _enter_traced(this.entries)


def _root_exit(root: nn.Module, args: Any, output: Any) -> None:
    this: Round = root.__dict__[ROUND]
    if not torch.compiler.is_compiling():
        end(this)
    elif any(is_split(e.weight) for e in this.entries):
        _end_untraced(this)
    else:
        for entry in this.traced:
            unshadow(entry)
        this.traced = []


def _begin_round(this: Round) -> None:
    key = steady_key(this.root, this.entries)
    steady = this.steady.get(key)
    if steady is not None:
        if begin_again(steady):
            return
        this.steady.clear()
    this.check_structure()
    if not this.is_distributed():
        frame = begin(this, this.root, this.current(), this.groups)
        this.keep(key, frame)
        return
    here, pending = _units().divide(this, this.current())
    try:
        begin(this, this.root, here, this.groups).pending = pending
    except BaseException:
        for entry in pending:
            entry.pending = None
        raise


_UNTRACED = "a round over DTensor weights runs eagerly"


_begin_untraced = torch.compiler.disable(_begin_round, reason=_UNTRACED)


_end_untraced = torch.compiler.disable(end, reason=_UNTRACED)


def _own_entries(module: nn.Module) -> list[NormalizedWeight]:
    """What a module reads when it is called: its own weights and those of children it reads."""
    entries = list(module.__dict__.get(KEY, {}).values())
    for child in module.__dict__.get(READERS, ()):
        entries += child.__dict__.get(KEY, {}).values()
    return entries


def _shallow(entry: NormalizedWeight) -> str:
    return (
        f"a shallow copy (copy.copy) of normalised layer {entry.label!r} was called, which would "
        "run on raw weights; use copy.deepcopy"
    )


def _layer_enter(module: nn.Module, args: Any) -> None:
    if torch.compiler.is_compiling():
        traced = _enter_traced(_own_entries(module))
        if traced:  # inside a round nothing is written, which a traced checkpoint would refuse
            module.__dict__[_TRACED] = traced
        return
    for entry in module.__dict__.get(KEY, {}).values():
        if entry.sites[0][0] is not module and all(m is not module for m, _ in entry.sites):
            raise RuntimeError(_REPLICA if hasattr(module, "_is_replica") else _shallow(entry))
        active = entry.active
        if active is None or active.root is module or active.shared:
            break
        if active.thread != threading.get_ident():
            break
    else:
        if READERS not in module.__dict__:  # inside a round, the usual case
            if module.training and not torch.is_grad_enabled():
                recompute.remember(_own_entries(module))
            return
    entries = _own_entries(module)
    if getattr(module, "_is_replica", False):
        raise RuntimeError(_REPLICA)
    begin(module, module, entries)


def _layer_exit(module: nn.Module, args: Any, output: Any) -> None:
    if _TRACED in module.__dict__:
        for entry in module.__dict__.pop(_TRACED):
            unshadow(entry)
        return
    if not torch.compiler.is_compiling():
        end(module)


def hook_layer(module: nn.Module) -> None:
    """A wrapped module called outside a round normalises itself."""
    hook(module, _layer_enter, _layer_exit, outermost=False)
    module.__dict__["__prepare_scriptable__"] = refuse_script  # where torch.jit.script asks first
    module.__dict__["_get_name"] = Named(module)


def is_hooked(module: nn.Module) -> bool:
    """Whether the hooks of :func:`hook_layer` are still on."""
    before, after = module._forward_pre_hooks.values(), module._forward_hooks.values()
    return _layer_enter in before and _layer_exit in after


def unhook_layer(module: nn.Module) -> None:
    unhook(module, _layer_enter, _layer_exit)
    module.__dict__.pop("__prepare_scriptable__", None)
    module.__dict__.pop("_get_name", None)


def round_of(root: nn.Module) -> Round:
    """The root's round, made if there is none yet."""
    if ROUND not in root.__dict__:
        root.__dict__[ROUND] = Round(root)
        hook(root, _root_enter, _root_exit, outermost=True)
        root.__dict__["_get_name"] = Named(root)
    return root.__dict__[ROUND]


def drop_round(root: nn.Module) -> None:
    unhook(root, _root_enter, _root_exit)
    root.__dict__.pop(ROUND, None)
    if KEY not in root.__dict__:
        root.__dict__.pop("_get_name", None)


def entries_of(model: nn.Module) -> list[NormalizedWeight]:
    """Every distinct wrapped parameter at or below ``model``, in module order."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    found: dict[int, NormalizedWeight] = {}
    for module in model.modules():
        for entry in module.__dict__.get(KEY, {}).values():
            found.setdefault(id(entry), entry)
    return list(found.values())


@contextlib.contextmanager
def shared_round(model: nn.Module) -> Iterator[None]:
    """Every forward of ``model`` inside shares one W_hat and one power iteration.

    For steps that run a discriminator several times (D(real), D(fake)), also with separate
    backwards, and for methods other than ``forward``. A round made without gradients is replaced
    by the first forward that wants them, and one made before an optimiser step by the next forward.

    Raises ValueError if nothing in ``model`` is normalised.
    """
    entries = entries_of(model)
    if not entries:
        raise ValueError("model: shared_round found no normalised layer in it")
    flat = [e for e in entries if is_flattened(e)]
    if flat:
        raise NotImplementedError(
            f"FullyShardedDataParallel frees {flat[0].label!r} between forwards, so that no round "
            "can be shared; use fully_shard"
        )
    this = model.__dict__.get(ROUND)
    todo, pending = [e for e in entries if e.active is None], []
    if any(is_split(e.weight) for e in todo):
        todo, pending = _units().divide(this or Round(model), todo)
    frame = share(todo, 1 if this is None else this.groups, pending)
    try:
        yield
    finally:
        unshare(frame)
