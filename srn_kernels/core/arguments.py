"""The checks of the functional core's arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from srn_kernels.core.guard import FLOATING, check_tensor
from srn_kernels.maths.matrix import matrix_shape, state_dtype


def effective_rank(target_rank: float, rows: int, columns: int) -> float:
    """The target that a (rows, columns) matrix can have: a vector's stable rank is 1 already."""
    return math.inf if min(rows, columns) == 1 else float(target_rank)


def check_number(value: Any, argument: str, what: str = "a number") -> float:
    """The number as a float; numpy's scalars are numbers, a bool is none."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{argument} must be {what}, got {value!r}")
    return float(value)


def check_int(value: Any, argument: str) -> int:
    """The number as an int; numpy's scalars are numbers, a bool is none."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{argument} must be an int, got {value!r}")
    return int(value)


def check_count(value: Any, argument: str, smallest: int) -> int:
    if check_int(value, argument) < smallest:
        raise ValueError(f"{argument} must be at least {smallest}, got {value}")
    return int(value)


def check_dim(dim: Any, weight: Tensor, argument: str) -> int:
    """The dimension of a weight, counted from 0."""
    if not -weight.dim() <= check_int(dim, argument) < weight.dim():
        raise ValueError(f"{argument} = {dim} is no dimension of {tuple(weight.shape)}")
    return int(dim) % weight.dim()


def check_eps(eps: Any) -> float:
    if not (0 <= check_number(eps, "eps") < math.inf):
        raise ValueError(f"eps must be finite and not negative, got {eps}")
    return float(eps)


def check_gradient(gradient: str) -> str:
    if gradient not in ("frozen", "exact"):
        raise ValueError(f"gradient must be 'frozen' or 'exact', got {gradient!r}")
    return gradient


def check_vector(x: Any, argument: str, place: int, size: int, weight: Tensor, dim: int) -> None:
    """The u or v of a weight: state of its device and dtype of state."""
    want = state_dtype(weight.dtype)
    if (
        isinstance(x, Tensor)
        and x.dtype == want
        and x.shape == (size,)
        and x.device == weight.device
        and x.is_contiguous()
        and not x.requires_grad
    ):
        return
    argument = f"{argument}[{place}]"
    if not isinstance(x, Tensor) or x.dtype != want:
        got = getattr(x, "dtype", type(x).__name__)
        raise TypeError(f"{argument} must be a {want} tensor, got {got}")
    if weight.numel() and tuple(x.shape) != (size,):
        raise ValueError(
            f"{argument} must have shape ({size},) for a weight of shape {tuple(weight.shape)} "
            f"with dim {dim}, got {tuple(x.shape)}"
        )
    if x.device != weight.device:
        raise ValueError(f"{argument} is on {x.device}, its weight on {weight.device}")
    if not x.is_contiguous():
        raise ValueError(f"{argument} must be contiguous")
    if x.requires_grad:
        raise ValueError(f"{argument} is state and must not require a gradient")


def is_dense(t: Tensor) -> bool:
    """Dense and not overlapping, in any order of dimensions."""
    return t.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(t)


def overlaps(t: Tensor) -> bool:
    """Whether two elements may share memory (expanded or sliding views)."""
    reach = 0
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


class Request(NamedTuple):
    """The checked arguments of a call, one entry a layer."""

    target_ranks: list[float]
    iterations: list[int]
    dims: list[int]
    eps: list[float]
    out_dtypes: list[torch.dtype]

    @classmethod
    def checked(
        cls,
        weights: Sequence[Tensor],
        us: Sequence[Tensor],
        vs: Sequence[Tensor],
        target_ranks: Sequence[float],
        n_power_iterations: int,
        eps: float,
        dims: Sequence[int] | None,
        training: bool,
        out_dtype: torch.dtype | None,
        gradient: str,
    ) -> Request:
        """Raises ValueError or TypeError, naming the argument, before anything is changed."""
        n = len(weights)
        lists = {"us": us, "vs": vs, "target_ranks": target_ranks, "dims": dims}
        for argument, value in lists.items():
            if value is not None and len(value) != n:
                raise ValueError(f"{argument} must have one entry a weight: {len(value)} for {n}")
        count = check_count(n_power_iterations, "n_power_iterations", 1)
        eps = check_eps(eps)
        check_gradient(gradient)
        if out_dtype is not None and out_dtype not in FLOATING:
            raise TypeError(f"out_dtype must be one of {FLOATING}, got {out_dtype}")
        request = cls([], [count if training else 0] * n, [], [eps] * n, [])
        for i, weight in enumerate(weights):
            check_tensor(weight, f"weights[{i}]")
            if weight.dim() < 2:
                raise ValueError(
                    f"weights[{i}] must have two dimensions or more, got shape "
                    f"{tuple(weight.shape)}"
                )
            dim = 0 if dims is None else check_dim(dims[i], weight, f"dims[{i}]")
            rows, columns = matrix_shape(weight, dim) if weight.numel() else (0, 0)
            check_vector(us[i], "us", i, rows, weight, dim)
            check_vector(vs[i], "vs", i, columns, weight, dim)
            rank = target_ranks[i]
            if type(rank) is not float:  # the usual case, spared a look at what numbers are
                rank = check_number(rank, f"target_ranks[{i}]")
            if not rank >= 1:
                raise ValueError(f"target_ranks[{i}] must be at least 1, got {rank}")
            out = out_dtype or weight.dtype
            if out == torch.float64 and weight.dtype != torch.float64:
                raise ValueError(f"out_dtype float64 needs float64 weights; weights[{i}] is not")
            request.target_ranks.append(effective_rank(rank, rows, columns))
            request.dims.append(dim)
            request.out_dtypes.append(out)
        return request
