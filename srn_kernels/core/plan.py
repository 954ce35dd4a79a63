"""The constants of a round, and the cache of them."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from srn_kernels.core import ops
from srn_kernels.maths.top_k import block_size


class Plan(NamedTuple):
    """The constants of a round, one entry a layer in every tuple."""

    target_ranks: tuple[float, ...]
    iterations: tuple[int, ...]
    dims: tuple[int, ...]
    eps: tuple[float, ...]
    out_dtypes: tuple[torch.dtype, ...]
    names: tuple[str, ...]
    offsets: tuple[int, ...]
    state_size: int
    backend: str
    gradient: str = "frozen"
    preserve: tuple[int, ...] = ()  # k of each layer; empty: 1 for all, what the kernels serve


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
