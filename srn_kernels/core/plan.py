"""The constants of a round, and the cache of them."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from srn_kernels.maths.bound import Scaling
from srn_kernels.maths.matrix import state_layout
from srn_kernels.maths.rules import named
from srn_kernels.maths.top_one import TOP_ONE


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
    pairs: tuple[int, ...]  # how many u and v each layer keeps
    backend: str
    gradient: str = "frozen"
    rule: str = TOP_ONE.name  # of all layers, a name for srn_kernels.maths.rules.named
    # Empty where no layer has a factor, see srn_kernels.maths.bound.
    sigma_max: tuple[float, ...] = ()  # 0: no bound
    through: tuple[bool, ...] = ()
    gained: tuple[int, ...] = ()  # the places of the layers' gains among all; -1: none
    n_gains: int = 0

    def scaled(self, layer: int) -> bool:
        """Whether the layer has a factor."""
        return bool(self.gained) and (self.gained[layer] >= 0 or self.sigma_max[layer] > 0)


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
    rule: str = TOP_ONE.name,
    scalings: tuple[Scaling, ...] = (),
) -> Plan:
    pairs = tuple([named(rule).pairs(*shape) for shape in shapes])
    sizes = [(n * rows, n * columns) for n, (rows, columns) in zip(pairs, shapes, strict=True)]
    offsets, size = state_layout(sizes)
    constants = (target_ranks, iterations, dims, eps, out_dtypes, names)
    plan = (*constants, tuple(offsets), size, pairs, backend, gradient, rule)
    if not any(x.scales for x in scalings):
        return Plan(*plan)
    gained, n_gains = [], 0
    for scaling in scalings:
        gained.append(n_gains if scaling.gain else -1)
        n_gains += scaling.gain
    bounds, through = [x.sigma_max for x in scalings], [x.through for x in scalings]
    return Plan(*plan, tuple(bounds), tuple(through), tuple(gained), n_gains)


_cached_plan = functools.lru_cache(maxsize=256)(_build_plan)


def make_plan(*constants: Any) -> Plan:
    """The constants of one op call: (rows, columns) of each layer, then those of :class:`Plan`,
    then a :class:`Scaling` of each layer, or none."""
    return (_build_plan if torch.compiler.is_compiling() else _cached_plan)(*constants)
