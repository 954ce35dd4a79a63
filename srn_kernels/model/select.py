"""Which parameters of a model are to be normalised, and with which settings."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from srn_kernels import backends
from srn_kernels.core.arguments import check_dim
from srn_kernels.maths.matrix import state_dtype
from srn_kernels.model import foreign
from srn_kernels.model.attach import normalized_by
from srn_kernels.model.freshness import is_split
from srn_kernels.model.settings import Settings, nearest, split_dim
from srn_kernels.model.weight import KEY, NormalizedWeight, check_weight

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


ATTENTION_OUTPUT = nn.modules.linear.NonDynamicallyQuantizableLinear


Pattern = str | Iterable[str] | Callable[[str, nn.Module], bool] | None


class NormalizedTwiceError(RuntimeError, ValueError):
    """A parameter that is normalised already was to be normalised again (torch raises RuntimeError
    there, and this library's other complaints about arguments are ValueErrors)."""


def _resolve_dim(module: nn.Module, weight: Tensor, dim: int | None, label: str) -> int:
    if dim is None:
        return 1 if isinstance(module, _TRANSPOSED) and weight.dim() > 1 else 0
    return check_dim(dim, weight, f"{label}: dim")


def label_of(prefix: str, name: str) -> str:
    """What a model calls the parameter of one of its modules."""
    return f"{prefix}.{name}" if prefix else name


def prepare_entry(
    module: nn.Module, name: str, label: str, options: Mapping[str, Any]
) -> NormalizedWeight:
    """The entry of one parameter, checked; the module is not touched."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {name!r}")
    if name in module.__dict__.get(KEY, {}):
        raise NormalizedTwiceError(f"{label} of {type(module).__name__} is normalised already")
    if reason := foreign.obstacle(module, name):
        raise ValueError(f"{label} of {type(module).__name__} is {reason}")
    if name not in module._parameters:
        raise ValueError(
            f"name: {type(module).__name__} has no parameter {name!r}; it has "
            f"{sorted(module._parameters)}"
        )
    weight = module._parameters[name]
    check_weight(module, weight, label)
    options, dim = split_dim(options)
    known = Settings(dim=_resolve_dim(module, weight, dim, label), **options)
    for suffix in ("_u", "_v", "_gain") if known.gain else ("_u", "_v"):
        if hasattr(module, name + suffix):
            raise ValueError(f"{type(module).__name__} has an attribute {name + suffix!r} already")
    if is_split(weight):
        from srn_kernels.core import split

        split.check(weight, known, label)
    elif known.preserve == 1:
        check_backend(known, weight, label)
    return NormalizedWeight(module, name, label, known)


def check_backend(known: Settings, weight: Tensor, label: str) -> None:
    """Raises where a backend asked for by name cannot serve this weight, first of all."""
    if known.backend == "auto" or weight.is_meta:
        return
    try:
        backends.resolve(known.backend, weight.device.type, state_dtype(weight.dtype))
    except (RuntimeError, TypeError) as error:
        raise type(error)(f"{label}: {error}") from None


def _weight_names(module: nn.Module) -> list[str]:
    """The parameters of a selected module that are matrices to normalise."""
    if isinstance(module, nn.RNNBase):
        return [n for n in module._parameters if n.startswith("weight_")]
    if isinstance(module, nn.MultiheadAttention):
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        return [n for n in names if module._parameters.get(n) is not None]
    return ["weight"]


def matcher(pattern: Pattern, argument: str) -> tuple[Callable[[str, nn.Module], bool], set[str]]:
    """A predicate over (name, module) and the patterns in it that have matched nothing yet."""
    if callable(pattern):
        return pattern, set()
    if isinstance(pattern, str):
        pattern = [pattern]
    patterns = list(pattern) if isinstance(pattern, Iterable) else [pattern]
    if not all(isinstance(p, str) for p in patterns):
        raise TypeError(f"{argument} must be names, globs or a callable, got {pattern!r}")
    unmatched = set(patterns)

    def matches(name: str, module: nn.Module) -> bool:
        hits = [p for p in patterns if fnmatch.fnmatchcase(name, p)]
        unmatched.difference_update(hits)
        return bool(hits)

    return matches, unmatched


_KEYWORDS = {f.name for f in fields(Settings)}


def _types(layer_types: Sequence[type] | None) -> tuple[type, ...]:
    if layer_types is None:
        return LAYER_TYPES
    if isinstance(layer_types, type) or not isinstance(layer_types, Iterable):
        raise TypeError(
            f"layer_types must be a sequence of classes, got {layer_types!r}; write [nn.Linear]"
        )
    types = tuple(layer_types)
    if not types or not all(isinstance(t, type) for t in types):
        raise TypeError(f"layer_types must be a sequence of classes, got {layer_types!r}")
    return types


def _overrides(
    overrides: Mapping[str, Mapping[str, Any]] | None, options: Mapping[str, Any]
) -> list[tuple[Callable[[str, nn.Module], bool], set[str], str, Mapping[str, Any]]]:
    """(predicate, patterns not matched yet, pattern, options) of each override, checked."""
    if overrides is not None and not isinstance(overrides, Mapping):
        raise TypeError(
            f"overrides must be a mapping {{name: {{keyword: value}}}}, got {overrides!r}"
        )
    special = []
    for pattern, values in (overrides or {}).items():
        if not isinstance(values, Mapping):
            raise TypeError(f"overrides[{pattern!r}] must be a mapping, got {values!r}")
        for key in values:
            if key not in _KEYWORDS:
                raise ValueError(
                    f"overrides[{pattern!r}] has the unknown keyword {key!r}; "
                    f"{nearest(key, _KEYWORDS)}"
                )
        with _naming(f"overrides[{pattern!r}]"):
            Settings(**split_dim({**options, **values})[0])
        special.append((*matcher(pattern, "overrides"), pattern, values))
    return special


@contextlib.contextmanager
def _naming(where: str) -> Iterator[None]:
    """Puts ``where`` in front of what an error about an argument says."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError) as error:
        raise type(error)(f"{where}: {error}") from None


def select(
    model: nn.Module,
    options: Mapping[str, Any],
    *,
    include: Pattern = None,
    exclude: Pattern = None,
    layer_types: Sequence[type] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[list[NormalizedWeight], list[tuple[str, str]]]:
    """The entries that :func:`apply_stable_rank_norm` would add, and what it would skip and why.

    The model is not touched.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    Settings(**split_dim(options)[0])
    types = _types(layer_types)
    included, include_left = matcher("*" if include is None else include, "include")
    excluded, exclude_left = matcher(() if exclude is None else exclude, "exclude")
    special = _overrides(overrides, options)

    entries: dict[int, NormalizedWeight] = {}
    skipped: list[tuple[str, str]] = []
    candidates: list[str] = []
    found = 0
    for prefix, module in model.named_modules():
        if not isinstance(module, types):
            skipped += _of_other_classes(prefix, module)
            continue
        candidates.append(prefix)
        if not included(prefix, module):
            skipped.append((prefix, "not in include"))
            continue
        if excluded(prefix, module):
            skipped.append((prefix, "in exclude"))
            continue
        own = dict(options)
        pattern = None
        for matches, _, glob, values in special:
            if matches(prefix, module):
                own.update(values)
                pattern = glob
        found += 1
        for name in _weight_names(module):
            label = label_of(prefix, name)
            if reason := _why_not(module, name):
                skipped.append((label, reason))
                continue
            weight = module._parameters[name]
            with _naming(f"overrides[{pattern!r}]") if pattern else contextlib.nullcontext():
                entry = prepare_entry(module, name, label, own)
            first = entries.get(id(weight))
            if first is not None:
                if first.settings != entry.settings:
                    raise ValueError(
                        f"{label} and {first.label} are one Parameter but would get different "
                        "settings"
                    )
                first.add_site(module, name)
            elif normalized_by(weight) is not None:
                skipped.append((label, "its Parameter is normalised by another layer"))
            else:
                entries[id(weight)] = entry
    unmatched = {
        "include": include_left,
        "exclude": exclude_left,
        "overrides": set().union(*(left for _, left, *_ in special)),
    }
    listed = ", ".join(repr(name) for name in candidates[:12])
    listed += f" and {len(candidates) - 12} more" if len(candidates) > 12 else ""
    if not candidates or not found:
        raise ValueError(
            f"model: no layer to normalise in {type(model).__name__} "
            f"(include={include!r}, exclude={exclude!r}, {len(candidates)} candidates"
            f"{': ' + listed if candidates else ''})"
        )
    for argument, left in unmatched.items():
        if left and (argument != "include" or include is not None):
            raise ValueError(f"{argument}: nothing matches {sorted(left)}; there are {listed}")
    return list(entries.values()), skipped


def _why_not(module: nn.Module, name: str) -> str | None:
    """Why a parameter of a selected module stays as it is, if it does."""
    if name in module.__dict__.get(KEY, {}):
        return "normalised already"
    if reason := foreign.obstacle(module, name):
        return reason
    if parametrize.is_parametrized(module):
        return "another parameter of its module is parametrized"
    weight = module._parameters.get(name)
    if weight is None:
        return "no Parameter of this name"
    if isinstance(weight, nn.parameter.UninitializedTensorMixin):
        return "lazy: not initialised yet"
    if weight.numel() == 0 and not hasattr(weight, "_fsdp_flattened"):
        return "no elements"
    return None


def _of_other_classes(prefix: str, module: nn.Module) -> list[tuple[str, str]]:
    """Matrices of classes that are not in layer_types, with what there is to say about them."""
    found = {item.name: item for item in foreign.find(module) if item.module is module}
    kind = type(module).__name__
    skipped = []
    for name, weight in module._parameters.items():
        if weight is None or name in module.__dict__.get(KEY, {}):
            continue
        if isinstance(weight, nn.parameter.UninitializedTensorMixin) or weight.dim() < 2:
            continue
        name = name.removesuffix("_orig").removesuffix("_bar")
        reason = f"{kind} is not in layer_types"
        if name in found:
            reason = foreign.obstacle(module, name) or reason
        skipped.append((label_of(prefix, name), reason))
    return skipped
