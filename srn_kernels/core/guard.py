"""Which tensors may come to a kernel, and what becomes of the others.

Kernels read memory through plain pointers. They get dense tensors in ordinary memory alone; tensor
subclasses that compute in their own way (``__torch_dispatch__``) go to the reference, whose plain
arithmetic they may or may not have.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from srn_kernels import backends
from srn_kernels.maths.matrix import matrix_shape, state_dtype
from srn_kernels.maths.top_one import TOP_ONE

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PLAIN = frozenset({Tensor, nn.Parameter})


@functools.cache
def _is_memory(kind: type) -> bool:
    """Whether tensors of this class are what their storage holds."""
    return kind.__torch_dispatch__ is Tensor.__torch_dispatch__


def are_plain(tensors: Iterable[Tensor]) -> bool:
    """Whether kernels can read all of these."""
    return _PLAIN.issuperset(map(type, tensors)) or all(_is_memory(type(t)) for t in tensors)


def is_traced() -> bool:
    """Whether operations are recorded or faked now, and no kernel runs on them."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def check_tensor(tensor: object, label: str) -> None:
    """TypeError, naming the tensor, for what no backend can take."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATING:
        got = getattr(tensor, "dtype", type(tensor).__name__)
        raise TypeError(f"{label} must be a real floating-point tensor, got {got}")
    if tensor.is_nested or tensor.layout is not torch.strided:
        kind = "nested" if tensor.is_nested else str(tensor.layout)
        raise TypeError(f"{label} must be a dense tensor, got a {kind} one; use its to_dense()")


def check_new(weight: Tensor, label: str) -> None:
    """TypeError, naming the weight, where a subclass lacks the arithmetic of normalisation."""
    check_tensor(weight, label)
    kind = type(weight).__name__
    if kind == "FakeTensor" or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE):
        raise TypeError(
            f"{label} is a fake tensor, without the numbers that u and v start from; build the "
            "model on the meta device, or wrap it outside FakeTensorMode"
        )
    if kind == "DTensor" or are_plain([weight]) or weight.numel() == 0:
        return
    weight = weight.detach().unsqueeze(0) if weight.dim() == 1 else weight.detach()
    with torch.no_grad(), naming(label, weight):
        pair = (
            torch.ones(n, dtype=state_dtype(weight.dtype), device=weight.device)
            for n in matrix_shape(weight, 0)
        )
        made = TOP_ONE.normalize_layer(weight, *pair, 2.0, 1, 0.0, 0)
        torch.empty_like(weight).copy_(made.weight)
        made.weight.isfinite().all().item()


class naming:
    """Turns what the arithmetic of a tensor subclass raises into a TypeError that names it."""

    def __init__(self, label: str, weight: Tensor) -> None:
        self.label, self.kind = label, type(weight).__name__

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception):
            raise TypeError(
                f"{self.label} is a {self.kind}, which cannot do the arithmetic of normalisation "
                f"({error}); normalise the model before its weights become such"
            ) from error


def serving(
    backend: str, weights: Sequence[Tensor], labels: Sequence[str], dims: Sequence[int]
) -> str:
    """The backend that serves weights of one device and one state dtype in one call.

    ``backend``: "auto", or the one asked for by name. Errors as
    :func:`srn_kernels.backends.choose`; TypeError, naming the weight, where a tensor subclass is
    given to kernels by name.
    """
    first = weights[0]
    kind = (first.device.type, state_dtype(first.dtype))
    name = backends.choose(backend, *kind, weights, dims)
    if torch.compiler.is_compiling() or are_plain(weights) or is_traced() or name == "reference":
        return name
    place = next(i for i, w in enumerate(weights) if not _is_memory(type(w)))
    kind = type(weights[place]).__name__
    if backends.asked(backend) == "auto":
        return "reference"
    raise TypeError(
        f"{labels[place]} is a {kind}, which backend {name!r} cannot read; use backend='auto' or "
        "'reference'"
    )
