"""One record for each format that checkpoints of spectral norm come in, read and written here.

======================== ===========================================================================
plain                    ``weight``; u, v converge anew
own                      ``weight``, ``weight_u``, ``weight_v``
torch's legacy hook      ``weight_orig``, ``weight_u``, ``weight_v``; before version 1 ``weight`` in
                         place of ``weight_v``. Copies with ``coeff`` add ``weight_sigma``
public stable_rank hook  as torch's legacy hook
torch's parametrization  ``parametrizations.weight.original``, ``...weight.0._u``, ``...0._v``
layer classes            ``weight``; ``u0``, ``sv0`` (BigGAN) or ``sn_u``, ``sn_sigma`` (mimicry)
wrapper modules          ``module.weight_bar``, ``module.weight_u``, ``module.weight_v`` (SAGAN),
                         and without ``module.`` where the inner layer has a name of its own too
======================== ===========================================================================
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from srn_kernels.maths.matrix import matrix, state_dtype
from srn_kernels.model.freshness import State
from srn_kernels.model.settings import Settings
from srn_kernels.model.weight import FORM, NormalizedWeight

Keys = dict[str, Any]  # a state dict


@dataclass(frozen=True)
class Origin:
    """What convert_spectral_norm took a parameter from, to write its format again."""

    format: str  # key of FORMATS
    settings: Settings  # what the original code does
    iterations: int = 1  # of code that iterates in evaluation too
    transposed: bool = False  # its u belongs to the columns
    extras: dict[str, torch.Size] = field(default_factory=dict)  # its other buffers' shapes
    places: tuple[tuple[nn.Module, str], ...] = ()  # (parent, key) where a wrapper module was


def origin_of(module: nn.Module, name: str) -> Origin | None:
    return module.__dict__.get(FORM, {}).get(name)


class Written(NamedTuple):
    """One parameter to be written: unit u, v, and sigma = u^T W v, positive or not."""

    name: str
    weight: Tensor
    dim: int
    u: Tensor
    v: Tensor
    sigma: float


class Format(NamedTuple):
    """``read`` renames keys at a prefix to ours; ``write`` gives the keys of a parameter."""

    read: Callable[[Keys, str, str, NormalizedWeight], None]
    write: Callable[[Written, Origin], dict[str, Tensor]]
    general: bool = False  # whether it needs no Origin: any layer of spectral norm can be written


def next_pair(weight: Tensor, dim: int, u: Tensor, iterations: int = 1) -> tuple[Tensor, Tensor]:
    """The u, v that code which keeps u alone uses next: v = W^T u / |W^T u|, u = W v / |W v|."""
    w = matrix(weight.detach(), dim).to(state_dtype(weight.dtype))
    u = u.detach().reshape(-1).to(w)
    for _ in range(iterations):
        v = w.T @ u
        v = v / v.norm().clamp_min(1e-30)
        u = w @ v
        u = u / u.norm().clamp_min(1e-30)
    return u, v


def _move(state: Keys, old: str, new: str) -> None:
    if old in state:
        state[new] = state.pop(old)


def _read_u(state: Keys, key: str, u: Tensor | None, entry: NormalizedWeight) -> None:
    """The pair that code which keeps u alone would use next."""
    if u is None or key not in state or state[key].dim() < 2:
        return
    w, origin = matrix(state[key], entry.settings.dim), origin_of(*entry.sites[0])
    transposed = origin is not None and origin.transposed
    if transposed:
        w = w.T
    if u.numel() != len(w):  # of another layer: they converge anew
        return
    pair = next_pair(w, 0, u, 1 if origin is None else origin.iterations)
    state[key + "_u"], state[key + "_v"] = pair[::-1] if transposed else pair


# --- torch's legacy hook and its copies ----------------------------------------------------------


def _read_hook(state: Keys, prefix: str, name: str, entry: NormalizedWeight) -> None:
    key = prefix + name
    if key + "_orig" not in state:
        return
    used = state.pop(key, None)  # before version 1 the normalised weight in place of v
    _move(state, key + "_orig", key)
    if not hasattr(entry.sites[0][0], name + "_sigma"):
        state.pop(key + "_sigma", None)
    weight, u = state[key], state.get(key + "_u")
    if u is None or key + "_v" in state or weight.is_meta or weight.dim() < 2:
        return
    w = matrix(weight, entry.settings.dim).double()
    if u.shape == (w.shape[0],):
        used = None if used is None else matrix(used, entry.settings.dim).double()
        v = missing_v(w, u.double(), used)
        if v.any():  # a zero weight has none: it is drawn anew
            state[key + "_v"] = v.to(state_dtype(weight.dtype))


def missing_v(w: Tensor, u: Tensor, used: Tensor | None) -> Tensor:
    """The unit v with u = W v / |W v|, which is W^+ u / |W^+ u|; float64; 0 where W^T u = 0.

    ``used``: W / sigma. Where it is known, v has sigma = u^T W v exactly, by the part along W^T u
    that says so.
    """
    if w.shape[0] <= w.shape[1]:  # the smaller of two equal ways
        v = w.T @ (torch.linalg.pinv(w @ w.T, hermitian=True) @ u)
    else:
        v = torch.linalg.pinv(w.T @ w, hermitian=True) @ (w.T @ u)
    v = v / v.norm().clamp_min(1e-300)
    t = w.T @ u
    size = float(t.norm())
    if used is None or size == 0:
        return v
    cosine = float((w * w).sum() / (w * used).sum()) / size
    t = t / size
    rest = v - (t @ v) * t
    if not abs(cosine) < 1 or float(rest.norm()) < 1e-12:
        return t
    return cosine * t + math.sqrt(1 - cosine**2) * rest / rest.norm()


def _write_hook(layer: Written, origin: Origin) -> dict[str, Tensor]:
    name = layer.name
    if layer.weight.dim() < 2:
        raise ValueError("torch's legacy hook takes no vector; use form='parametrization'")
    keys = {name + "_orig": layer.weight, name + "_u": layer.u, name + "_v": layer.v}
    return {**keys, **{k: layer.u.new_full(s, layer.sigma) for k, s in origin.extras.items()}}


# --- torch's parametrization ---------------------------------------------------------------------


def _read_parametrization(state: Keys, prefix: str, name: str, entry: NormalizedWeight) -> None:
    container = f"{prefix}parametrizations.{name}."
    if container + "original" in state:
        _move(state, container + "original", prefix + name)
        for suffix in ("_u", "_v"):
            _move(state, f"{container}0.{suffix}", prefix + name + suffix)


def _write_parametrization(layer: Written, origin: Origin) -> dict[str, Tensor]:
    container = f"parametrizations.{layer.name}."
    keys = {container + "original": layer.weight}
    if layer.weight.dim() > 1:  # torch keeps no u, v for a vector
        keys |= {container + "0._u": layer.u, container + "0._v": layer.v}
    return keys


# --- code of their own, which keeps u alone and iterates in evaluation as well -------------------


CLASS_BUFFERS = {
    "BigGAN": re.compile(r"(u|sv)\d+"),
    "mimicry": re.compile(r"sn_(u|sigma)"),
}


def _read_class(kind: str, first: str) -> Callable[[Keys, str, str, NormalizedWeight], None]:
    def read(state: Keys, prefix: str, name: str, entry: NormalizedWeight) -> None:
        if name != "weight" or prefix + first not in state:
            return
        u = state[prefix + first]
        for key in [k for k in state if k.startswith(prefix)]:
            own = key[len(prefix) :]
            if CLASS_BUFFERS[kind].fullmatch(own):
                del state[key]
        _read_u(state, prefix + name, u, entry)

    return read


def _read_wrapper(state: Keys, prefix: str, name: str, entry: NormalizedWeight) -> None:
    inner = prefix + "module."
    if inner + name + "_bar" in state:
        for old in [k for k in state if k.startswith(inner)]:
            _move(state, old, prefix + old[len(inner) :])
    key = prefix + name
    if key + "_bar" not in state:
        return
    u = state.pop(key + "_u", None)
    state.pop(key + "_v", None)
    _move(state, key + "_bar", key)
    _read_u(state, key, u, entry)


def _first_u(layer: Written, origin: Origin) -> tuple[Tensor, Tensor]:
    """u to start from, and the matrix it multiplies."""
    w = matrix(layer.weight.detach(), layer.dim).double()
    u = layer.u
    if origin.transposed:
        w, u = w.T, layer.v
    return u_before(w, u.double(), layer.sigma, origin.iterations).to(u.dtype), w


def u_before(w: Tensor, u: Tensor, sigma: float, iterations: int) -> Tensor:
    """A unit u from which ``iterations`` steps v = W^T u / |.|, u = W v / |.| give |W v| = sigma.

    u itself gives more, unless it has converged. On the arc between it and one that gives less,
    |W v|^2 |W^T u|^2 is a quadratic in both; so the arc is crossed where that is sigma^2.
    w: (rows, columns), u: (rows,), float64. ValueError if sigma is not positive, or too small.
    """
    if not sigma > 0:
        raise ValueError("sigma is not positive, as that code's is; call refresh(model) first")

    def excess(x: Tensor) -> Tensor:  # (k, k): zero where |W v| = sigma
        for _ in range(iterations - 1):
            x = w @ (w.T @ x)
            x = x / x.norm()
        t = w.T @ x
        s = w @ t
        return (s.T @ s - sigma**2 * (t.T @ t)) / sigma**2 / t.square().sum()

    a = (u / u.norm()).unsqueeze(1)
    if float(excess(a)) <= 1e-9:
        return a[:, 0]
    top = a
    for _ in range(30):
        top = w @ (w.T @ top)
        top = top / top.norm()
    largest = float((w.T @ top).square().sum())
    b = a
    for _ in range(2000):
        b = b - w @ (w.T @ b) / largest
        b = b / b.norm()
        if float(excess(b)) < 0:
            form = excess(torch.cat([a, b], 1))
            start, middle, end = (float(form[i]) for i in ((0, 0), (0, 1), (1, 1)))
            root = math.sqrt(middle**2 - start * end)
            x = start / (-middle + math.copysign(root, -middle))  # the root nearer to u
            a = a + x * b
            return (a / a.norm())[:, 0]
    raise ValueError("sigma is below what that code can reach; call refresh(model) first")


def _write_class(layer: Written, origin: Origin) -> dict[str, Tensor]:
    u, w = _first_u(layer, origin)
    keys, basis = {layer.name: layer.weight}, u.double().unsqueeze(1)
    for buffer in sorted(origin.extras, key=lambda name: (name[0] == "s", len(name), name)):
        shape = origin.extras[buffer]
        if buffer in ("u0", "sn_u"):
            keys[buffer] = u.reshape(shape)
        elif buffer in ("sv0", "sn_sigma"):
            keys[buffer] = u.new_full(shape, layer.sigma)
        elif buffer.startswith("u"):  # u1, u2 ... and after them sv1, sv2 ...: only looked at
            other = w @ (w.T @ torch.ones_like(basis[:, :1]))
            other = other - basis @ (basis.T @ other)
            other = other / other.norm().clamp_min(1e-300)
            basis = torch.cat([basis, other], 1)
            keys[buffer] = other.to(u.dtype).reshape(shape)
        else:
            size = (w.T @ basis[:, int(buffer[2:])]).norm()
            keys[buffer] = u.new_full(shape, float(size))
    return keys


def _write_wrapper(layer: Written, origin: Origin) -> dict[str, Tensor]:
    name = layer.name
    return {
        name + "_bar": layer.weight,
        name + "_u": _first_u(layer, origin)[0],
        name + "_v": layer.v,
    }


FORMATS = {
    "wrapper": Format(_read_wrapper, _write_wrapper),
    "BigGAN": Format(_read_class("BigGAN", "u0"), _write_class),
    "mimicry": Format(_read_class("mimicry", "sn_u"), _write_class),
    "legacy": Format(_read_hook, _write_hook, general=True),
    "parametrization": Format(_read_parametrization, _write_parametrization, general=True),
}


def adopt(state: Keys, prefix: str, name: str, entry: NormalizedWeight) -> None:
    """Renames one parameter's keys to ours, and marks u, v that the checkpoint does not hold."""
    key = prefix + name
    for form in FORMATS.values():
        form.read(state, prefix, name, entry)
    if key not in state:
        return
    if entry.settings.gain:  # formats without one leave it as it is
        state.setdefault(key + "_gain", entry.gain.detach())
    u = state.get(key + "_u")
    if u is not None and u.dim() == 1 and entry.u.dim() == 2:
        # A block that keeps several singular values starts from the one pair there is.
        for suffix, drawn in zip(("_u", "_v"), entry.drawn_state(), strict=True):
            single = state.pop(key + suffix, None)
            if single is not None and single.shape == drawn.shape[:1]:
                drawn[:, 0] = single
            getattr(entry, suffix[1:]).copy_(drawn)
    complete = key + "_u" in state and key + "_v" in state
    if not complete:
        module, buffer = entry.sites[0]
        for suffix in ("_u", "_v"):
            old = module._buffers[buffer + suffix]
            if old.is_meta:  # assign=True brings numbers to a model that was made without
                old = torch.empty_like(old, device=state[key].device)
            state.setdefault(key + suffix, old)
    # Between this and the hook after loading: u and v belong to what comes, or to what was there.
    if complete:
        entry.become(State.UNSEEN)
    elif entry.u.is_meta or entry.state() in (State.UNSET, State.NEW):
        entry.become(State.UNSET)
    else:
        entry.become(State.STALE)
