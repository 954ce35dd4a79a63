"""The functional core: weights, u, v and target ranks in, normalised weights out."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from srn_kernels import backends, ops
from srn_kernels.autograd import Plan, refuse_batched, run_round
from srn_kernels.block import block_size
from srn_kernels.reference import state_dtype

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


def _build_plan(
    shapes: tuple[tuple[int, int], ...],
    target_ranks: tuple[float, ...],
    iterations: tuple[int, ...],
    dims: tuple[int, ...],
    eps: tuple[float, ...],
    out_dtypes: tuple[torch.dtype, ...],
    names: tuple[str, ...],
    backend: str,
    gradient: str = "frozen",
    preserve: tuple[int, ...] = (),
) -> Plan:
    if preserve:
        sizes = [block_size(k, *shape) for k, shape in zip(preserve, shapes, strict=True)]
        shapes = tuple(
            (n * rows, n * columns) for n, (rows, columns) in zip(sizes, shapes, strict=True)
        )
    offsets, size = ops.state_layout(shapes)
    return Plan(
        target_ranks,
        iterations,
        dims,
        eps,
        out_dtypes,
        names,
        tuple(offsets),
        size,
        backend,
        gradient,
        preserve,
    )


_cached_plan = functools.lru_cache(maxsize=256)(_build_plan)


def make_plan(*constants: Any) -> Plan:
    """The constants of one op call: (rows, columns) of each layer, then those of :class:`Plan`."""
    return (_build_plan if torch.compiler.is_compiling() else _cached_plan)(*constants)


def _groups(weights: Sequence[Tensor]) -> list[list[int]]:
    """Layers that one op call can take: one device and one state dtype; empty ones left out."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, weight in enumerate(weights):
        if weight.numel():
            groups.setdefault((weight.device, state_dtype(weight.dtype)), []).append(i)
    return list(groups.values())


def _calls(weights: Sequence[Tensor], backend: str) -> list[tuple[list[int], str]]:
    """The layers of each op call, and the backend that serves it."""
    return [
        (group, backends.resolve(backend, weights[i].device.type, state_dtype(weights[i].dtype)))
        for group in _groups(weights)
        for i in group[:1]
    ]


def _matrix_shape(weight: Tensor, dim: int) -> tuple[int, int]:
    return weight.shape[dim], weight.numel() // weight.shape[dim]


def stable_rank_normalize(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    target_ranks: Sequence[float],
    *,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dims: Sequence[int] | None = None,
    training: bool = True,
    out_dtype: torch.dtype | None = None,
    gradient: str = "frozen",
    backend: str = "auto",
) -> list[Tensor]:
    """Normalises all weights in one fused call (arXiv 1906.04659, Algorithm 2).

    Each weight is seen as a matrix W of (rows, columns), rows along ``dims[i]``. With
    sigma = u^T W v after ``n_power_iterations`` power iterations, the result is
    ``gamma W / sigma + (1 - gamma) u v^T``, whose spectral norm is 1 and whose stable rank is at
    most the target; gamma = 1 (plain spectral normalisation) where the stable rank is low enough
    already. Differentiable in the weights, with u and v held constant unless ``gradient="exact"``.

    Args:
        weights: tensors of two dimensions or more; float32, bfloat16, float16 or float64, read in
            place in any dense memory order (others are copied first).
        us, vs: us[i] (rows_i,), vs[i] (columns_i,): unit vectors, float32, or float64 for float64
            weights. Updated in place when ``training``.
        target_ranks: floats >= 1; inf: spectral norm only.
        n_power_iterations: per call, when ``training``.
        eps: |sigma| at or below it passes the weight, and its gradient, unchanged.
        dims: the output dimension of each weight; None: 0 for all.
        training: whether u and v move; without, u/|u| and v/|v| are used as they are.
        out_dtype: of the results; None: each weight's own. float64 needs float64 weights.
        gradient: "frozen", or "exact": as if u, v were the top singular pair of W and moved with
            it, whatever ``training`` is; accurate as far as they have converged, bounded where the
            two largest singular values coincide, differentiable once. See
            :mod:`srn_kernels.exact` for its cost.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        One tensor a weight, with its shape and strides.

    Raises:
        ValueError, TypeError: an argument is wrong; nothing has been changed.
        RuntimeError: the named backend cannot serve.
    """
    backends.check_name(backend)
    request = Request.checked(
        weights, us, vs, target_ranks, n_power_iterations, eps, dims, training, out_dtype, gradient
    )
    refuse_batched(weights)
    outs = [w.to(request.out_dtypes[i]) if w.numel() == 0 else None for i, w in enumerate(weights)]
    calls = _calls(weights, backend)
    for group, name in calls:
        chosen = [w if is_dense(w) else w.contiguous() for w in (weights[i] for i in group)]
        plan = make_plan(
            tuple(_matrix_shape(weights[i], request.dims[i]) for i in group),
            tuple(request.target_ranks[i] for i in group),
            tuple(request.iterations[i] for i in group),
            tuple(request.dims[i] for i in group),
            (float(eps),) * len(group),
            tuple(request.out_dtypes[i] for i in group),
            tuple(f"weights[{i}]" for i in group),
            name,
            gradient,
        )
        results = run_round(plan, None, chosen, [us[i] for i in group], [vs[i] for i in group])
        for i, out in zip(group, results, strict=False):
            outs[i] = out
    return outs


def stable_rank_project_(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    target_ranks: Sequence[float],
    *,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dims: Sequence[int] | None = None,
    training: bool = True,
    backend: str = "auto",
) -> None:
    """Overwrites the weights with what :func:`stable_rank_normalize` would return.

    Runs under no_grad, works on leaf Parameters and bumps their version. Arguments and errors as
    there; a weight that overlaps itself in memory (an expanded tensor) raises ValueError.
    """
    backends.check_name(backend)
    request = Request.checked(
        weights, us, vs, target_ranks, n_power_iterations, eps, dims, training, None, "frozen"
    )
    for i, weight in enumerate(weights):
        if overlaps(weight):
            raise ValueError(f"weights[{i}] overlaps itself in memory and cannot be overwritten")
    calls = _calls(weights, backend)
    with torch.no_grad():
        for group, name in calls:
            dense = [w if is_dense(w) else w.contiguous() for w in (weights[i] for i in group)]
            ops.project(
                dense,
                [us[i] for i in group],
                [vs[i] for i in group],
                [request.target_ranks[i] for i in group],
                [request.iterations[i] for i in group],
                [request.dims[i] for i in group],
                [float(eps)] * len(group),
                name,
            )
            for i, w in zip(group, dense, strict=True):
                if w is not weights[i]:
                    weights[i].copy_(w)
