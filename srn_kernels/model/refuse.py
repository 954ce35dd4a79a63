"""Surroundings in which a normalised layer would silently be off: each is refused in one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from torch import nn
from torch.fx._symbolic_trace import is_fx_symbolic_tracing

from srn_kernels.model.weight import NormalizedWeight

_FX = (
    "torch.fx cannot trace {}, which is normalised: the graph would hold raw weights; trace "
    "srn_kernels.export(model), a plain copy with the same output"
)


def refuse_script() -> NoReturn:
    raise RuntimeError(
        "torch.jit.script cannot compile a normalised model; script srn_kernels.export(model), a "
        "plain copy with the same output"
    )


class Named:
    """``module._get_name``, which torch.fx asks the module that it traces for, and nobody else in
    that state: its forward is then called without hooks."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self) -> str:
        name = type(self.module)._get_name(self.module)
        if is_fx_symbolic_tracing():
            raise RuntimeError(_FX.format(name))
        return name


def refuse_surroundings(entries: Sequence[NormalizedWeight]) -> None:
    """Raises where a round would be recorded wrongly (torch.fx), or its gradients taken for those
    of the raw weights (per-sample gradients by hooks, as opacus does)."""
    if is_fx_symbolic_tracing() and not _is_dispatching():
        raise RuntimeError(_FX.format(repr(entries[0].label)))
    trainable = (e for e in entries if e.weight.requires_grad)
    # opacus marks every trainable parameter of what it wraps, so one tells of all
    entry = next(trainable, None)
    if entry is not None and "grad_sample" in entry.weight.__dict__:
        raise RuntimeError(
            f"{entry.label!r} is normalised, and opacus' hooks would give the per-sample "
            "gradients of W_hat for its own; use torch.func (grad and vmap over "
            "functional_call), or srn_kernels.export(model)"
        )


def _is_dispatching() -> bool:
    """Whether it is make_fx that traces: it sees operations, and so W_hat."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    return get_proxy_mode() is not None
