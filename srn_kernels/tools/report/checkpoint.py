"""The report of a checkpoint, from its file alone, without the model's code.

Every format of :mod:`srn_kernels.model.formats` is recognised by its keys, layer by layer, and read
by the same functions that load it into a model.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from srn_kernels.linalg import top_singular
from srn_kernels.maths.matrix import matrix, state_dtype
from srn_kernels.model.formats import adopt
from srn_kernels.model.freshness import State
from srn_kernels.model.select import prepare_entry
from srn_kernels.model.settings import Settings
from srn_kernels.tools.report.layers import row_of
from srn_kernels.tools.report.table import LayerReport, Report


class _Stored(NamedTuple):
    """One parameter of a checkpoint: where it lies, and in which form."""

    prefix: str  # of its module, with the dot
    name: str
    form: str
    key: str  # of the raw weight


_PARAMETRIZATION, _WRAPPER, _PLAIN = "torch's parametrization", "wrapper module", "plain"
# (keys of raw weights: prefix and name, other keys that must be there, what the form is called)
_FORMS = (
    (r"(?P<p>.*[.:]|)parametrizations\.(?P<n>[^.:]+)\.original", (), _PARAMETRIZATION),
    (r"(?P<p>.*[.:]|)(?P<n>[^.:]+)_orig", ("{n}_u",), "torch's legacy hook or a copy of it"),
    (r"(?P<p>.*[.:]|)(?P<n>[^.:]+)_bar", ("{n}_u",), _WRAPPER),
    (r"(?P<p>.*[.:]|)(?P<n>weight)", ("u0", "sv0"), "BigGAN's layer"),
    (r"(?P<p>.*[.:]|)(?P<n>weight)", ("sn_u",), "mimicry's layer"),
    (r"(?P<p>.*[.:]|)(?P<n>[^.:]+)", ("{n}_u", "{n}_v"), "srn_kernels"),
)
_WEIGHT = re.compile(r"(.*[.:]|)(weight|weight_[hi]h_l\d+(?:_reverse)?|[a-z_]+_proj_weight)")


def stored_layers(state: Mapping[str, Any]) -> tuple[list[_Stored], list[tuple[str, str]]]:
    """The matrices of a state dict with their form, and (key, reason) of what is left out."""
    found: dict[str, _Stored] = {}
    left_out: list[tuple[str, str]] = []
    taken: set[str] = set()
    matrices = [
        k
        for k, x in state.items()
        if isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1 and x.numel()
    ]
    for pattern, beside, form in _FORMS:
        for key in matrices:
            match = re.fullmatch(pattern, key)
            if key in taken or not match:
                continue
            prefix, name = match["p"], match["n"]
            others = [prefix + other.format(n=name) for other in beside]
            if not all(isinstance(state.get(other), Tensor) for other in others):
                continue
            if form == _PARAMETRIZATION:
                container = f"{prefix}parametrizations.{name}."
                own = {f"{container}original", f"{container}0._u", f"{container}0._v"}
                if {k for k in state if k.startswith(container)} != own:
                    continue  # another parametrization; it is left out below
            found[key] = _Stored(prefix, name, form, key)
            # what the form keeps beside the weight is no layer of its own
            ours = re.compile(re.escape(prefix + name) + r"(_orig|_bar|_u|_v|_sigma|_gain)?")
            taken |= {key, *others, *(k for k in state if ours.fullmatch(k))}
    for key in matrices:
        if key in taken:
            continue
        if match := _WEIGHT.fullmatch(key):
            found[key] = _Stored(match[1], match[2], "plain", key)
        elif re.search(r"(^|[.:])parametrizations\.", key):
            left_out.append((key, "parametrized, but not by spectral norm alone"))
        else:
            left_out.append((key, "not named as a weight of a layer"))
    return [found[key] for key in matrices if key in found], left_out


def _dims(weight: Tensor, rows: int | None, columns: int | None) -> list[int]:
    """The output dimensions that go with the sizes of u and v, as far as these are known."""
    fits = [
        dim
        for dim in (0, 1)
        if rows in (None, weight.shape[dim])
        and columns in (None, weight.numel() // weight.shape[dim])
    ]
    return fits if rows is not None or columns is not None else [0]


def _size(state: Mapping[str, Any], *keys: str) -> int | None:
    """How long the first vector of these keys is (a block keeps several, as its columns)."""
    x = next((state[k] for k in keys if isinstance(state.get(k), Tensor)), None)
    if x is None:
        return None
    return x.numel() if x.dim() < 2 or 1 in x.shape else x.shape[0]


def _row(stored: _Stored, state: Mapping[str, Any], options: Mapping[str, Any]) -> LayerReport:
    prefix, name, form, key = stored
    base = prefix + name
    container = f"{prefix}parametrizations.{name}.0."
    us = (base + "_u", container + "_u", prefix + "u0", prefix + "sn_u")
    vs = () if form == _WRAPPER else (base + "_v", container + "_v")
    weight = state[key]
    rows, columns = (None, None) if form == _PLAIN else (_size(state, *us), _size(state, *vs))
    tried = [
        _read(stored, state, dim, options) for dim in _dims(weight, rows, columns)
    ]  # a square matrix fits both ways: its own u, v fit better
    if not tried:
        raise ValueError(f"{key}: its u and v fit no dimension of shape {tuple(weight.shape)}")
    return min(tried, key=lambda found: found[0])[1]


@torch.no_grad()
def _read(
    stored: _Stored, state: Mapping[str, Any], dim: int, options: Mapping[str, Any]
) -> tuple[float, LayerReport]:
    """(how far u, v are from a singular pair, the row), with ``dim`` as the output dimension."""
    prefix, name, form, key = stored
    weight = state[key].detach()
    weight = weight.to(state_dtype(weight.dtype))
    host = nn.Module()
    host.register_parameter(name, nn.Parameter(weight, requires_grad=False))
    label = prefix.removesuffix("module.") + name if form == _WRAPPER else prefix + name
    entry = prepare_entry(host, name, label, {**options, "dim": dim})
    u, v = entry.drawn_state()
    entry.set_state(u, v)
    parts = {k: x for k, x in state.items() if k.startswith(prefix) and "." not in k[len(prefix) :]}
    parts |= {k: x for k, x in state.items() if k.startswith(f"{prefix}parametrizations.{name}.")}
    if form != _PLAIN:
        adopt(parts, prefix, name, entry)
    pair = [parts.get(f"{prefix}{name}{suffix}") for suffix in ("_u", "_v")]
    known = form != _PLAIN and entry.state() is State.UNSEEN
    w = matrix(weight, dim).double()
    top = top_singular(w, 1)
    norm = float(top.S[0])
    notes = [form]
    if known:
        vectors = [x.double().reshape(len(x), -1)[:, 0] for x in pair]  # the first of a block
        lengths = [max(float(x.norm()), 1e-300) for x in vectors]
        if max(abs(n - 1) for n in lengths) > 1e-2:
            notes.append(f"|u| = {lengths[0]:.4g}, |v| = {lengths[1]:.4g}: averaged?")
        u, v = (x / n for x, n in zip(vectors, lengths, strict=True))
        sigma = float(u @ w @ v)
        if norm and abs(sigma / norm - 1) > 1e-2:
            notes.append(f"u, v are not converged: |W|_2 = {norm:.4g}")
    else:
        u, v, sigma = top.U[:, 0], top.V[:, 0], norm
        notes += [] if form == _PLAIN else ["without u, v: |W|_2 in their place"]
        if form == _PLAIN and weight.dim() > 2 and weight.shape[0] != weight.shape[1]:
            notes.append("dimension 0 taken for the output")
    entry.set_state(u.to(weight.dtype), v.to(weight.dtype))
    entry.become(State.FRESH)
    distance = abs(sigma - norm) / norm if norm else 0.0
    return distance, row_of(entry, label, "; ".join(notes))


def report_state(state: Mapping[str, Any], **options: Any) -> Report:
    """One row for each matrix of a state dict, as :func:`srn_kernels.report` has them.

    sigma is u^T W v with the u, v that the next evaluation uses, or |W|_2 where there are none;
    ``rank_ratio`` or ``stable_rank`` say what the target would be (none: spectral norm).

    Raises ValueError if it holds no matrix of a layer, or for a wrong option.
    """
    options = {"rank_ratio": 1.0, **options}
    Settings(**options)
    layers, left_out = stored_layers(state)
    if not layers:
        raise ValueError(
            f"the checkpoint holds no weight of a layer; its keys are {_listed(state)}"
        )
    return Report([_row(layer, state, options) for layer in layers], left_out)


def _listed(names: Mapping[str, Any]) -> str:
    shown = [repr(str(name)) for name in list(names)[:6]]
    return ", ".join(shown) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def load_state(path: Path) -> dict[str, Any]:
    """The tensors of a file, of nested state dicts with the names of their places in front.

    ``.safetensors`` by the package of that name; else torch.load with weights_only=True, which
    runs no code of the file. ValueError where that cannot be, saying what to do.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise ValueError(f"{path}: needs the package safetensors") from None
        try:
            return load_file(path)
        except Exception as error:
            raise ValueError(f"{path}: is no safetensors file ({error})") from None
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        classes = re.findall(r"GLOBAL (\S+)", str(error))
        what = f"holds objects of Python ({classes[0]})" if classes else "cannot be read"
        raise ValueError(
            f"{path}: {what}, and no code of a checkpoint is run here; save model.state_dict() "
            "instead of the whole model"
        ) from None
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path}: is no checkpoint of torch ({error})") from None
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path}: holds a {type(loaded).__name__}, not a state dict")
    return dict(_tensors(loaded))


def _tensors(nested: Mapping[Any, Any], place: str = "") -> Iterator[tuple[str, Tensor]]:
    """Trainers keep state dicts in dicts; those of optimisers go by numbers, and are no layers."""
    holds = any(isinstance(x, Tensor) for x in nested.values())
    for key, value in nested.items():
        if not isinstance(key, str):
            continue
        if isinstance(value, Tensor):
            yield place + key, value
        elif isinstance(value, Mapping) and not holds and not _is_optimizer(value):
            yield from _tensors(value, f"{place}{key}:")


def _is_optimizer(value: Mapping[Any, Any]) -> bool:
    return set(value) >= {"state", "param_groups"}
