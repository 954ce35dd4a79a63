"""The layers that one root normalises together, and the hooks by which a forward starts a round.

A layer that is called outside any round makes one of its own.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from srn_kernels.model import compiled, hooks, recompute
from srn_kernels.model.begin import begin, called, end, is_shared, share, unshare
from srn_kernels.model.freshness import is_split
from srn_kernels.model.refuse import Named, refuse_script
from srn_kernels.model.weight import KEY, NormalizedWeight, Owner

GROUP = "_srn_group"  # root.__dict__[GROUP]: its Group
HOOKS = "_srn_hooks"  # module.__dict__[HOOKS]: {parameter name: forward pre-hook}
READERS = "_srn_reads"  # module.__dict__[READERS]: children whose weights it reads itself

_REPLICA = (
    "nn.DataParallel is not supported: its replicas would run on raw weights; use "
    "DistributedDataParallel"
)
_FSDP1 = (
    "FullyShardedDataParallel (FSDP1) is not supported: it shows weights that are whole only while "
    "it gathers them; use torch.distributed.fsdp.fully_shard"
)


class Group:
    """The layers that one root normalises together."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.owner = Owner()
        self.entries: list[NormalizedWeight] = []
        self.edges: list[tuple[nn.Module, str, nn.Module]] = []
        self.skipped: list[tuple[str, str]] = []
        self.groups = 1  # consecutive parts, each with a node of its own
        self.units: dict[int, nn.Module] | None = None  # FSDP2's, by id of the module
        self.traced: list[NormalizedWeight] = []

    def current(self) -> list[NormalizedWeight]:
        """The entries that still belong to this group (fuse may have taken some over)."""
        if self.owner.lost:
            self.owner.lost = False
            self.entries = [e for e in self.entries if e.owner is self.owner]
        return self.entries

    def add(self, entries: Sequence[NormalizedWeight]) -> None:
        for entry in entries:
            release(entry)
            entry.owner = self.owner
            for module, _ in entry.sites:
                hook_layer(module)
        self.entries = [*self.current(), *entries]
        self.edges = _edges(self.root, self.entries)

    def is_distributed(self) -> bool:
        """Whether processes hold weights of this group together, now or at an earlier forward."""
        if not (dist.is_available() and dist.is_initialized()):
            return False
        if self.units is None and any(
            "_is_fsdp_managed_module" in e.sites[0][0].__dict__ for e in self.current()
        ):
            fsdp().find_units(self)
        return self.units is not None or any(is_split(e.weight) for e in self.current())

    def check_structure(self) -> None:
        """Raises if a layer of the group is no longer part of the model."""
        for place, (parent, key, child) in enumerate(self.edges):
            present = parent._modules.get(key)
            if present is child:
                continue
            if present is None or all(m is not child for m in present.modules()):
                raise RuntimeError(
                    f"submodule {key!r} of {type(parent).__name__} was replaced after wrapping; "
                    "call srn_kernels.apply_stable_rank_norm(model) to normalise the new one, or "
                    "srn_kernels.fuse(model) to leave it as it is"
                )
            if type(present).__name__ == "FullyShardedDataParallel":
                raise RuntimeError(_FSDP1)
            self.edges[place] = parent, key, present  # wrapped in another module
            self.units = None


def release(entry: NormalizedWeight) -> None:
    """Takes a weight out of the group that it belongs to."""
    if entry.owner is not None:
        entry.owner.lost = True
        entry.owner = None


def fsdp() -> Any:
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


# --- hooks of a root ------------------------------------------------------------------------------
# Plain functions, so that models copy and pickle.


def _root_enter(root: nn.Module, args: Any) -> None:
    if "_is_replica" in root.__dict__:
        raise RuntimeError(_REPLICA)
    group: Group = root.__dict__[GROUP]
    if not torch.compiler.is_compiling():
        if not hooks.is_guarded(root, _root_before):
            _begin_round(group, root)
    elif any(is_split(e.weight) for e in group.entries):
        _begin_untraced(group, root)
    else:
        group.traced = compiled.enter(group.entries)


def _root_exit(root: nn.Module, args: Any, output: Any) -> None:
    group: Group = root.__dict__[GROUP]
    if not torch.compiler.is_compiling():
        end(group)
    elif any(is_split(e.weight) for e in group.entries):
        _end_untraced(group)
    else:
        compiled.leave(group.traced)
        group.traced = []


def _begin_round(group: Group, root: nn.Module) -> None:
    """``root``: what was called, the group's root or a shallow copy of it."""
    group.check_structure()
    if not group.is_distributed():
        begin(group, root, group.current(), group.groups)
        return
    here, pending = fsdp().divide(group, group.current())
    try:
        begin(group, root, here, group.groups).pending = pending
    except BaseException:
        for entry in pending:
            entry.pending = None
        raise


_UNTRACED = "a round over DTensor weights runs eagerly"
_begin_untraced = torch.compiler.disable(_begin_round, reason=_UNTRACED)
_end_untraced = torch.compiler.disable(end, reason=_UNTRACED)


def _root_before(root: nn.Module) -> tuple[nn.Module, bool]:
    """Begins the round of a root's forward."""
    group: Group | None = root.__dict__.get(GROUP)
    if torch.compiler.is_compiling():  # its hooks are traced
        return root, False
    running = root if group is None else called(group)
    if running is not None:
        return running, False
    if _root_enter not in root._forward_pre_hooks.values():
        raise _hooks_gone(f"model {type(root).__name__}")
    _begin_round(group, root)
    return root, True


def _root_after(root: nn.Module) -> None:
    if GROUP in root.__dict__ and not torch.compiler.is_compiling():
        end(root.__dict__[GROUP])


def group_of(root: nn.Module) -> Group:
    """The root's group, made if there is none yet."""
    if GROUP not in root.__dict__:
        root.__dict__[GROUP] = Group(root)
    hooks.hook(root, _root_enter, _root_exit, outermost=True)
    hooks.guard(root, _root_before, _root_after)
    root.__dict__["_get_name"] = Named(root)
    return root.__dict__[GROUP]


def drop_group(root: nn.Module) -> None:
    hooks.unhook(root, _root_enter, _root_exit)
    hooks.unguard(root, _root_before)
    root.__dict__.pop(GROUP, None)
    _unname(root)


# --- hooks of a layer -----------------------------------------------------------------------------


def _own_entries(module: nn.Module) -> list[NormalizedWeight]:
    """What a module reads when it is called: its own weights and those of children it reads."""
    entries = list(module.__dict__.get(KEY, {}).values())
    for child in module.__dict__.get(READERS, ()):
        entries += child.__dict__.get(KEY, {}).values()
    return entries


def _shallow(what: str) -> RuntimeError:
    return RuntimeError(
        f"a shallow copy (copy.copy) of normalised {what} was called, which would run on raw "
        "weights; use copy.deepcopy"
    )


def _is_served(module: nn.Module) -> bool:
    """Whether a call of a layer finds the W_hat of a round around it."""
    for entry in module.__dict__.get(KEY, {}).values():
        shadow = entry.shadow
        if shadow is None or shadow.root is module or (shadow.shared and not is_shared(shadow)):
            return False
        if shadow.thread != threading.get_ident():
            return False
    return READERS not in module.__dict__


def enter_layer(module: nn.Module, args: Any) -> None:
    """The forward pre-hook of a layer: its guard begins and ends, wherever a call comes to it."""
    guard = module.__dict__.get("forward")
    if type(guard) is hooks.Guard and guard.module is module:  # the usual case
        return
    for entry in module.__dict__.get(KEY, {}).values():
        if all(m is not module for m, _ in entry.sites):
            if hasattr(module, "_is_replica"):
                raise RuntimeError(_REPLICA)
            raise _shallow(f"layer {entry.label!r}")
    if hooks.is_guarded(module, _layer_before):
        return
    if torch.compiler.is_compiling():
        raise RuntimeError(
            f"the forward of {type(module).__name__} was replaced after wrapping, which a compiled "
            "layer would not notice; replace it before"
        )
    if not _is_served(module):
        begin(module, module, _own_entries(module))
        module.register_forward_hook(_leave_once, always_call=True)


def _leave_once(module: nn.Module, args: Any, output: Any) -> None:
    hooks.unhook(module, None, _leave_once)
    end(module)


def _layer_before(module: nn.Module) -> tuple[nn.Module, bool]:
    """Begins the round of a layer's own forward, outside any other."""
    if torch.compiler.is_compiling():
        compiled.enter_layer(module, _own_entries(module))
        return module, True
    if _is_served(module):
        if module.training and not torch.is_grad_enabled():
            recompute.note_use(_own_entries(module))
        return module, False
    if called(module) is module:
        return module, False
    entries = _own_entries(module)
    if not is_hooked(module):
        raise _hooks_gone(f"layer {entries[0].label!r}")
    begin(module, module, entries)
    return module, True


def _layer_after(module: nn.Module) -> None:
    if torch.compiler.is_compiling():
        compiled.leave_layer(module)
    else:
        end(module)


def hook_layer(module: nn.Module) -> None:
    """A wrapped module called outside a round normalises itself."""
    for hook in module.__dict__.get(HOOKS, {}).values() or [enter_layer]:
        if hook not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(hook)
    hooks.guard(module, _layer_before, _layer_after)
    module.__dict__["__prepare_scriptable__"] = refuse_script  # where torch.jit.script asks first
    module.__dict__["_get_name"] = Named(module)


def is_hooked(module: nn.Module) -> bool:
    """Whether the hooks of :func:`hook_layer` are still on."""
    ours = module.__dict__.get(HOOKS, {}).values() or [enter_layer]
    return all(hook in module._forward_pre_hooks.values() for hook in ours)


def unhook_layer(module: nn.Module) -> None:
    hooks.unhook(module, enter_layer, None)
    hooks.unguard(module, _layer_before)
    module.__dict__.pop("__prepare_scriptable__", None)
    _unname(module)


def _unname(module: nn.Module) -> None:
    if KEY not in module.__dict__ and GROUP not in module.__dict__:
        module.__dict__.pop("_get_name", None)


def _hooks_gone(what: str) -> RuntimeError:
    return RuntimeError(
        f"the forward hooks that normalise {what} were taken off; put them back with "
        "srn_kernels.fuse(model), or end normalisation with "
        "srn_kernels.remove_stable_rank_norm(model)"
    )


# --- models ---------------------------------------------------------------------------------------


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

    Example:
        >>> D = srn.apply_stable_rank_norm(nn.Sequential(nn.Linear(8, 1)), rank_ratio=1.0)
        >>> real, fake = torch.randn(4, 8), torch.randn(4, 8)
        >>> with srn.shared_round(D):  # one W_hat and one power iteration for both
        ...     loss = D(fake).mean() - D(real).mean()
        >>> loss.backward()
    """
    entries = entries_of(model)
    if not entries:
        raise ValueError("model: shared_round found no normalised layer in it")
    group = model.__dict__.get(GROUP)
    todo, pending = [e for e in entries if e.shadow is None], []
    if any(is_split(e.weight) for e in todo):
        todo, pending = fsdp().divide(group or Group(model), todo)
    lease = share(todo, 1 if group is None else group.groups, pending)
    try:
        yield
    finally:
        unshare(lease)
