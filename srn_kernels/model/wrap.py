"""The interface people call: wrap layers, whole models, and take it off again."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from srn_kernels.core.arguments import check_count
from srn_kernels.model import loading, root
from srn_kernels.model.freshness import State
from srn_kernels.model.rounds import converge, current_weights
from srn_kernels.model.select import _ATTENTION_OUTPUT, Pattern, _prepare, _wrapped, select
from srn_kernels.model.settings import check_ratio
from srn_kernels.model.weight import KEY, KeepState, NormalizedWeight


def _attach(entry: NormalizedWeight, state: tuple[Tensor, Tensor] | None = None) -> None:
    """Gives every site of a prepared entry its buffers and hooks."""
    entry.set_state(*(state or entry.drawn_state()))
    if state is not None:
        entry.become(State.FRESH)
    if entry.settings.gain:
        entry.set_gain(nn.Parameter(entry.weight.detach().new_ones(1)))
    _wrapped[entry.weight] = True
    for module, name in entry.sites:
        module.__dict__.setdefault(KEY, {})[name] = entry
        module.__dict__.setdefault("_apply", KeepState(module))
        root.hook_layer(module)
        loading.hook_loading(module)


def _detach(entry: NormalizedWeight) -> None:
    """Undoes :func:`_attach`; the raw parameters stay."""
    _wrapped.pop(entry.weight, None)
    for module, name in entry.sites:
        entries = module.__dict__.get(KEY, {})
        entries.pop(name, None)
        for suffix in ("_u", "_v"):
            module._buffers.pop(name + suffix, None)
            module._non_persistent_buffers_set.discard(name + suffix)
        if entry.settings.gain:
            module._parameters.pop(name + "_gain", None)
        if not entries:
            module.__dict__.pop(KEY, None)
            module.__dict__.pop("_apply", None)
            root.unhook_layer(module)
            loading.unhook_loading(module)


def stable_rank_norm(
    module: nn.Module,
    name: str = "weight",
    rank_ratio: float = 0.7,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
    *,
    stable_rank: float | None = None,
    init_iterations: int = 15,
    backend: str = "auto",
    gradient: str = "frozen",
    preserve: int = 1,
    sigma_max: float | None = None,
    grad_through_sigma: bool = True,
    gain: bool = False,
    rule: str = "stable_rank",
) -> nn.Module:
    """Normalises one parameter of one layer (arXiv 1906.04659, Algorithm 2).

    The parameter stays what and where it is; during the layer's forward W_hat, with spectral norm
    1 and stable rank at most r, is seen in its place. The layer gains buffers ``<name>_u`` (rows,)
    and ``<name>_v`` (columns,), float32, or float64 for a float64 weight.

    Args:
        module: the layer; modified in place and returned.
        name: of the parameter.
        rank_ratio: in (0, 1]; r = max(1, rank_ratio * min(rows, columns)); 1: no stable-rank
            constraint at all, that is spectral normalisation.
        n_power_iterations: per training forward.
        eps: |sigma| at or below it passes the weight unchanged.
        dim: the output dimension; None: 1 for transposed convolutions, else 0.
        stable_rank: r itself, >= 1, in place of the ratio.
        init_iterations: power iterations now, and whenever the weight is found replaced.
        backend: "auto", "reference", "cpu", "triton" or "cuda".
        gradient: "frozen" (u and v held constant, as SN does), or "exact" (they turn with the
            weight; differentiable once); the same at rank_ratio 1.
        preserve: k, how many singular values keep their ratio to the largest (Theorem 1; fewer
            where r is too small for k). Above 1 the buffers are blocks, (rows, k) and
            (columns, k), of at most min(rows, columns) vectors. 0: the nearest matrix of stable
            rank r, whose spectral norm exceeds 1. Other values than 1 run in plain PyTorch.
        sigma_max: s, a soft bound in place of spectral norm 1: sigma W_hat / max(1, sigma / s), so
            that a weight with sigma <= s keeps its norm (and at rank_ratio 1 stays as it is).
        grad_through_sigma: whether the gradient goes through the divisor max(1, sigma / s).
        gain: multiplies W_hat by a learnable Parameter ``<name>_gain`` (1,), 1 at first, which the
            layer gains; create the optimiser afterwards.
        rule: the normalisation, "stable_rank" or the name of one that
            :func:`srn_kernels.register_rule` was given, which then says what the options mean.

    Raises:
        ValueError, TypeError: naming the argument; the module is as it was.
    """
    entry = _prepare(
        module,
        name,
        name,
        dim,
        {
            "rank_ratio": rank_ratio,
            "stable_rank": stable_rank,
            "n_power_iterations": n_power_iterations,
            "eps": eps,
            "init_iterations": init_iterations,
            "backend": backend,
            "gradient": gradient,
            "preserve": preserve,
            "sigma_max": sigma_max,
            "grad_through_sigma": grad_through_sigma,
            "gain": gain,
            "rule": rule,
        },
    )
    if type(module) is _ATTENTION_OUTPUT:
        raise ValueError(
            "module: an output projection is read by its MultiheadAttention without being called; "
            "use apply_stable_rank_norm on the attention module or on the model"
        )
    if entry.weight.numel() == 0:
        raise ValueError(f"{name} has no elements")
    if entry.weight in _wrapped:
        raise ValueError(
            f"{name} is the Parameter of another normalised layer; wrap tied layers together with "
            "one apply_stable_rank_norm call"
        )
    _attach(entry)
    converge([entry], provisional=True)
    return module


def spectral_norm(
    module: nn.Module,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
    *,
    stable_rank: float | None = None,
    init_iterations: int = 15,
    backend: str = "auto",
    gradient: str = "frozen",
    preserve: int = 1,
    sigma_max: float | None = None,
    grad_through_sigma: bool = True,
    gain: bool = False,
    rule: str = "stable_rank",
) -> nn.Module:
    """:func:`stable_rank_norm` with rank_ratio 1, and torch's own order of arguments."""
    return stable_rank_norm(
        module,
        name,
        1.0,
        n_power_iterations,
        eps,
        dim,
        stable_rank=stable_rank,
        init_iterations=init_iterations,
        backend=backend,
        gradient=gradient,
        preserve=preserve,
        sigma_max=sigma_max,
        grad_through_sigma=grad_through_sigma,
        gain=gain,
        rule=rule,
    )


def apply_stable_rank_norm(
    model: nn.Module,
    rank_ratio: float = 0.7,
    *,
    include: Pattern = None,
    exclude: Pattern = None,
    layer_types: Sequence[type] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
    stable_rank: float | None = None,
    init_iterations: int = 15,
    backend: str = "auto",
    gradient: str = "frozen",
    preserve: int = 1,
    sigma_max: float | None = None,
    grad_through_sigma: bool = True,
    gain: bool = False,
    rule: str = "stable_rank",
    groups: int = 1,
) -> nn.Module:
    """Normalises every layer of a model, one fused round per forward of ``model``.

    Args:
        model: modified in place and returned. Layers that are normalised already stay as they are.
        rank_ratio, n_power_iterations, eps, dim, stable_rank, init_iterations, backend, gradient,
            preserve, sigma_max, grad_through_sigma, gain, rule: see :func:`stable_rank_norm`.
        include, exclude: module names, globs ("blocks.*.conv1"), or a callable
            ``(name, module) -> bool``. A pattern that matches no candidate raises ValueError.
        layer_types: classes in place of Linear, Conv1-3d and ConvTranspose1-3d; recurrent layers,
            Embedding and MultiheadAttention (its input projections) by asking.
        overrides: {name or glob: {keyword: value}} for single layers; later entries win.
        groups: split the round into this many consecutive ones of about the same size, so that
            gradients of the last layers are complete while backward still runs, and
            DistributedDataParallel can send them meanwhile. Eager mode only.

    Raises:
        ValueError, TypeError: naming the argument or layer; the model is as it was.
    """
    keywords = {
        "rank_ratio": rank_ratio,
        "stable_rank": stable_rank,
        "n_power_iterations": n_power_iterations,
        "eps": eps,
        "init_iterations": init_iterations,
        "backend": backend,
        "gradient": gradient,
        "preserve": preserve,
        "sigma_max": sigma_max,
        "grad_through_sigma": grad_through_sigma,
        "gain": gain,
        "rule": rule,
    }
    check_count(groups, "groups", 1)
    added, skipped = select(
        model,
        keywords,
        dim=dim,
        include=include,
        exclude=exclude,
        layer_types=layer_types,
        overrides=overrides,
    )
    this = root.group_of(model)
    for entry in added:
        _attach(entry)
    _hook_readers(model)
    this.add(added)
    this.groups = groups
    known = {name for name, _ in skipped} | {entry.label for entry in added}
    this.skipped = [s for s in this.skipped if s[0] not in known] + skipped
    converge(added, provisional=True)
    return model


def _hook_readers(model: nn.Module) -> None:
    """Attention modules read their output projection's weight without calling it."""
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention) and KEY in module.out_proj.__dict__:
            module.__dict__[root.READERS] = [module.out_proj]
            root.hook_layer(module)


def skipped(model: nn.Module) -> list[tuple[str, str]]:
    """(name, reason) of every candidate that :func:`apply_stable_rank_norm` left out."""
    this = model.__dict__.get(root.GROUP)
    return [] if this is None else list(this.skipped)


def fuse(model: nn.Module, *, groups: int = 1) -> nn.Module:
    """Takes every normalised layer of ``model``, whatever round it was in, into one of ``model``.

    Layers that share a Parameter then share u, v and W_hat. groups: see
    :func:`apply_stable_rank_norm`. Returns the model; ValueError if nothing in it is normalised.
    """
    check_count(groups, "groups", 1)
    entries = root.entries_of(model)
    if not entries:
        raise ValueError(f"model: no normalised layer in {type(model).__name__}")
    merged: dict[int, NormalizedWeight] = {}
    for entry in entries:
        first = merged.setdefault(id(entry.weight), entry)
        if first is not entry:
            _merge(first, entry)
    for module in model.modules():
        old = module.__dict__.get(root.GROUP)
        if old is not None and module is not model:
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
        first.sites.append((module, name))
    first.layer = None
    first.share_state()
    for module, name in other.sites:
        module._parameters.pop(name + "_gain", None)
    if first.settings.gain:
        first.set_gain(first.gain)


def _entry(layer: nn.Module, name: str) -> NormalizedWeight:
    entries = layer.__dict__.get(KEY, {})
    if name not in entries:
        raise ValueError(f"name: {name!r} of {type(layer).__name__} is not normalised")
    return entries[name]


def is_normalized(layer: nn.Module, name: str = "weight") -> bool:
    """Whether a parameter of this layer is normalised."""
    return name in layer.__dict__.get(KEY, {})


def normalized_weight(layer: nn.Module, name: str = "weight") -> Tensor:
    """W_hat now, in the weight's shape: differentiable, and no state changes.

    Inside a round it is the round's own W_hat. ValueError if the parameter is not normalised.
    """
    entry = _entry(layer, name)
    if entry.shadow is not None and name in layer.__dict__:
        return layer.__dict__[name]
    return current_weights([entry])[0]


def set_rank_ratio(model_or_layer: nn.Module, value: float) -> None:
    """Sets rank_ratio of every normalised parameter at or below a module (for schedules).

    An absolute ``stable_rank`` is replaced by the ratio. ValueError if nothing is normalised.
    """
    check_ratio(value)
    for entry in _all_entries(model_or_layer):
        entry.settings = replace(entry.settings, rank_ratio=value, stable_rank=None)


def refresh(model: nn.Module, iterations: int = 15) -> nn.Module:
    """Converges u and v of every normalised layer anew; needed only after writes through ``.data``
    or writes that a compiled forward saw first. Returns the model."""
    if not isinstance(iterations, int) or isinstance(iterations, bool) or iterations < 1:
        raise ValueError(f"iterations must be an int >= 1, got {iterations!r}")
    converge(_all_entries(model), iterations)
    return model


def _all_entries(model: nn.Module) -> list[NormalizedWeight]:
    entries = root.entries_of(model)
    if not entries:
        raise ValueError(f"model: no normalised layer in {type(model).__name__}")
    return entries


def remove_stable_rank_norm(model_or_layer: nn.Module) -> nn.Module:
    """Writes the present W_hat into the parameters and takes everything else off again.

    Evaluation output is unchanged; there is no power iteration; Parameters keep their identity.
    Returns the module; ValueError if nothing in it is normalised.
    """
    entries = _all_entries(model_or_layer)
    for entry in entries:
        if entry.shadow is not None:
            raise RuntimeError("remove_stable_rank_norm cannot be called inside a forward")
    with torch.no_grad():
        for entry, out in zip(entries, current_weights(entries), strict=True):
            entry.weight.copy_(out)
            root.release(entry)
            _detach(entry)
    for module in model_or_layer.modules():
        this = module.__dict__.get(root.GROUP)
        if this is not None and not this.current():
            root.drop_group(module)
        if module.__dict__.pop(root.READERS, None) and KEY not in module.__dict__:
            root.unhook_layer(module)
    return model_or_layer


def export(model: nn.Module) -> nn.Module:
    """A plain copy of ``model`` with W_hat as its parameters; the original is left alone."""
    return remove_stable_rank_norm(copy.deepcopy(model))
