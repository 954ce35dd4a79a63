"""Rounds over weights that several processes hold together: FSDP2's shards, tensor parallelism.

A DTensor weight is never gathered. Each process multiplies its own block of rows (or columns), and
what a power iteration needs of the others is summed in one packed all-reduce for all layers of the
call: s = W v, t = W^T s and |W|_F^2, R + C + 1 numbers for a matrix of R x C. A block of columns
needs s before it can form its part of t, and so one all-reduce more. The backward's two inner
products are another packed all-reduce, of two numbers a layer. Sums are float64; every process ends
with the same u, v and scalars, bit for bit.

FSDP2 units: the round measures the shards when the root's forward starts; when a unit has gathered
its weights, W_hat = a W + b u v^T is one pass over them, and its backward needs no communication,
because it is linear in the gradient that FSDP reduces afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from srn_kernels.core.plan import Plan
from srn_kernels.core.record import Round, begin_backward, versions_of
from srn_kernels.maths.matrix import from_matrix, matrix, padded, round_vectors
from srn_kernels.maths.rules import choose, named
from srn_kernels.maths.scalars import Stats, contraction, layer_stats, verdict
from srn_kernels.maths.top_one import (
    TOP_ONE,
    evaluated,
    gradient_of,
    inner_products,
    step,
    times,
    times_back,
    unit,
)


class Block(NamedTuple):
    """Which part of a (rows, columns) matrix this process holds."""

    group: Any  # the processes that hold the rest; None: all of it is here
    rows: slice
    columns: slice
    across: bool  # the columns are split, so that W v is a sum over processes


_WHOLE = slice(None)


def block_of(weight: DTensor, dim: int, label: str) -> Block:
    """This process's block; NotImplementedError names a layer that is split in another way."""
    split = [i for i, p in enumerate(weight.placements) if not isinstance(p, Replicate)]
    if not split:
        return Block(None, _WHOLE, _WHOLE, False)
    place = weight.placements[split[0]]
    others = [d for d in range(weight.dim()) if d != dim]
    if len(split) > 1 or not isinstance(place, Shard) or place.dim not in (dim, *others[:1]):
        raise NotImplementedError(
            f"{label} is placed as {weight.placements}; a weight can be split once, along its "
            f"output dimension {dim} or its first other dimension"
        )
    mesh = weight.device_mesh
    sizes, offsets = compute_local_shape_and_global_offset(weight.shape, mesh, weight.placements)
    start, size = offsets[place.dim], sizes[place.dim]
    group = mesh.get_group(split[0])
    if place.dim == dim:
        return Block(group, slice(start, start + size), _WHOLE, False)
    inner = math.prod(weight.shape[d] for d in others[1:])
    return Block(group, _WHOLE, slice(start * inner, (start + size) * inner), True)


def check(weight: DTensor, settings: Any, label: str) -> None:
    """Raises NotImplementedError, naming the layer, for what DTensor weights do not offer."""
    block_of(weight, settings.dim, label)
    served = named(choose(settings.rule, settings.preserve)).split
    if settings.gradient != "frozen" or not served or settings.scales:
        raise NotImplementedError(
            f"{label} is a DTensor, for which there is gradient='frozen' and preserve=1 alone, "
            f"rule={TOP_ONE.name!r}, and no sigma_max or gain"
        )


def _sum_over_processes(parts: Sequence[Tensor], blocks: Sequence[Block]) -> list[Tensor]:
    """Each 1-D float64 part summed over its block's processes: one all-reduce a group."""
    sums = list(parts)
    groups: dict[Any, list[int]] = {}
    for i, block in enumerate(blocks):
        if block.group is not None and parts[i].numel():
            groups.setdefault(block.group, []).append(i)
    for group, members in groups.items():
        packed = torch.cat([parts[i] for i in members])
        dist.all_reduce(packed, group=group)
        for i, part in zip(members, packed.split([parts[i].numel() for i in members]), strict=True):
            sums[i] = part
    return sums


def _placed(part: Tensor, where: slice, like: Tensor) -> Tensor:
    """``part`` at its place among zeros of the size of ``like``, float64."""
    whole = torch.zeros(like.numel(), dtype=torch.float64, device=part.device)
    whole[where] = part.double()
    return whole


def measure(
    plan: Plan, weights: Sequence[Tensor], blocks: Sequence[Block], us: Any, vs: Any
) -> tuple[Tensor, Tensor]:
    """A round's flat state and statistics, as :mod:`srn_kernels.core.ops` describes them.

    ``weights``: this process's blocks in the weights' own shapes; ``us``, ``vs``: whole, updated in
    place where the plan iterates. Same results as the ops on whole weights, to rounding.
    """
    dtype = us[0].dtype
    mats = [matrix(w, d).to(dtype) for w, d in zip(weights, plan.dims, strict=True)]
    u, v = [x.double() for x in us], [x.double() for x in vs]
    frobenius = [torch.linalg.vector_norm(m, dtype=torch.float64).square() for m in mats]
    nothing = frobenius[0].new_empty(0)
    made: list[Any] = [None] * len(mats)
    for number in range(max(1, *plan.iterations)):
        moving = [n > number for n in plan.iterations]
        s = [nothing] * len(mats)
        for i, (m, block) in enumerate(zip(mats, blocks, strict=True)):
            if moving[i]:
                s[i] = times(m, v[i][block.columns])
        s = _sum_over_processes(s, [b if b.across else b._replace(group=None) for b in blocks])
        parts = [nothing] * len(mats)
        for i, (m, block) in enumerate(zip(mats, blocks, strict=True)):
            if moving[i]:
                pieces = [_placed(times_back(m, s[i]), block.columns, v[i])]
                if not block.across:
                    pieces.append(_placed(s[i], block.rows, u[i]))
            elif number == 0:
                u[i], v[i] = unit(u[i])[0], unit(v[i])[0]
                own = torch.dot(u[i][block.rows], times(m, v[i][block.columns]))
                pieces = [own.reshape(1)]
            else:
                continue
            parts[i] = torch.cat([*pieces, frobenius[i].reshape(1)] if number == 0 else pieces)
        sums = _sum_over_processes(parts, blocks)
        for i, total in enumerate(sums):
            if number == 0:
                total, frobenius[i] = total[:-1], total[-1]
            if moving[i]:
                t, rest = total[: v[i].numel()], total[v[i].numel() :]
                made[i] = step(s[i] if blocks[i].across else rest, t)
            elif number == 0:
                made[i] = evaluated(u[i], v[i], total[0])
            u[i], v[i] = made[i].u, made[i].v
    return _finish(plan, us, vs, made, torch.stack(frobenius))


def _finish(
    plan: Plan, us: Sequence[Tensor], vs: Sequence[Tensor], made: Sequence[Any], squares: Tensor
) -> tuple[Tensor, Tensor]:
    """From each layer's last step and |W|_F^2 to its scalars, and u, v to their places."""
    sigma, usable = torch.stack([x.sigma for x in made]), torch.stack([x.usable for x in made])
    known = {"dtype": torch.float64, "device": sigma.device}
    eps, ranks = torch.tensor(plan.eps, **known), torch.tensor(plan.target_ranks, **known)
    finite = squares.isfinite()
    seen = verdict(sigma, usable & finite, finite, eps)
    q = (squares / torch.where(seen.good, sigma, 1.0).square() - 1.0).clamp_min(0.0)
    active, gamma = contraction(q, ranks, seen.good)
    stats = layer_stats(sigma, squares, q, gamma, active, seen)
    round_state = us[0].new_zeros(plan.state_size)
    for i, start in enumerate(plan.offsets):
        middle = start + padded(us[i].numel())
        for old, new, place in ((us[i], made[i].u, start), (vs[i], made[i].v, middle)):
            new = new.to(old.dtype)
            if plan.iterations[i] > 0:  # a zero or non-finite weight leaves u and v as they were
                new = torch.where(seen.good[i], new, old)
                old.copy_(new)
            round_state[place : place + old.numel()] = new
    return round_state, stats


class SplitFunction(torch.autograd.Function):
    """W_hat of this process's blocks from a round's state and statistics; once differentiable.

    Backward sums <G, W> and u^T G v of all layers in one packed all-reduce.
    """

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        record: Round | None,
        blocks: Sequence[Block],
        vectors: Sequence[tuple[Tensor, Tensor]],
        stats: Tensor,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.plan, ctx.record, ctx.blocks = plan, record, blocks
        ctx.vectors, ctx.stats = vectors, stats
        # Kept as in StableRankNormFunction: several backwards may reach one round.
        ctx.tensors, ctx.versions = weights, versions_of(weights)
        outs = []
        for i, (w, (u, v)) in enumerate(zip(weights, vectors, strict=True)):
            constants = (plan.target_ranks[i], plan.eps[i], plan.dims[i])
            out = TOP_ONE.repeat_layer(w, u, v, stats[i], *constants)
            outs.append(out.to(plan.out_dtypes[i]))
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        plan = ctx.plan
        begin_backward(plan, ctx.record, ctx.tensors, ctx.versions, grads)
        rows = [i for i, g in enumerate(grads) if g is not None]
        result: list[Tensor | None] = [None] * len(grads)
        layers, parts = [], []
        for i in rows:
            (u, v), known = ctx.vectors[i], Stats(*ctx.stats[i])
            sigma = torch.where(known.masks()[0], known.sigma, 1.0)
            g, w = (matrix(x, plan.dims[i]).to(u.dtype) for x in (grads[i], ctx.tensors[i]))
            layers.append((g, w / sigma.to(u.dtype), u, v))
            parts.append(inner_products(*layers[-1]))
        sums = _sum_over_processes(parts, [ctx.blocks[i] for i in rows])
        for i, layer, inner in zip(rows, layers, sums, strict=True):
            known, like = Stats(*ctx.stats[i]), ctx.tensors[i]
            sigma = torch.where(known.masks()[0], known.sigma, 1.0)
            grad = gradient_of(*layer, inner, sigma, known.q, known.gamma, known)
            result[i] = from_matrix(grad, like, plan.dims[i]).to(like.dtype)
        return (None, None, None, None, None, *result)


# Its parameters are those of run_round, written out for the type checker: one stands for the other.
def run_split(
    plan: Plan,
    record: Round | None,
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    *finished: Tensor,
    gains: Sequence[Tensor] = (),
) -> tuple[Tensor, ...]:
    """:func:`srn_kernels.core.autograd.run_round` for DTensors; W_hat is placed as its weight.

    ``gains``: none, see :func:`check`.
    """
    if not named(plan.rule).split:
        raise NotImplementedError(f"{plan.names[0]} is a DTensor, for which preserve has to be 1")
    blocks = [
        block_of(w, d, name) for w, d, name in zip(weights, plan.dims, plan.names, strict=True)
    ]
    local = [w.to_local() for w in weights]
    with torch.no_grad():
        if finished:
            round_state, stats = finished
        else:
            round_state, stats = measure(plan, [w.detach() for w in local], blocks, us, vs)
        vectors = []
        for w, start, dim, block in zip(weights, plan.offsets, plan.dims, blocks, strict=True):
            u, v = round_vectors(round_state, start, w, dim)
            vectors.append((u[block.rows], v[block.columns]))
    if record is not None:
        record.fill(round_state, stats)
    outs = SplitFunction.apply(plan, record, blocks, vectors, stats, *local)
    placed = [
        DTensor.from_local(
            out, w.device_mesh, w.placements, run_check=False, shape=w.shape, stride=w.stride()
        )
        for out, w in zip(outs, weights, strict=True)
    ]
    return (*placed, round_state, stats)
