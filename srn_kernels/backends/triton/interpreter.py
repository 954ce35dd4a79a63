"""Triton's interpreter, right about bfloat16, scalars of NumPy 2.4, and quick enough for tests."""

from __future__ import annotations

import functools
from typing import Any

import torch


@functools.cache  # once a process
def repair(add_both: Any) -> None:
    """Patches the interpreter for the life of the process.

    add_both: the combination of a reduction that adds several tensors, each for itself
    """
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float
    function = interpreter.InterpretedFunction
    run, patched = function.run, set()
    patch_tensor = interpreter._patch_lang_tensor
    reduction = interpreter.ReduceOps
    reduce = reduction.generic_reduce

    def convert_float(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        # Its own conversion cuts bits off, where every GPU rounds to nearest even.
        if source == tl.float32 and target == tl.bfloat16:
            return torch.tensor(values).bfloat16().view(torch.uint16).numpy()
        return convert(values, source, target, rounding)

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        # Its scalars are arrays of one element; Triton 3.6 lets NumPy turn them into integers,
        # which NumPy 2.4 refuses.
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def run_launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return run(self, *args, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        # It prepares the language at every call of a device function: once a launch will do.
        if self.fn.__module__ not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(self.fn.__module__)
        return self.rewrite()(*args, **kwargs)

    def generic_reduce(self: Any, tensors: Any) -> Any:
        # Its way for any combination goes through the elements one by one.
        if self.combine_fn is add_both:
            return tuple(self.sum(x) for x in tensors)
        return reduce(self, tensors)

    interpreter._convert_float = convert_float
    reduction.generic_reduce = generic_reduce
    interpreter._patch_lang_tensor = patch_lang_tensor
    function.run, function.__call__ = run_launch, call
