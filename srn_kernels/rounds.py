"""Rounds: one fused normalisation of many layers, and where its W_hat lives while a model runs.

A layer keeps its raw Parameter. During a round, and only then, W_hat shadows it in the module's
``__dict__``, which attribute look-up finds before the parameter. A root's forward is a round; a
layer that is called outside any round makes one of its own.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from srn_kernels.autograd import RoundRecord, refuse_batched
from srn_kernels.state import (
    KEY,
    NormalizedWeight,
    Owner,
    converge,
    is_flattened,
    is_split,
    measure_entries,
    normalize_entries,
    repeat_entries,
)

ROUND = "_srn_round"  # root.__dict__[ROUND]: its Round
READERS = "_srn_reads"  # module.__dict__[READERS]: children whose weights it reads itself

_UNIT = "_srn_unit"  # module.__dict__[_UNIT]: its _Unit
_ROUNDS = "_srn_rounds"  # ctx.__dict__[_ROUNDS]: {id(entry): its record} of a checkpoint
_TRACED = "_srn_traced"  # module.__dict__[_TRACED]: what a traced call of it has to undo
_REPLICA = (
    "nn.DataParallel is not supported: its replicas would run on raw weights; use "
    "DistributedDataParallel"
)

_TRACING = (
    "torch.jit.trace cannot record a normalised model; trace srn_kernels.export(model), a plain "
    "copy with the same output"
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
        self.groups = root.groups if isinstance(root, Round) else 1
        self.outs: list[Tensor] = []
        self.versions: list[int] = []

    def install(self, outs: Sequence[Tensor]) -> None:
        self.outs = list(outs)
        self.versions = [e.written() for e in self.entries] if self.shared else []
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
        return any(e.written() != v for e, v in zip(self.entries, self.versions, strict=True))

    def leave(self) -> None:
        self.users -= 1
        if self.users > 0:
            return
        for entry in self.entries:
            if entry.active is self:
                entry.active = None
                _unshadow(entry)


def _shadow(entry: NormalizedWeight, out: Tensor) -> None:
    entry.shadowed = True
    module, name = entry.sites[0]
    if name not in module._parameters and entry.covered is None:  # FSDP1
        entry.covered = module.__dict__[name]
    for module, name in entry.sites:
        module.__dict__[name] = out
        if isinstance(module, nn.RNNBase):  # recurrent layers read a list, not the attribute
            flat = [getattr(module, n) for n in module._flat_weights_names]
            module.__dict__["_flat_weights"] = flat


def _unshadow(entry: NormalizedWeight) -> None:
    entry.shadowed = False
    for module, name in entry.sites:
        module.__dict__.pop(name, None)
        if entry.covered is not None:
            module.__dict__[name] = entry.covered
        if isinstance(module, nn.RNNBase):
            flat = [getattr(module, n, None) for n in module._flat_weights_names]
            module.__dict__["_flat_weights"] = flat
    entry.covered = None


class _Frame:
    """One call that is using W_hat: what it has to give back when it ends."""

    __slots__ = ("held", "pending", "root")

    def __init__(self, root: object) -> None:
        self.root = root
        self.held: list[Activation] = []
        self.pending: Sequence[NormalizedWeight] = ()

    def close(self) -> None:
        for activation in self.held:
            activation.leave()
        for entry in self.pending:
            entry.pending = None


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


def begin(root: object, module: nn.Module, entries: Sequence[NormalizedWeight]) -> _Frame:
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
        if others:
            # A backward may recompute in a thread of its own what a shared round computed.
            recomputing = _in_backward() and all(a.shared for a in others)
            iterate = _may_iterate(todo or entries) or any(a.iterated for a in others)
            if iterate and not recomputing:
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
        _remember(entries)
    return frame


def end(root: object) -> None:
    """Undoes the latest :func:`begin` of ``root``; the parameters are visible again."""
    stack = _frames.stack
    if not stack or stack[-1].root is not root:
        return  # begin itself was never reached
    frame = stack.pop()
    with _lock:
        frame.close()


def _may_iterate(entries: Sequence[NormalizedWeight]) -> bool:
    """u and v move only where gradients are on and something of the round can train."""
    return (
        any(e.training for e in entries)
        and (torch.is_grad_enabled() or bool(_checkpoints()))
        and any(e.trainable() for e in entries)
    )


# --- reentrant checkpoints -----------------------------------------------------------------------
# torch.utils.checkpoint(use_reentrant=True), and others of its kind, are autograd Functions that
# run the model without gradients in their forward and once more, with them, in their backward. The
# one thing that both calls have in common is the Function's context.


def _checkpoints() -> list[Any]:
    """Contexts of the Functions around this call whose backward will come, innermost first."""
    if torch.compiler.is_compiling():
        return []
    found, frame = [], sys._getframe()
    while frame is not None:
        code = frame.f_code
        if code.co_argcount and code.co_varnames[0] == "ctx":
            ctx = frame.f_locals["ctx"]
            # without gradients around the whole Function there are no edges
            if isinstance(ctx, torch.autograd.function.FunctionCtx) and ctx.next_functions:
                found.append(ctx)
        frame = frame.f_back
    return found


def _remember(entries: Sequence[NormalizedWeight]) -> None:
    """Ties the rounds in use to the checkpoint that runs now, for its backward."""
    if torch.is_grad_enabled():
        return
    checkpoints = _checkpoints()
    if checkpoints and any(e.training for e in entries):
        rounds = checkpoints[0].__dict__.setdefault(_ROUNDS, {})
        rounds.update({id(e): e.record for e in entries if e.record is not None})


def _remembered(entries: Sequence[NormalizedWeight]) -> list[tuple[RoundRecord, int]] | None:
    """The rounds that a recomputation of ``entries`` has to repeat."""
    for ctx in _checkpoints():
        known = ctx.__dict__.get(_ROUNDS, {})
        if all(id(e) in known for e in entries):
            return [known[id(e)] for e in entries]
    if all(e.record is not None for e in entries):
        _check_unambiguous(entries)
        return [e.record for e in entries]
    return None


def _fill(activation: Activation) -> None:
    """Computes the round of an activation and installs its W_hat."""
    entries = activation.entries
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError(_TRACING)
    refuse_batched([e.weight for e in entries])
    if _in_backward():
        records = _remembered(entries)
        if records is not None:
            activation.install(repeat_entries(entries, records))
            return
    if all(e.pending is not None for e in entries):  # measured on shards, and gathered now
        activation.install(repeat_entries(entries, [e.pending for e in entries]))
        return
    for entry in entries:
        if len(entry.sites) > 1:
            entry.share_state()
    iterations = _prepare(entries)
    before = {id(e.record[0]): e.record[0] for e in entries if e.record is not None}
    if activation.groups == 1:
        outs = normalize_entries(entries, iterations)
    else:
        outs = []
        for part in _consecutive(entries, activation.groups):
            outs += normalize_entries(entries[part], iterations[part], early=True)
    _moved(entries, iterations)
    if torch.is_grad_enabled():
        _remember_waiting(entries, list(before.values()))
    activation.iterated = activation.iterated or any(iterations)
    activation.install(outs)


def _prepare(entries: Sequence[NormalizedWeight]) -> list[int]:
    """The iterations a round of ``entries`` makes, after stale u and v have converged."""
    # A draw and looks at numbers are not for torch.func's transforms.
    eager = torch._C._functorch.peek_interpreter_stack() is None
    stale = [e for e in entries if (e.is_stale() if eager else e.is_written())]
    if stale:
        converge(stale)
    iterate = _may_iterate(entries)
    return [e.settings.n_power_iterations if iterate and e.training else 0 for e in entries]


def _moved(entries: Sequence[NormalizedWeight], iterations: Sequence[int]) -> None:
    for entry, n in zip(entries, iterations, strict=True):
        if n > 0 or entry.parameter is None:
            entry.mark_fresh()
        if n > 0:
            entry.provisional = None


def _measure(entries: Sequence[NormalizedWeight]) -> None:
    """A round of shards: all but W_hat, which each FSDP2 unit makes when it has gathered."""
    iterations = _prepare(entries)
    before = {id(e.record[0]): e.record[0] for e in entries if e.record is not None}
    record = measure_entries(entries, iterations)
    record.iterated = any(iterations)
    record.written = [e.written() for e in entries]
    for place, entry in enumerate(entries):
        entry.record = entry.pending = (record, place)
    _moved(entries, iterations)
    if torch.is_grad_enabled():
        _remember_waiting(entries, list(before.values()))


def _measured(entries: Sequence[NormalizedWeight]) -> bool:
    """Whether a round around this one has measured them, and its numbers still serve."""
    if any(e.pending is None for e in entries):
        return False
    record = entries[0].pending[0]
    moves = record.iterated or not (_may_iterate(entries) and any(e.training for e in entries))
    return moves and record.written == [e.written() for e in record.layers]


def _consecutive(entries: Sequence[NormalizedWeight], n: int) -> list[slice]:
    """At most ``n`` runs of entries with about the same number of elements each."""
    sizes = [e.weight.numel() for e in entries]
    ends = list(itertools.accumulate(sizes))
    # entry i goes where its middle lies
    parts = [int(n * (end - size / 2) / ends[-1]) for end, size in zip(ends, sizes, strict=True)]
    starts = [i for i in range(len(parts)) if i == 0 or parts[i] != parts[i - 1]]
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(parts)], strict=True)]


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
    # dynamo guards this attribute, but not what a module's __dict__ holds
    todo = [e for e in entries if not e.shadowed]
    if not todo:
        return todo
    iterate = _may_iterate(todo)
    iterations = [e.settings.n_power_iterations if iterate and e.training else 0 for e in todo]
    outs = normalize_entries(todo, iterations, record=False)
    for entry, out in zip(todo, outs, strict=True):
        entry.parameter = None  # an eager look takes the weight as it then is
        entry.provisional = None
        entry.born = None
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
        self.groups = 1  # consecutive parts, each with a node of its own
        self.units: dict[int, nn.Module] | None = None  # FSDP2's, by id of the module
        self.flattened: set[int] = set()  # id of modules whose weights FSDP1 gathers
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

    def is_distributed(self) -> bool:
        """Whether processes hold weights of this round together, now or at an earlier forward."""
        if not (dist.is_available() and dist.is_initialized()):
            return False
        return self.units is not None or any(is_split(e.weight) for e in self.current())

    def distributed(
        self, entries: Sequence[NormalizedWeight] | None = None
    ) -> tuple[list[NormalizedWeight], list[NormalizedWeight]]:
        """The entries whose weights are here, and those that FSDP2 has yet to gather.

        Those are measured, and each unit makes W_hat when it has gathered them; layers in units of
        FSDP1, and those that keep several singular values, normalise themselves.
        """
        if entries is None:
            entries = self.current()
        if self.units is None:
            self.look_for_units()
        here, shards = [], []
        for entry in entries:
            module = entry.sites[0][0]
            if id(module) in self.flattened:
                continue
            unit = self.units.get(id(module))
            entry.managed = entry.managed or unit is not None
            if unit is not None and is_split(entry.weight) and entry.settings.preserve != 1:
                continue  # what is summed over processes does not tell several singular values
            (here if unit is None or not is_split(entry.weight) else shards).append(entry)
        if not shards or _measured(shards):
            return here, []
        _measure(shards)
        return here, shards

    def look_for_units(self) -> None:
        from srn_kernels import sharded  # torch.distributed only where it is in use

        self.flattened = sharded.flattened(self.root)
        self.units = sharded.fsdp_units(self.root)
        members: dict[nn.Module, list[NormalizedWeight]] = {}
        for entry in self.current():
            unit = self.units.get(id(entry.sites[0][0]))
            if unit is not None:
                members.setdefault(unit, []).append(entry)
        for unit, entries in members.items():
            unit.__dict__[_UNIT] = _Unit(entries)
            # after FSDP's own hook, which gathers
            _hook(unit, _unit_enter, _unit_exit, outermost=False)

    def check_structure(self) -> None:
        """Raises if a layer of the round is no longer part of the model."""
        for place, (parent, key, child) in enumerate(self.edges):
            present = parent._modules.get(key)
            if present is not child:
                if present is not None and any(m is child for m in present.modules()):
                    self.edges[place] = parent, key, present  # wrapped in another module
                    self.units = None
                    if type(present).__name__ == "FullyShardedDataParallel":
                        self.look_for_units()
                    continue
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
            _unshadow(entry)
        this.traced = []


def _begin_round(this: Round) -> None:
    this.check_structure()
    if not this.is_distributed():
        begin(this, this.root, this.current())
        return
    here, pending = this.distributed()
    try:
        begin(this, this.root, here).pending = pending
    except BaseException:
        for entry in pending:
            entry.pending = None
        raise


_UNTRACED = "a round over DTensor weights runs eagerly"
_begin_untraced = torch.compiler.disable(_begin_round, reason=_UNTRACED)
_end_untraced = torch.compiler.disable(end, reason=_UNTRACED)


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
                _remember(_own_entries(module))
            return
    entries = _own_entries(module)
    if getattr(module, "_is_replica", False):
        raise RuntimeError(_REPLICA)
    begin(module, module, entries)


def _layer_exit(module: nn.Module, args: Any, output: Any) -> None:
    if _TRACED in module.__dict__:
        for entry in module.__dict__.pop(_TRACED):
            _unshadow(entry)
        return
    if not torch.compiler.is_compiling():
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


def _refuse_script() -> None:
    raise RuntimeError(
        "torch.jit.script cannot compile a normalised model; script srn_kernels.export(model), a "
        "plain copy with the same output"
    )


def hook_layer(module: nn.Module) -> None:
    """A wrapped module called outside a round normalises itself."""
    _hook(module, _layer_enter, _layer_exit, outermost=False)
    module.__dict__["__prepare_scriptable__"] = _refuse_script  # where torch.jit.script asks first


def unhook_layer(module: nn.Module) -> None:
    _unhook(module, _layer_enter, _layer_exit)
    module.__dict__.pop("__prepare_scriptable__", None)


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
    flat = [e for e in entries if is_flattened(e)]
    if flat:
        raise NotImplementedError(
            f"FullyShardedDataParallel frees {flat[0].label!r} between forwards, so that no round "
            "can be shared; use fully_shard"
        )
    root = object()
    frame = _Frame(root)
    with _lock:
        todo = [e for e in entries if e.active is None]
        if any(is_split(e.weight) for e in todo):
            here, frame.pending = (model.__dict__.get(ROUND) or Round(model)).distributed(todo)
            todo = [e for e in todo if any(e is h for h in here)]
        if todo:
            activation = Activation(root, todo)
            activation.shared = True
            this = model.__dict__.get(ROUND)
            activation.groups = 1 if this is None else this.groups
            _fill(activation)
            frame.held.append(activation)
    try:
        yield
    finally:
        with _lock:
            frame.close()
