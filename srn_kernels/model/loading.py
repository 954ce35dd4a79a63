"""state_dict in the formats people have: our own, plain, and the ways to keep spectral norm.

own                      ``weight``, ``weight_u``, ``weight_v``
plain                    ``weight``; u, v converge anew
torch's legacy hook      ``weight_orig``, ``weight_u``, ``weight_v`` (its version 0 has no ``_v``)
public stable_rank hook  the same keys
torch's parametrization  ``parametrizations.weight.original``, and ``_u``, ``_v`` below
                         ``parametrizations.weight.0.``
layer classes            ``weight``; ``u0``, ``sv0`` (BigGAN) or ``sn_u``, ``sn_sigma`` (mimicry)
wrapper modules          ``module.weight_bar``, ``module.weight_u``, ``module.weight_v`` (SAGAN)
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from srn_kernels.maths.matrix import matrix, state_dtype
from srn_kernels.model.freshness import State
from srn_kernels.model.rounds import converge
from srn_kernels.model.weight import KEY, NormalizedWeight


def _move(state_dict: dict[str, Any], old: str, new: str) -> None:
    if old in state_dict:
        state_dict[new] = state_dict.pop(old)


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


def _adopt_own_code(
    state_dict: dict[str, Any], prefix: str, name: str, entry: NormalizedWeight
) -> None:
    """Takes over the keys of layer classes and wrappers that people wrote themselves."""
    key, inner = prefix + name, prefix + "module."
    u = None
    if inner + name + "_bar" in state_dict:
        u = state_dict.pop(inner + name + "_u", None)
        state_dict.pop(inner + name + "_v", None)
        _move(state_dict, inner + name + "_bar", key)
        for old in [k for k in state_dict if k.startswith(inner)]:
            _move(state_dict, old, prefix + old[len(inner) :])
    elif name == "weight":
        for first, rest in (("u0", r"(u|sv)\d+"), ("sn_u", "sn_(u|sigma)")):
            if prefix + first in state_dict:
                u = state_dict[prefix + first]
                pattern = re.compile(re.escape(prefix) + rest)
                for old in [k for k in state_dict if pattern.fullmatch(k)]:
                    del state_dict[old]
    if u is None or key not in state_dict or state_dict[key].is_meta:
        return
    rows = state_dict[key].shape[entry.settings.dim]
    if u.numel() == rows:
        pair = next_pair(state_dict[key], entry.settings.dim, u)
        state_dict[key + "_u"], state_dict[key + "_v"] = pair


def _adopt(state_dict: dict[str, Any], prefix: str, name: str, entry: NormalizedWeight) -> None:
    """Renames one parameter's keys to ours and marks u, v that the checkpoint does not hold."""
    key = prefix + name
    _adopt_own_code(state_dict, prefix, name, entry)
    if key + "_orig" in state_dict:
        state_dict.pop(key, None)  # version 0 also stored the normalised weight
        _move(state_dict, key + "_orig", key)
    container = f"{prefix}parametrizations.{name}."
    if container + "original" in state_dict:
        _move(state_dict, container + "original", key)
        for suffix in ("_u", "_v"):
            _move(state_dict, f"{container}0.{suffix}", key + suffix)
    if key not in state_dict:
        return
    if entry.settings.gain:  # formats without one leave it as it is
        state_dict.setdefault(key + "_gain", entry.gain.detach())
    weight, u = state_dict[key], state_dict.get(key + "_u")
    if u is not None and key + "_v" not in state_dict and not weight.is_meta and weight.dim() > 1:
        # Legacy version 0 kept u alone: v = W^T u / |W^T u|.
        w = matrix(weight, entry.settings.dim).to(state_dtype(weight.dtype))
        if u.shape == (w.shape[0],):
            v = w.T @ u.to(w.dtype)
            state_dict[key + "_v"] = v / v.norm().clamp_min(1e-30)
    if u is not None and u.dim() == 1 and entry.u.dim() == 2:
        # A block that keeps several singular values starts from the one pair there is.
        for suffix, drawn in zip(("_u", "_v"), entry.drawn_state(), strict=True):
            single = state_dict.pop(key + suffix, None)
            if single is not None and single.shape == drawn.shape[:1]:
                drawn[:, :1] = single.unsqueeze(1)
            getattr(entry, suffix[1:]).copy_(drawn)
    complete = key + "_u" in state_dict and key + "_v" in state_dict
    if not complete:
        module, buffer = entry.sites[0][0], entry.sites[0][1]
        for suffix in ("_u", "_v"):
            state_dict.setdefault(key + suffix, module._buffers[buffer + suffix])
    # Between this and the hook after loading: u and v belong to what comes, or to what was there.
    if complete:
        entry.become(State.UNSEEN)
    elif entry.state() is not State.UNSET:
        entry.become(State.STALE)


def _before_loading(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    for name, entry in module.__dict__.get(KEY, {}).items():
        _adopt(state_dict, prefix, name, entry)


def _after_loading(module: nn.Module, incompatible_keys: Any) -> None:
    converging = []
    for entry in module.__dict__.get(KEY, {}).values():
        if entry.weight.is_meta:
            continue
        if entry.state() is State.UNSEEN:
            entry.share_state()
            entry.become(State.FRESH)
        elif entry.state() in (State.STALE, State.UNSET):
            converging.append(entry)
    converge(converging)


def hook_loading(module: nn.Module) -> None:
    if _after_loading not in module._load_state_dict_post_hooks.values():
        module._register_load_state_dict_pre_hook(_before_loading, with_module=True)
        module.register_load_state_dict_post_hook(_after_loading)


def unhook_loading(module: nn.Module) -> None:
    for hooks in (module._load_state_dict_pre_hooks, module._load_state_dict_post_hooks):
        for key in [
            k
            for k, f in hooks.items()
            if getattr(f, "hook", f) in (_before_loading, _after_loading)
        ]:
            del hooks[key]
