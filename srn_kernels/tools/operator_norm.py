"""The norm of a layer as an operator on inputs of a given size: how far it is from Lipschitz 1.

The matrix norm that normalisation sets to 1 is that of the reshaped kernel. The convolution itself,
with its stride, padding, dilation and groups, is another linear map; its largest singular value
comes from power iteration on the convolution and its transpose.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from srn_kernels.linalg import power_triples

LAYERS = (nn.Linear, _ConvNd)
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def _apply(module: nn.Module, weight: Tensor, x: Tensor, output_size: Any = None) -> Tensor:
    """The linear part of a layer on a batch."""
    if isinstance(module, nn.Linear):
        return F.linear(x, weight)
    if isinstance(module, _ConvTransposeNd):
        spatial = len(module.kernel_size)
        padding = module.output_padding
        if output_size is not None:
            padding = module._output_padding(
                x,
                list(output_size),
                module.stride,
                module.padding,
                module.kernel_size,
                spatial,
                module.dilation,
            )
        return _TRANSPOSED[spatial](
            x, weight, None, module.stride, module.padding, padding, module.groups, module.dilation
        )
    return module._conv_forward(x, weight, None)


class _Operator:
    """A linear layer as a matrix that knows products only; ``mT`` is its transpose."""

    def __init__(self, module: nn.Module, weight: Tensor, shape: Sequence[int], size: Any) -> None:
        self.dtype, self.device = weight.dtype, weight.device
        self.input = tuple(shape)
        out, self._back = torch.func.vjp(
            lambda x: _apply(module, weight, x.unsqueeze(0), size).squeeze(0),
            weight.new_zeros(self.input),
        )
        self._forward = lambda x: _apply(module, weight, x, size)
        self.output = tuple(out.shape)
        self.shape = (out.numel(), math.prod(self.input))
        self.transposed = False

    @property
    def mT(self) -> _Operator:
        other = object.__new__(_Operator)
        other.__dict__.update(self.__dict__)
        other.transposed = not self.transposed
        other.shape = self.shape[::-1]
        return other

    def __matmul__(self, x: Tensor) -> Tensor:
        columns = x.mT.contiguous()
        if not self.transposed:
            return self._forward(columns.view(-1, *self.input)).flatten(1).mT
        parts = [self._back(c.view(self.output))[0].flatten() for c in columns]
        return torch.stack(parts, 1)


def operator_norm(
    module: nn.Module,
    input_shape: Sequence[int],
    weight: Tensor | None = None,
    *,
    output_size: Sequence[int] | None = None,
    iterations: int = 1000,
    tol: float = 1e-4,
) -> float:
    """The largest singular value of a layer's linear part on inputs of a given size.

    Args:
        module: a Linear, Conv1-3d or ConvTranspose1-3d; any stride, padding and padding_mode,
            dilation, groups and output_padding. The bias does not count.
        input_shape: of one input, without the batch: ``(channels, *spatial)``, or
            ``(..., features)``.
        weight: in place of ``module.weight`` (W_hat, say).
        output_size: of a transposed convolution that was called with one.
        iterations, tol: of the power iteration; the result is within tol, relative, of a singular
            value, and its error is of the order of tol squared.

    Raises:
        TypeError, ValueError: a module of another class, or a shape that it cannot take.

    Example:
        >>> box = nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular", bias=False)
        >>> _ = nn.init.ones_(box.weight)
        >>> round(srn.operator_norm(box, (1, 64)), 3)  # of the kernel as a matrix it is sqrt(3)
        3.0
    """
    if not isinstance(module, LAYERS):
        raise TypeError(
            f"module must be a linear layer or a convolution, got {type(module).__name__}"
        )
    weight = module.weight if weight is None else weight
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    with torch.no_grad():
        weight = weight.detach().to(dtype)
        if not weight.isfinite().all():
            return math.nan
        largest = float(weight.abs().max()) if weight.numel() else 0.0
        if largest == 0:
            return 0.0
        if isinstance(module, nn.Linear):  # the same matrix at every place of the input
            input_shape = tuple(input_shape)[-1:]
        try:
            operator = _Operator(module, weight / largest, input_shape, output_size)
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"input_shape {tuple(input_shape)} does not fit {type(module).__name__}: {error}"
            ) from error
        if operator.shape[0] < operator.shape[1]:
            operator = operator.mT
        return largest * float(power_triples(operator, 1, iterations, tol, oversampling=1).S[0])


def input_shapes(
    model: nn.Module, layers: Sequence[nn.Module], input_shape: Sequence[int]
) -> dict[int, set[tuple[tuple[int, ...], Any]]]:
    """{id(layer): {(shape of one of its inputs, output_size)}} in one evaluation of ``model``.

    A copy of the model runs, so that nothing changes in this one. ``input_shape`` is tried with a
    batch dimension of 1 in front, then as it is. Raises ValueError if the forward fails on both.
    """
    if not isinstance(input_shape, Sequence) or not all(
        isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in input_shape
    ):
        raise ValueError(f"input_shape must be positive ints, got {input_shape!r}")
    found: dict[int, set[tuple[tuple[int, ...], Any]]] = {}

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        x = args[0] if args else kwargs.get("input")
        if not isinstance(x, Tensor):
            return
        if isinstance(module, _ConvNd):
            shape = tuple(x.shape[-1 - len(module.kernel_size) :])
            size = args[1] if len(args) > 1 else kwargs.get("output_size")
            found.setdefault(id(module), set()).add((shape, None if size is None else tuple(size)))
        else:
            found.setdefault(id(module), set()).add((tuple(x.shape[-1:]), None))

    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(0))
    twin = copy.deepcopy(model).eval()
    original = {id(b): id(a) for a, b in zip(model.modules(), twin.modules(), strict=True)}
    wanted = {id(m) for m in layers}
    for module in twin.modules():
        if original[id(module)] in wanted:
            module.register_forward_pre_hook(note, with_kwargs=True)
    failures = []
    for shape in ((1, *input_shape), tuple(input_shape)):
        found.clear()
        try:
            with torch.no_grad():
                twin(torch.zeros(shape, dtype=like.dtype, device=like.device))
            return {original[key]: shapes for key, shapes in found.items()}
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            failures.append(error)
    raise ValueError(
        f"input_shape {tuple(input_shape)}: the model's forward fails on it: {failures[0]}"
    ) from failures[0]
