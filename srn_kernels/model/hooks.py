"""Forward hooks that are told from everybody else's, and can be taken off again."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def hook(module: nn.Module, before: Callable, after: Callable, outermost: bool) -> None:
    if before in module._forward_pre_hooks.values():
        return
    module.register_forward_pre_hook(before, prepend=outermost)
    module.register_forward_hook(after, prepend=not outermost, always_call=True)


def unhook(module: nn.Module, before: Callable, after: Callable) -> None:
    for hooks, function in (
        (module._forward_pre_hooks, before),
        (module._forward_hooks, after),
    ):
        for key in [k for k, f in hooks.items() if f is function]:
            del hooks[key]
            module._forward_hooks_always_called.pop(key, None)
