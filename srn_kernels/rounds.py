"""Rounds: one fused normalisation of many layers, and where its W_hat lives while a model runs.

A layer keeps its raw Parameter. During a round, and only then, W_hat shadows it in the module's
``__dict__``, which attribute look-up finds before the parameter. A root's forward is a round; a
layer that is called outside any round makes one of its own.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from srn_kernels.autograd import RoundRecord
from srn_kernels.state import (
    KEY,
    NormalizedWeight,
    Owner,
    converge,
    normalize_entries,
    repeat_entry,
)

ROUND = "_srn_round"  # root.__dict__[ROUND]: its Round
READERS = "_srn_reads"  # module.__dict__[READERS]: children whose weights it reads itself

_TRACED = "_srn_traced"  # module.__dict__[_TRACED]: what a traced call of it has to undo
_REPLICA = (
    "nn.DataParallel is not supported: its replicas would run on raw weights; use "
    "DistributedDataParallel"
)

_lock = threading.RLock()


class Activation:
    """W_hat of some entries, installed in their modules until the last user leaves."""

    def __init__(self, root: object, entries: Sequence[NormalizedWeight]) -> None:
        self.root = root
        self.entries = list(entries)
        self.thread = threading.get_ident()
        self.users = 1
        self.iterated = False
        self.shared = False
        self.outs: list[Tensor] = []
        self.versions: list[int] = []

    def install(self, outs: Sequence[Tensor]) -> None:
        self.outs = list(outs)
        self.versions = [_version(e) for e in self.entries]
        for entry, out in zip(self.entries, outs, strict=True):
            entry.active = self
            _shadow(entry, out)

    def lacks_graph(self) -> bool:
        """Whether gradients are wanted now that this W_hat cannot deliver."""
        return torch.is_grad_enabled() and any(
            e.wants_gradient() and not out.requires_grad
            for e, out in zip(self.entries, self.outs, strict=True)
        )

    def outdated(self) -> bool:
        return any(_version(e) != v for e, v in zip(self.entries, self.versions, strict=True))

    def leave(self) -> None:
        self.users -= 1
        if self.users > 0:
            return
        for entry in self.entries:
            if entry.active is self:
                entry.active = None
                _unshadow(entry)


def _version(entry: NormalizedWeight) -> int:
    weight = entry.weight
    if weight.is_inference():
        return -1
    return weight._version + (entry.gain._version if entry.settings.gain else 0)


def _shadow(entry: NormalizedWeight, out: Tensor) -> None:
    for module, name in entry.sites:
        module.__dict__[name] = out
        if isinstance(module, nn.RNNBase):  # recurrent layers read a list, not the attribute
            flat = [getattr(module, n) for n in module._flat_weights_names]
            module.__dict__["_flat_weights"] = flat


def _unshadow(entry: NormalizedWeight) -> None:
    for module, name in entry.sites:
        module.__dict__.pop(name, None)
        if isinstance(module, nn.RNNBase):
            flat = [getattr(module, n, None) for n in module._flat_weights_names]
            module.__dict__["_flat_weights"] = flat


class _Frame:
    """One call that is using W_hat: what it has to give back when it ends."""

    __slots__ = ("held", "root")

    def __init__(self, root: object) -> None:
        self.root = root
        self.held: list[Activation] = []


class _Frames(threading.local):
    def __init__(self) -> None:
        self.stack: list[_Frame] = []


_frames = _Frames()


def _is_running(module: object) -> bool:
    """Whether a call of ``module`` other than the one now starting is on this thread's stack."""
    calls, frame = 0, sys._getframe()
    while frame is not None and calls < 2:
        if frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") is module:
            calls += 1
        frame = frame.f_back
    return calls >= 2


def _discard(activation: Activation) -> None:
    """Clears what a call left behind that an interrupt tore out of its forward."""
    _frames.stack[:] = [f for f in _frames.stack if activation not in f.held]
    activation.users = 1
    activation.leave()


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def begin(root: object, module: nn.Module, entries: Sequence[NormalizedWeight]) -> None:
    """Makes W_hat of ``entries`` visible for a call of ``module``, to be undone by :func:`end`.

    ``root`` stands for the round: a :class:`Round`, or the module of a layer on its own.
    """
    frame = _Frame(root)
    _frames.stack.append(frame)
    me = threading.get_ident()
    with _lock:
        found = {id(e.active): e.active for e in entries if e.active is not None}
        for activation in found.values():
            if activation.thread != me:
                continue
            if activation.root is root and not activation.shared and not _is_running(module):
                _discard(activation)
            elif activation.shared and (activation.lacks_graph() or activation.outdated()):
                _fill(activation)
        others = [a for a in found.values() if a.thread != me and a.users > 0]
        todo = [e for e in entries if e.active is None]
        iterate = _may_iterate(todo or entries)
        if others:
            if iterate or any(a.iterated for a in others):
                raise RuntimeError(
                    "this model is in a training forward in another thread; training one model "
                    "from several threads is not supported (evaluation is)"
                )
            for activation in others:
                if activation.lacks_graph():
                    _fill(activation)  # the same values, now with a graph
                activation.users += 1
                frame.held.append(activation)
        if todo:
            activation = Activation(root, todo)
            _fill(activation)
            frame.held.append(activation)


def end(root: object) -> None:
    """Undoes the latest :func:`begin` of ``root``; the parameters are visible again."""
    stack = _frames.stack
    if not stack or stack[-1].root is not root:
        return  # begin itself was never reached
    frame = stack.pop()
    with _lock:
        for activation in frame.held:
            activation.leave()


def _may_iterate(entries: Sequence[NormalizedWeight]) -> bool:
    """u and v move only where gradients are on and something of the round can train."""
    return (
        torch.is_grad_enabled()
        and any(e.training for e in entries)
        and any(e.trainable() for e in entries)
    )


def _fill(activation: Activation) -> None:
    """Computes the round of an activation and installs its W_hat."""
    entries = activation.entries
    if _in_backward() and all(e.record is not None for e in entries):
        _check_unambiguous(entries)
        activation.install([repeat_entry(e) for e in entries])
        return
    for entry in entries:
        if len(entry.sites) > 1:
            entry.share_state()
    stale = [e for e in entries if e.is_stale()]
    if stale:
        converge(stale)
    iterate = _may_iterate(entries)
    iterations = [e.settings.n_power_iterations if iterate and e.training else 0 for e in entries]
    before = {id(e.record[0]): e.record[0] for e in entries if e.record is not None}
    outs = normalize_entries(entries, iterations)
    for entry, n in zip(entries, iterations, strict=True):
        if n > 0 or entry.parameter is None:
            entry.mark_fresh()
    if torch.is_grad_enabled():
        _remember_waiting(entries, list(before.values()))
    activation.iterated = activation.iterated or any(iterations)
    activation.install(outs)


def _remember_waiting(entries: Sequence[NormalizedWeight], before: Sequence[RoundRecord]) -> None:
    """Links the rounds whose backward is still to come, for as long as their graphs live."""
    waiting = {id(x): x for record in before for x in (record, *record.waiting())}
    links = [weakref.ref(x) for x in waiting.values() if not x.backward_seen]
    for record in {id(e.record[0]): e.record[0] for e in entries}.values():
        record.earlier = links


def _check_unambiguous(entries: Sequence[NormalizedWeight]) -> None:
    """A recomputation (activation checkpointing) must see the W_hat of its own forward."""
    for entry in entries:
        if entry.record[0].waiting():
            raise RuntimeError(
                f"layer {entry.label!r} is computed again in a backward (activation "
                "checkpointing) while several of its forwards wait for one; run those forwards "
                "inside srn_kernels.shared_round(model), so that they share one W_hat"
            )


# --- traced rounds -------------------------------------------------------------------------------
# torch.compile follows these; they write tensors and booleans only.


def _enter_traced(entries: Sequence[NormalizedWeight]) -> list[NormalizedWeight]:
    todo = [e for e in entries if e.sites[0][1] not in e.sites[0][0].__dict__]
    if not todo:
        return todo
    iterate = _may_iterate(todo)
    iterations = [e.settings.n_power_iterations if iterate and e.training else 0 for e in todo]
    outs = normalize_entries(todo, iterations, record=False)
    for entry, out in zip(todo, outs, strict=True):
        entry.parameter = None  # an eager look takes the weight as it then is
        _shadow(entry, out)
    return todo


# --- hooks ---------------------------------------------------------------------------------------
# Plain functions, so that models copy and pickle.


class Round:
    """The layers that one root normalises together."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.owner = Owner()
        self.entries: list[NormalizedWeight] = []
        self.edges: list[tuple[nn.Module, str, nn.Module]] = []
        self.skipped: list[tuple[str, str]] = []
        self.traced: list[NormalizedWeight] = []

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

    def check_structure(self) -> None:
        """Raises if a layer of the round is no longer part of the model."""
        for parent, key, child in self.edges:
            if parent._modules.get(key) is not child:
                raise RuntimeError(
                    f"submodule {key!r} of {type(parent).__name__} was replaced after wrapping; "
                    "call srn_kernels.apply_stable_rank_norm(model) to normalise the new one, or "
                    "srn_kernels.fuse(model) to leave it as it is"
                )


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
    if getattr(root, "_is_replica", False):
        raise RuntimeError(_REPLICA)
    this: Round = root.__dict__[ROUND]
    if torch.compiler.is_compiling():
        this.traced = _enter_traced(this.entries)
        return
    this.check_structure()
    begin(this, root, this.current())


def _root_exit(root: nn.Module, args: Any, output: Any) -> None:
    if torch.compiler.is_compiling():
        this: Round = root.__dict__[ROUND]
        for entry in this.traced:
            _unshadow(entry)
        this.traced = []
        return
    end(root.__dict__[ROUND])


def _own_entries(module: nn.Module) -> list[NormalizedWeight]:
    """What a module reads when it is called: its own weights and those of children it reads."""
    entries = list(module.__dict__.get(KEY, {}).values())
    for child in module.__dict__.get(READERS, ()):
        entries += child.__dict__.get(KEY, {}).values()
    return entries


def _layer_enter(module: nn.Module, args: Any) -> None:
    for entry in module.__dict__.get(KEY, {}).values():
        active = entry.active
        if active is None or active.root is module or active.shared:
            break
        if active.thread != threading.get_ident():
            break
    else:
        if READERS not in module.__dict__:
            return  # inside a round, the usual case
    entries = _own_entries(module)
    if torch.compiler.is_compiling():
        module.__dict__[_TRACED] = _enter_traced(entries)
        return
    if getattr(module, "_is_replica", False):
        raise RuntimeError(_REPLICA)
    begin(module, module, entries)


def _layer_exit(module: nn.Module, args: Any, output: Any) -> None:
    if _TRACED in module.__dict__:
        for entry in module.__dict__.pop(_TRACED):
            _unshadow(entry)
        return
    end(module)


def _hook(module: nn.Module, before: Callable, after: Callable, outermost: bool) -> None:
    if before in module._forward_pre_hooks.values():
        return
    module.register_forward_pre_hook(before, prepend=outermost)
    module.register_forward_hook(after, prepend=not outermost, always_call=True)


def _unhook(module: nn.Module, before: Callable, after: Callable) -> None:
    for hooks, function in (
        (module._forward_pre_hooks, before),
        (module._forward_hooks, after),
    ):
        for key in [k for k, f in hooks.items() if f is function]:
            del hooks[key]
            module._forward_hooks_always_called.pop(key, None)


def hook_layer(module: nn.Module) -> None:
    """A wrapped module called outside a round normalises itself."""
    _hook(module, _layer_enter, _layer_exit, outermost=False)


def unhook_layer(module: nn.Module) -> None:
    _unhook(module, _layer_enter, _layer_exit)


def round_of(root: nn.Module) -> Round:
    """The root's round, made if there is none yet."""
    if ROUND not in root.__dict__:
        root.__dict__[ROUND] = Round(root)
        _hook(root, _root_enter, _root_exit, outermost=True)
    return root.__dict__[ROUND]


def drop_round(root: nn.Module) -> None:
    _unhook(root, _root_enter, _root_exit)
    root.__dict__.pop(ROUND, None)


def entries_of(model: nn.Module) -> list[NormalizedWeight]:
    """Every distinct wrapped parameter at or below ``model``, in module order."""
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
    root = object()
    frame = _Frame(root)
    with _lock:
        todo = [e for e in entries if e.active is None]
        if todo:
            activation = Activation(root, todo)
            activation.shared = True
            _fill(activation)
            frame.held.append(activation)
    try:
        yield
    finally:
        with _lock:
            for activation in frame.held:
                activation.leave()
