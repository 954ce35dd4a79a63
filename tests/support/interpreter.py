"""Triton's interpreter, made quick enough for a test suite, and right about bfloat16."""

from __future__ import annotations

from typing import Any

import torch


def repair() -> None:
    """Patches the interpreter for the life of the process."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float
    function = interpreter.InterpretedFunction
    run, patched = function.run, set()

    def convert_float(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        # Its own conversion cuts bits off, where every GPU rounds to nearest even.
        if source == tl.float32 and target == tl.bfloat16:
            return torch.tensor(values).bfloat16().view(torch.uint16).numpy()
        return convert(values, source, target, rounding)

    def run_launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return run(self, *args, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        # It prepares the language at every call of a device function: once a launch will do.
        if self.fn.__module__ not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(self.fn.__module__)
        return self.rewrite()(*args, **kwargs)

    interpreter._convert_float = convert_float
    function.run, function.__call__ = run_launch, call
