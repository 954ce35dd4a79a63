"""Hooks and guards by themselves: once each, in order, gone without a trace, ended by anything."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

from srn_kernels.model.hooks import Guard, guard, hook, is_guarded, unguard, unhook
from srn_kernels.model.undo import unchanged_on_error

CALLS: list[str] = []


class Told(nn.Module):
    def forward(self, x: torch.Tensor, error: type[BaseException] | None = None) -> torch.Tensor:
        CALLS.append("forward")
        if error is not None:
            raise error
        return x


def before(module: nn.Module, inputs: object) -> None:
    CALLS.append("before")


def after(module: nn.Module, inputs: object, output: object) -> None:
    CALLS.append("after")


def begin(module: nn.Module) -> tuple[nn.Module, bool]:
    CALLS.append("begin")
    return module, True


def join(module: nn.Module) -> tuple[nn.Module, bool]:
    """Something has begun already, and ends it."""
    CALLS.append("join")
    return module, False


def end(module: nn.Module) -> None:
    CALLS.append("end")


def finish(module: nn.Module) -> None:
    CALLS.append("finish")


def called(module: nn.Module, *arguments: object) -> list[str]:
    CALLS.clear()
    try:
        module(torch.ones(1), *arguments)
    except BaseException:
        CALLS.append("raised")
    return list(CALLS)


@pytest.mark.parametrize("outermost", [True, False])
def test_hooks_are_there_once_and_around_or_inside_those_of_others(outermost: bool) -> None:
    module = Told()
    module.register_forward_pre_hook(lambda *_: CALLS.append("other before"))
    module.register_forward_hook(lambda *_: CALLS.append("other after"))
    for _ in range(2):
        hook(module, before, after, outermost)
    others = ["other before", "forward", "other after"]
    inside = ["other before", "before", "forward", "after", "other after"]
    assert called(module) == (["before", *others, "after"] if outermost else inside)
    assert called(module, ValueError)[-2:] == ["after", "raised"]
    unhook(module, before, after)
    assert called(module) == others
    assert not module._forward_hooks_always_called


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_a_guard_ends_what_it_began_whatever_happens(error: type[BaseException] | None) -> None:
    module = Told()
    guard(module, begin, end)
    ended = ["begin", "forward", "end"]
    assert called(module, error) == (ended if error is None else [*ended, "raised"])


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_a_guard_ends_for_others_only_where_torch_calls_no_hook(error) -> None:
    module = Told()
    guard(module, join, finish)
    torchs = ["join", "forward"] if error is None else ["join", "forward", "raised"]
    interrupted = ["join", "forward", "finish", "raised"]
    assert called(module, error) == (interrupted if error is KeyboardInterrupt else torchs)


def test_guards_keep_a_forward_of_the_users_and_come_off_in_any_order() -> None:
    for first, second in ((begin, join), (join, begin)):
        module = Told()
        own = module.forward = lambda x, scale=2.0: CALLS.append("own")
        for _ in range(2):
            guard(module, begin, end)
        guard(module, join, finish)
        assert called(module) == ["join", "begin", "own", "end"]
        assert list(inspect.signature(module.forward).parameters) == ["x", "scale"]
        assert is_guarded(module, begin) and is_guarded(module, join)
        unguard(module, first)
        assert is_guarded(module, second) and not is_guarded(module, first)
        assert called(module) == (["join", "own"] if first is begin else ["begin", "own", "end"])
        unguard(module, second)
        assert module.__dict__["forward"] is own
    plain = Told()
    guard(plain, begin, end)
    assert list(inspect.signature(plain.forward).parameters) == ["x", "error"]
    unguard(plain, begin)
    assert "forward" not in plain.__dict__


def test_a_guard_that_somebody_wrapped_stays() -> None:
    module = Told()
    guard(module, begin, end)
    inner = module.forward
    module.forward = lambda *arguments: inner(*arguments)
    unguard(module, begin)
    assert isinstance(inner, Guard)
    assert called(module) == ["begin", "forward", "end"]


def test_a_block_that_raises_changes_nothing_of_a_module() -> None:
    class Other(Told):
        pass

    module = Told()
    module.known, module.names = ["a"], {"b"}
    module.register_buffer("c", torch.ones(1), persistent=False)
    before = dict(module.__dict__)
    with pytest.raises(KeyboardInterrupt), unchanged_on_error(module):
        module.known.append("d")
        module.names.add("e")
        module._non_persistent_buffers_set.discard("c")
        module._buffers["f"] = torch.ones(1)
        module.g = 1
        module.__class__ = Other
        raise KeyboardInterrupt
    assert type(module) is Told
    assert module.__dict__ == before
    assert (module.known, module.names) == (["a"], {"b"})
    assert (module._non_persistent_buffers_set, list(module._buffers)) == ({"c"}, ["c"])
