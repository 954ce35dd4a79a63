"""Hooks around a module's forward that are told from everybody else's, and can be taken off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def hook(module: nn.Module, before: Callable, after: Callable, outermost: bool) -> None:
    if before not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(before, prepend=outermost)
    if after not in module._forward_hooks.values():
        module.register_forward_hook(after, prepend=not outermost, always_call=True)


def unhook(module: nn.Module, before: Callable | None, after: Callable | None) -> None:
    for hooks, function in (
        (module._forward_pre_hooks, before),
        (module._forward_hooks, after),
    ):
        for key in [k for k, f in hooks.items() if f is function]:
            del hooks[key]
            module._forward_hooks_always_called.pop(key, None)


class Guard:
    """A module's ``forward`` with a beginning and an end, whatever happens in between.

    torch calls no hook after a BaseException that is no Exception (KeyboardInterrupt), nor around
    ``module.forward(...)``; hooks begin and end only where somebody has replaced ``forward``.
    ``before`` and ``after`` are module-level functions of the module, so that models copy and
    pickle. ``before`` begins what is not begun yet; it returns the module that was called, which
    for a shallow copy of a root is not the guarded one, and whether it began.
    """

    def __init__(self, module: nn.Module, before: Callable, after: Callable) -> None:
        self.module = module
        self.before, self.after = before, after
        self.inner = module.__dict__.get("forward")

    @property
    def __wrapped__(self) -> Callable:
        """The forward inside, for its signature."""
        return self.inner or type(self.module).forward.__get__(self.module)

    @property
    def __code__(self) -> Any:
        return self.__wrapped__.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = self.inner
        module, alone = self.before(self.module)
        if forward is None:
            forward, args = type(module).forward, (module, *args)
        if torch.compiler.is_compiling():
            result = forward(*args, **kwargs)
            self.after(module)
            return result
        try:
            return forward(*args, **kwargs)
        except Exception:
            raise
        except BaseException:
            if not alone:
                self.after(module)
            raise
        finally:
            if alone:
                self.after(module)


def guard(module: nn.Module, before: Callable, after: Callable) -> None:
    """Puts a :class:`Guard` around a module's forward, unless one of this kind is there."""
    known = module.__dict__.get("forward")
    while isinstance(known, Guard):
        if known.before is before:
            return
        known = known.inner
    module.__dict__["forward"] = Guard(module, before, after)


def is_guarded(module: nn.Module, before: Callable) -> bool:
    """Whether a call of this very module is sure to come to its guard, which begins and ends."""
    known = module.__dict__.get("forward")
    while isinstance(known, Guard) and known.before is not before:
        known = known.inner
    return isinstance(known, Guard) and known.module is module


def unguard(module: nn.Module, before: Callable) -> None:
    """Takes off the :class:`Guard` of this kind; one that somebody has wrapped meanwhile stays, and
    does nothing."""
    outer, known = None, module.__dict__.get("forward")
    while isinstance(known, Guard):
        if known.before is before:
            if outer is not None:
                outer.inner = known.inner
            elif known.inner is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = known.inner
            return
        outer, known = known, known.inner
