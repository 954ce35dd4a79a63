"""state_dict in the formats people have: our own, plain, and three ways to keep spectral norm.

own                      ``weight``, ``weight_u``, ``weight_v``
plain                    ``weight``; u, v converge anew
torch's legacy hook      ``weight_orig``, ``weight_u``, ``weight_v`` (its version 0 has no ``_v``)
public stable_rank hook  the same keys
torch's parametrization  ``parametrizations.weight.original``, and ``_u``, ``_v`` below
                         ``parametrizations.weight.0.``
"""

from __future__ import annotations

from typing import Any

from torch import nn

from srn_kernels.reference import matrix, state_dtype
from srn_kernels.state import KEY, NormalizedWeight, converge


def _move(state_dict: dict[str, Any], old: str, new: str) -> None:
    if old in state_dict:
        state_dict[new] = state_dict.pop(old)


def _adopt(state_dict: dict[str, Any], prefix: str, name: str, entry: NormalizedWeight) -> None:
    """Renames one parameter's keys to ours and marks u, v that the checkpoint does not hold."""
    key = prefix + name
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
                drawn[:, 0] = single
            getattr(entry, suffix[1:]).copy_(drawn)
    complete = key + "_u" in state_dict and key + "_v" in state_dict
    if not complete:
        for suffix, present in (("_u", entry.u), ("_v", entry.v)):
            state_dict.setdefault(key + suffix, present)
    entry.loading = "kept" if complete else "converge"


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
    entries = module.__dict__.get(KEY, {}).values()
    converging = []
    for entry in entries:
        loading, entry.loading = entry.loading, None
        if loading is None or entry.weight.is_meta:
            continue
        if loading == "kept":
            entry.share_state()
            entry.mark_fresh()
        else:
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
