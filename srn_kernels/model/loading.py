"""The hooks around load_state_dict of a wrapped layer; the formats are in formats.py."""

from __future__ import annotations

from typing import Any

from torch import nn

from srn_kernels.model import formats
from srn_kernels.model.freshness import State
from srn_kernels.model.rounds import converge
from srn_kernels.model.weight import KEY


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
        formats.adopt(state_dict, prefix, name, entry)


def _after_loading(module: nn.Module, incompatible_keys: Any) -> None:
    converging = []
    for entry in module.__dict__.get(KEY, {}).values():
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
