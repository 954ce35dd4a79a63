"""The interface people call: wrap layers and whole models, look at them, and take it off again.

Beyond 400 lines because every function here is public, with its documentation and an example.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from srn_kernels.core.arguments import check_count
from srn_kernels.model import foreign, root
from srn_kernels.model.attach import attach, bake, normalized_by, refuse_in_use
from srn_kernels.model.rounds import converge, current_weights
from srn_kernels.model.select import (
    ATTENTION_OUTPUT,
    NormalizedTwiceError,
    Pattern,
    label_of,
    prepare_entry,
    select,
)
from srn_kernels.model.settings import Options, check_ratio, takes_options
from srn_kernels.model.undo import unchanged_on_error
from srn_kernels.model.weight import KEY, NormalizedWeight

if TYPE_CHECKING:
    from typing_extensions import Unpack

M = TypeVar("M", bound=nn.Module)  # what goes in comes back, of the same class

_CONTAINERS = (nn.ParameterList, nn.ParameterDict)


@takes_options()
def stable_rank_norm(
    module: M,
    name: str = "weight",
    rank_ratio: float = 0.7,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
    **options: Unpack[Options],
) -> M:
    """Normalises one parameter of one layer (arXiv 1906.04659, Algorithm 2).

    The parameter stays what and where it is; during the layer's forward W_hat, with spectral norm
    1 and stable rank at most r, is seen in its place. The layer gains buffers ``<name>_u`` (rows,)
    and ``<name>_v`` (columns,), float32, or float64 for a float64 weight. It has to be called to be
    normalised: a parent that reads ``child.weight`` without calling the child sees the raw
    Parameter, unless the parent's own forward is a round (:func:`apply_stable_rank_norm`,
    :func:`fuse` or :func:`convert_spectral_norm` on it).

    Args:
        module: the layer; modified in place and returned.
        name: of the parameter.
        rank_ratio: in (0, 1]; r = max(1, rank_ratio * min(rows, columns)); 1: no stable-rank
            constraint at all, that is spectral normalisation.
        n_power_iterations, eps, dim, options: see :class:`srn_kernels.Options`.

    Raises:
        ValueError, TypeError: naming the argument; RuntimeError: a backend that cannot serve, or
            (an error that is a ValueError too) a parameter that is normalised already. The module
            is as it was.

    Example:
        >>> layer = srn.stable_rank_norm(nn.Linear(64, 32), rank_ratio=0.25)
        >>> srn.report(layer)[0].target, list(layer.state_dict())
        (8.0, ['weight', 'bias', 'weight_u', 'weight_v'])
    """
    keywords = {"n_power_iterations": n_power_iterations, "eps": eps, "dim": dim, **options}
    entry = prepare_entry(module, name, str(name), {"rank_ratio": rank_ratio, **keywords})
    if type(module) is ATTENTION_OUTPUT:
        raise ValueError(
            "module: an output projection is read by its MultiheadAttention without being called; "
            "use apply_stable_rank_norm on the attention module or on the model"
        )
    if isinstance(module, _CONTAINERS):
        raise ValueError(
            f"module: a {type(module).__name__} is never called, so that its parameters would stay "
            "raw; give the weight to a layer that uses it in its forward"
        )
    if entry.weight.numel() == 0:
        raise ValueError(f"{name} has no elements")
    if (other := normalized_by(entry.weight)) is not None:
        raise NormalizedTwiceError(
            f"{name} is the Parameter of another normalised layer ({other.label}); wrap tied "
            "layers together with one apply_stable_rank_norm call"
        )
    with unchanged_on_error(module):
        attach(entry)
        converge([entry], provisional=True)
    return module


@takes_options()
def spectral_norm(
    module: M,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
    **options: Unpack[Options],
) -> M:
    """:func:`stable_rank_norm` with rank_ratio 1, and torch's own order of arguments.

    Example:
        >>> layer = srn.spectral_norm(nn.ConvTranspose2d(4, 8, 3))
        >>> layer.weight_u.shape  # rows along dimension 1, as in torch
        torch.Size([8])
    """
    return stable_rank_norm(module, name, 1.0, n_power_iterations, eps, dim, **options)


@takes_options()
def apply_stable_rank_norm(
    model: M,
    rank_ratio: float = 0.7,
    *,
    include: Pattern = None,
    exclude: Pattern = None,
    layer_types: Sequence[type] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    groups: int = 1,
    **options: Unpack[Options],
) -> M:
    """Normalises every layer of a model, one fused round per forward of ``model`` (arXiv
    1906.04659, Algorithm 2).

    Args:
        model: modified in place and returned. Layers that are normalised already stay as they are,
            with the settings they have (:func:`set_rank_ratio` changes the ratio).
        rank_ratio: as in :func:`stable_rank_norm`.
        include, exclude: module names, globs ("blocks.*.conv1"), or a callable
            ``(name, module) -> bool``. A pattern that matches no candidate raises ValueError.
        layer_types: classes in place of Linear, Conv1-3d and ConvTranspose1-3d; recurrent layers,
            Embedding and MultiheadAttention (its input projections) by asking.
        overrides: {name or glob: {keyword: value}} for single layers; later entries win.
        groups: split the round into this many consecutive ones of about the same size, so that
            gradients of the last layers are complete while backward still runs, and
            DistributedDataParallel can send them meanwhile. Eager mode only.
        options: see :class:`srn_kernels.Options`.

    Warns (UserWarning) where something that looks like another spectral norm stays.

    Raises:
        ValueError, TypeError, RuntimeError: naming the argument or layer, also where no layer of
            the model would be normalised by this library; the model is as it was.

    Example:
        >>> D = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Flatten(), nn.Linear(16 * 36, 1))
        >>> D = srn.apply_stable_rank_norm(D, rank_ratio=0.5, overrides={"2": {"rank_ratio": 1.0}})
        >>> [(row.name, row.target) for row in srn.report(D)]
        [('0.weight', 8.0), ('2.weight', inf)]
        >>> D(torch.randn(2, 3, 8, 8)).sum().backward()
        >>> isinstance(D[0].weight, nn.Parameter), D[0].weight.grad.shape
        (True, torch.Size([16, 3, 3, 3]))
    """
    groups = check_count(groups, "groups", 1)
    added, left_out = select(
        model,
        {"rank_ratio": rank_ratio, **options},
        include=include,
        exclude=exclude,
        layer_types=layer_types,
        overrides=overrides,
    )
    if not added and not root.entries_of(model):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out[:8])
        raise ValueError(
            f"model: no layer of {type(model).__name__} would be normalised ({reasons})"
        )
    with changing(model):
        this = root.group_of(model)
        for entry in added:
            attach(entry)
        _hook_readers(model)
        this.add(added)
        this.groups = groups
        note_skipped(model, left_out, {entry.label for entry in added})
        converge(added, provisional=True)
    warn_of_others(model, "apply_stable_rank_norm")
    return model


@contextlib.contextmanager
def changing(model: nn.Module) -> Iterator[None]:
    """The model, its rounds and its entries are as they were where the block raises."""
    rounds = [m.__dict__[root.GROUP] for m in model.modules() if root.GROUP in m.__dict__]
    with unchanged_on_error(model, *rounds, *root.entries_of(model)):
        yield


def note_skipped(model: nn.Module, left_out: list[tuple[str, str]], taken: set[str]) -> None:
    """Keeps what a call left out of the round, in place of what earlier calls said of the same."""
    this = model.__dict__[root.GROUP]
    known = {name for name, _ in left_out} | taken
    this.skipped = [s for s in this.skipped if s[0] not in known] + left_out


def warn_of_others(model: nn.Module, call: str) -> None:
    """One warning a call where something that looks like spectral norm stays."""
    staying = []
    for prefix, module in model.named_modules():
        for item in foreign.find(module):
            inner = f"{prefix}.module" if item.module is not module else prefix
            reason = item.reason or f"a {item.form} that convert_spectral_norm takes over"
            staying.append(f"{inner + '.' if inner else ''}{item.name} ({reason})")
    if staying:
        warnings.warn(
            f"{call}: what looks like another spectral norm stays on {'; '.join(staying[:8])}"
            f"{f'; and {len(staying) - 8} more' if len(staying) > 8 else ''}; see "
            "srn_kernels.skipped(model)",
            UserWarning,
            stacklevel=4,
        )


def _hook_readers(model: nn.Module) -> None:
    """Attention modules read their output projection's weight without calling it."""
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention) and KEY in module.out_proj.__dict__:
            module.__dict__[root.READERS] = [module.out_proj]
            root.hook_layer(module)


def skipped(model: nn.Module) -> list[tuple[str, str]]:
    """(name, reason) of what the last :func:`apply_stable_rank_norm` and
    :func:`convert_spectral_norm` on ``model`` left as it is.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 1))
        >>> srn.skipped(srn.apply_stable_rank_norm(model, exclude=["2"]))
        [('2', 'in exclude')]
    """
    this = model.__dict__.get(root.GROUP)
    return [] if this is None else list(this.skipped)


def fuse(model: M, *, groups: int = 1) -> M:
    """Takes every normalised layer of ``model``, whatever round it was in, into one of ``model``.

    Layers that share a Parameter then share u, v and W_hat. groups: see
    :func:`apply_stable_rank_norm`. Returns the model; ValueError if nothing in it is normalised.

    Example:
        >>> layers = (srn.spectral_norm(nn.Linear(4, n)) for n in (4, 1))
        >>> model = srn.fuse(nn.Sequential(*layers))  # one round a forward
        >>> model(torch.randn(2, 4)).shape
        torch.Size([2, 1])
    """
    groups = check_count(groups, "groups", 1)
    entries = all_entries(model)
    with changing(model):
        merged: dict[int, NormalizedWeight] = {}
        for entry in entries:
            first = merged.setdefault(id(entry.weight), entry)
            if first is not entry:
                _merge(first, entry)
        for module in model.modules():
            if root.GROUP in module.__dict__ and module is not model:
                root.drop_group(module)
        this = root.group_of(model)
        this.entries = []
        this.groups = groups
        this.add(list(merged.values()))
        _hook_readers(model)
    return model


def _merge(first: NormalizedWeight, other: NormalizedWeight) -> None:
    """Makes the sites of ``other``, whose Parameter is that of ``first``, sites of ``first``."""
    root.release(other)
    for module, name in other.sites:
        module.__dict__[KEY][name] = first
        first.add_site(module, name)
    first.share_state()
    for module, name in other.sites:
        module._parameters.pop(name + "_gain", None)
    if first.settings.gain:
        first.set_gain(first.gain)


def _entry(layer: nn.Module, name: str) -> NormalizedWeight:
    if not isinstance(layer, nn.Module):
        raise TypeError(f"layer must be an nn.Module, got {type(layer).__name__}")
    entries = layer.__dict__.get(KEY, {})
    if name not in entries:
        known = f"; normalised: {sorted(entries)}" if entries else ""
        raise ValueError(f"name: {name!r} of {type(layer).__name__} is not normalised{known}")
    return entries[name]


def is_normalized(layer: nn.Module, name: str = "weight") -> bool:
    """Whether a parameter of this layer is normalised when the layer is called: wrapped, still
    there as a Parameter, and with this library's hooks on the layer.

    Example:
        >>> model = srn.apply_stable_rank_norm(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
        >>> srn.is_normalized(model[0]), srn.is_normalized(model[1])
        (True, False)
    """
    if not isinstance(layer, nn.Module):
        raise TypeError(f"layer must be an nn.Module, got {type(layer).__name__}")
    if name not in layer.__dict__.get(KEY, {}):
        return False
    return layer._parameters.get(name) is not None and root.is_hooked(layer)


def normalized_weight(layer: nn.Module, name: str = "weight") -> Tensor:
    """W_hat now, in the weight's shape: differentiable, and no state changes.

    Inside a round it is the round's own W_hat. ValueError if the parameter is not normalised.

    Example:
        >>> layer = srn.spectral_norm(nn.Linear(16, 8))
        >>> bool(torch.linalg.matrix_norm(srn.normalized_weight(layer), 2) < 1.01)
        True
    """
    entry = _entry(layer, name)
    if entry.shadow is not None and name in layer.__dict__:
        return layer.__dict__[name]
    return current_weights([entry])[0]


def set_rank_ratio(model_or_layer: nn.Module, value: float) -> None:
    """Sets rank_ratio of every normalised parameter at or below a module (for schedules).

    An absolute ``stable_rank`` is replaced by the ratio. ValueError if nothing is normalised.

    Example:
        >>> model = srn.apply_stable_rank_norm(nn.Sequential(nn.Linear(64, 64)), rank_ratio=0.9)
        >>> srn.set_rank_ratio(model, 0.5)
        >>> srn.report(model)[0].target
        32.0
    """
    value = check_ratio(value)
    for entry in all_entries(model_or_layer):
        entry.settings = replace(entry.settings, rank_ratio=value, stable_rank=None)


def refresh(model: M, iterations: int = 15) -> M:
    """Converges u and v of every normalised layer anew, by ``iterations`` power iterations (>= 1).

    Needed only after writes through ``.data``, or writes that a compiled forward saw first. Returns
    the model. ValueError, TypeError: wrong iterations, or nothing in it is normalised.

    Example:
        >>> layer = srn.spectral_norm(nn.Linear(16, 8))
        >>> _ = layer(torch.randn(1, 16)).sum().backward()
        >>> _ = layer.weight.data.normal_()  # unseen: u and v are those of the old weight
        >>> _ = srn.refresh(layer)
        >>> bool(torch.linalg.matrix_norm(srn.normalized_weight(layer), 2) < 1.01)
        True
    """
    iterations = check_count(iterations, "iterations", 1)
    converge(all_entries(model), iterations)
    return model


def all_entries(model: nn.Module) -> list[NormalizedWeight]:
    """Every normalised weight in a module; ValueError if there is none, RuntimeError naming a layer
    whose Parameter is no longer there."""
    entries = root.entries_of(model)
    if not entries:
        raise ValueError(f"model: no normalised layer in {type(model).__name__}")
    for entry in entries:
        _ = entry.weight  # raises, naming the layer, where it is no longer there
    return entries


def remove_stable_rank_norm(model_or_layer: M) -> M:
    """Writes the present W_hat into the parameters and takes everything else off again.

    Evaluation output is unchanged; there is no power iteration; Parameters keep their identity.
    Returns the module; ValueError if nothing in it is normalised, or if a Parameter has another
    owner in it that is not normalised and would be changed too (:func:`export` unties those).

    Example:
        >>> model = srn.apply_stable_rank_norm(nn.Sequential(nn.Linear(8, 4)), 0.5).eval()
        >>> x = torch.randn(2, 8)
        >>> before = model(x)
        >>> torch.allclose(srn.remove_stable_rank_norm(model)(x), before, atol=1e-6)
        True
        >>> list(model.state_dict())
        ['0.weight', '0.bias']
    """
    entries = all_entries(model_or_layer)
    for entry, owner in _other_owners(model_or_layer, entries):
        raise ValueError(
            f"{entry.label!r} is the Parameter {owner!r} too, which is not normalised and would "
            "change; untie them first, or use srn_kernels.export(model), which unties its copy"
        )
    bake(entries)
    return _without_rounds(model_or_layer)


def _other_owners(
    model: nn.Module, entries: Sequence[NormalizedWeight]
) -> list[tuple[NormalizedWeight, str]]:
    """(entry, parameter name) wherever a normalised Parameter is used as it is as well."""
    by_weight = {id(e.weight): e for e in entries}
    found = []
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            entry = by_weight.get(id(parameter))
            if entry is not None and not any(m is module and n == name for m, n in entry.sites):
                found.append((entry, label_of(prefix, name)))
    return found


def _without_rounds(model: M) -> M:
    for module in model.modules():
        this = module.__dict__.get(root.GROUP)
        if this is not None and not this.current():
            root.drop_group(module)
        if module.__dict__.pop(root.READERS, None) and KEY not in module.__dict__:
            root.unhook_layer(module)
    return model


def export(model: M) -> M:
    """A plain copy of ``model`` with W_hat as its parameters; the original is left alone.

    Parameters that a module which is not normalised shares are untied in the copy: it keeps the
    raw weight. Conv-bn fusion, opacus, torch.fx, ONNX and TorchScript work on the copy. ValueError
    if nothing in ``model`` is normalised.

    Example:
        >>> model = srn.apply_stable_rank_norm(nn.Sequential(nn.Linear(8, 4)), 0.5).eval()
        >>> plain, x = srn.export(model), torch.randn(2, 8)
        >>> torch.allclose(plain(x), model(x), atol=1e-6), srn.is_normalized(plain[0])
        (True, False)
    """
    refuse_in_use(all_entries(model), "export")
    # What hooks of others (weight_norm) leave in a module is no leaf, and made anew in its forward.
    memo: dict[int, Any] = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in module.__dict__.values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    copied = copy.deepcopy(model, memo)
    entries = root.entries_of(copied)
    shared = {id(e) for e, _ in _other_owners(copied, entries)}
    bake([e for e in entries if id(e) not in shared])
    bake([e for e in entries if id(e) in shared], untie=True)
    return _without_rounds(copied)
