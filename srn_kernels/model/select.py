"""Which parameters of a model are to be normalised, and with which settings."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.weak import WeakTensorKeyDictionary

from srn_kernels.model.settings import Settings
from srn_kernels.model.weight import KEY, NormalizedWeight, check_weight, is_split

LAYER_TYPES = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


_ATTENTION_OUTPUT = nn.modules.linear.NonDynamicallyQuantizableLinear


Pattern = str | Iterable[str] | Callable[[str, nn.Module], bool] | None


# Every Parameter that some layer normalises, so that none is wrapped twice under two names.
_wrapped = WeakTensorKeyDictionary()


def _resolve_dim(module: nn.Module, weight: Tensor, dim: int | None, label: str) -> int:
    if dim is None:
        return 1 if isinstance(module, _TRANSPOSED) else 0
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise TypeError(f"dim must be an int or None, got {dim!r}")
    if not -weight.dim() <= dim < weight.dim():
        raise ValueError(f"dim {dim} is no dimension of {label} of shape {tuple(weight.shape)}")
    return dim % weight.dim()


def _label(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _prepare(
    module: nn.Module, name: str, label: str, dim: int | None, keywords: Mapping[str, Any]
) -> NormalizedWeight:
    """The entry of one parameter, checked; the module is not touched."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
    if name in module.__dict__.get(KEY, {}):
        raise ValueError(f"{label} of {type(module).__name__} is normalised already")
    if parametrize.is_parametrized(module, name) or name + "_orig" in module._parameters:
        raise ValueError(
            f"{label} is parametrized already; take torch's spectral norm over with "
            "convert_spectral_norm(model), or remove the parametrization first"
        )
    if name not in module._parameters:
        raise ValueError(
            f"name: {type(module).__name__} has no parameter {name!r}; it has "
            f"{sorted(module._parameters)}"
        )
    weight = module._parameters[name]
    check_weight(module, weight, label)
    settings = Settings(dim=_resolve_dim(module, weight, dim, label), **keywords)
    for suffix in ("_u", "_v", "_gain") if settings.gain else ("_u", "_v"):
        if hasattr(module, name + suffix):
            raise ValueError(f"{type(module).__name__} has an attribute {name + suffix!r} already")
    if is_split(weight):
        from srn_kernels.core import split

        split.check(weight, settings, label)
    return NormalizedWeight(module, name, label, settings)


def _weight_names(module: nn.Module) -> list[str]:
    """The parameters of a selected module that are matrices to normalise."""
    if isinstance(module, nn.RNNBase):
        return [n for n in module._parameters if n.startswith("weight_")]
    if isinstance(module, nn.MultiheadAttention):
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        return [n for n in names if module._parameters.get(n) is not None]
    return ["weight"]


def _matcher(pattern: Pattern, argument: str) -> tuple[Callable[[str, nn.Module], bool], set[str]]:
    """A predicate over (name, module) and the patterns in it that have matched nothing yet."""
    if callable(pattern):
        return pattern, set()
    if isinstance(pattern, str):
        pattern = [pattern]
    patterns = list(pattern)
    if not all(isinstance(p, str) for p in patterns):
        raise TypeError(f"{argument} must be names, globs or a callable, got {pattern!r}")
    unmatched = set(patterns)

    def matches(name: str, module: nn.Module) -> bool:
        hits = [p for p in patterns if fnmatch.fnmatchcase(name, p)]
        unmatched.difference_update(hits)
        return bool(hits)

    return matches, unmatched


_KEYWORDS = {f.name for f in fields(Settings)}


def select(
    model: nn.Module,
    keywords: Mapping[str, Any],
    *,
    dim: int | None,
    include: Pattern,
    exclude: Pattern,
    layer_types: Sequence[type] | None,
    overrides: Mapping[str, Mapping[str, Any]] | None,
) -> tuple[list[NormalizedWeight], list[tuple[str, str]]]:
    """The entries that :func:`apply_stable_rank_norm` would add, and what it would skip and why.

    The model is not touched.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    Settings(**keywords)
    types = LAYER_TYPES if layer_types is None else tuple(layer_types)
    if not types or not all(isinstance(t, type) for t in types):
        raise TypeError(f"layer_types must be a sequence of classes, got {layer_types!r}")
    included, include_left = _matcher("*" if include is None else include, "include")
    excluded, exclude_left = _matcher(() if exclude is None else exclude, "exclude")
    special = []
    for pattern, values in (overrides or {}).items():
        unknown = set(values) - _KEYWORDS
        if unknown:
            raise ValueError(f"overrides[{pattern!r}] has unknown keywords {sorted(unknown)}")
        special.append((*_matcher(pattern, "overrides"), values))

    entries: dict[int, NormalizedWeight] = {}
    skipped: list[tuple[str, str]] = []
    candidates = found = 0
    for prefix, module in model.named_modules():
        if not isinstance(module, types):
            continue
        candidates += 1
        if not included(prefix, module):
            skipped.append((prefix, "not in include"))
            continue
        if excluded(prefix, module):
            skipped.append((prefix, "in exclude"))
            continue
        layer_keywords, layer_dim = dict(keywords), dim
        for matches, _, values in special:
            if matches(prefix, module):
                layer_keywords.update({k: v for k, v in values.items() if k != "dim"})
                layer_dim = values.get("dim", layer_dim)
        found += 1
        if parametrize.is_parametrized(module) or _torch_hooked(module):
            skipped.append((prefix, "parametrized already; see convert_spectral_norm"))
            continue
        for name in _weight_names(module):
            label = _label(prefix, name)
            if name in module.__dict__.get(KEY, {}):
                skipped.append((label, "normalised already"))
                continue
            weight = module._parameters.get(name)
            if weight is None:
                skipped.append((label, "no Parameter of this name (weight_norm?)"))
                continue
            if isinstance(weight, nn.parameter.UninitializedTensorMixin):
                skipped.append((label, "lazy: not initialised yet"))
                continue
            if weight.numel() == 0 and not hasattr(weight, "_fsdp_flattened"):
                skipped.append((label, "no elements"))
                continue
            entry = _prepare(module, name, label, layer_dim, layer_keywords)
            first = entries.get(id(weight))
            if first is not None:
                if first.settings != entry.settings:
                    raise ValueError(
                        f"{label} and {first.label} are one Parameter but would get different "
                        "settings"
                    )
                first.sites.append((module, name))
            elif weight in _wrapped:
                skipped.append((label, "its Parameter is normalised by another layer"))
            else:
                entries[id(weight)] = entry
    unmatched = {
        "include": include_left,
        "exclude": exclude_left,
        "overrides": set().union(*(left for _, left, _ in special)),
    }
    if not candidates or not found:
        raise ValueError(
            f"model: no layer to normalise in {type(model).__name__} "
            f"(include={include!r}, exclude={exclude!r}, {candidates} candidates)"
        )
    for argument, left in unmatched.items():
        if left and (argument != "include" or include is not None):
            raise ValueError(f"{argument}: nothing matches {sorted(left)}")
    return list(entries.values()), skipped


def _torch_hooked(module: nn.Module) -> bool:
    return any(key.endswith("_orig") for key in module._parameters)
