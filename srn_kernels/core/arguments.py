"""The checks of the functional core's arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from srn_kernels.maths.matrix import state_dtype

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def effective_rank(target_rank: float, rows: int, columns: int) -> float:
    """The target that a (rows, columns) matrix can have: a vector's stable rank is 1 already."""
    return math.inf if min(rows, columns) == 1 else float(target_rank)


def check_count(value: int, argument: str, smallest: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{argument} must be an int, got {value!r}")
    if value < smallest:
        raise ValueError(f"{argument} must be at least {smallest}, got {value}")
    return value


def check_eps(eps: float) -> float:
    if not isinstance(eps, (int, float)) or isinstance(eps, bool):
        raise TypeError(f"eps must be a number, got {eps!r}")
    if not (0 <= eps < math.inf):
        raise ValueError(f"eps must be finite and not negative, got {eps}")
    return float(eps)


def check_gradient(gradient: str) -> str:
    if gradient not in ("frozen", "exact"):
        raise ValueError(f"gradient must be 'frozen' or 'exact', got {gradient!r}")
    return gradient


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
        for argument, value in (("us", us), ("vs", vs), ("target_ranks", target_ranks)):
            if len(value) != n:
                raise ValueError(f"{argument} must have one entry a weight: {len(value)} for {n}")
        if dims is not None and len(dims) != n:
            raise ValueError(f"dims must have one entry a weight: {len(dims)} for {n}")
        check_count(n_power_iterations, "n_power_iterations", 1)
        check_eps(eps)
        check_gradient(gradient)
        if out_dtype is not None and out_dtype not in FLOATING:
            raise TypeError(f"out_dtype must be one of {FLOATING}, got {out_dtype}")
        request = cls([], [n_power_iterations if training else 0] * n, [], [])
        for i, weight in enumerate(weights):
            if not isinstance(weight, Tensor) or weight.dtype not in FLOATING:
                got = getattr(weight, "dtype", type(weight).__name__)
                raise TypeError(f"weights[{i}] must be a real floating-point tensor, got {got}")
            if weight.dim() < 2:
                raise ValueError(
                    f"weights[{i}] must have two dimensions or more, got shape "
                    f"{tuple(weight.shape)}"
                )
            dim = 0 if dims is None else dims[i]
            if not isinstance(dim, int) or isinstance(dim, bool):
                raise TypeError(f"dims[{i}] must be an int, got {dim!r}")
            if not -weight.dim() <= dim < weight.dim():
                raise ValueError(f"dims[{i}] = {dim} is no dimension of {tuple(weight.shape)}")
            dim %= weight.dim()
            rows = weight.shape[dim]
            columns = weight.numel() // rows if rows else 0
            for argument, x, size in (("us", us[i], rows), ("vs", vs[i], columns)):
                want = state_dtype(weight.dtype)
                if not isinstance(x, Tensor) or x.dtype != want:
                    got = getattr(x, "dtype", type(x).__name__)
                    raise TypeError(f"{argument}[{i}] must be a {want} tensor, got {got}")
                if weight.numel() and tuple(x.shape) != (size,):
                    raise ValueError(
                        f"{argument}[{i}] must have shape ({size},) for a weight of shape "
                        f"{tuple(weight.shape)} with dim {dim}, got {tuple(x.shape)}"
                    )
                if x.device != weight.device:
                    raise ValueError(
                        f"{argument}[{i}] is on {x.device}, its weight on {weight.device}"
                    )
                if not x.is_contiguous():
                    raise ValueError(f"{argument}[{i}] must be contiguous")
                if x.requires_grad:
                    raise ValueError(f"{argument}[{i}] is state and must not require a gradient")
            rank = target_ranks[i]
            if not isinstance(rank, (int, float)) or isinstance(rank, bool):
                raise TypeError(f"target_ranks[{i}] must be a number, got {rank!r}")
            if not rank >= 1:
                raise ValueError(f"target_ranks[{i}] must be at least 1, got {rank}")
            out = out_dtype or weight.dtype
            if out == torch.float64 and weight.dtype != torch.float64:
                raise ValueError(f"out_dtype float64 needs float64 weights; weights[{i}] is not")
            request.target_ranks.append(effective_rank(rank, rows, columns))
            request.dims.append(dim)
            request.out_dtypes.append(out)
        return request
