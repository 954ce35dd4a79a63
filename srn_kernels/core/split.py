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
from srn_kernels.core.record import RoundRecord
from srn_kernels.maths.matrix import from_matrix, matrix, padded
from srn_kernels.maths.scalars import (
    NON_FINITE,
    STABLE_RANK,
    contraction,
    gradient_coefficients,
    layer_stats,
)
from srn_kernels.maths.top_one import repeat_layer


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
    if settings.gradient != "frozen" or settings.preserve != 1 or settings.scales:
        raise NotImplementedError(
            f"{label} is a DTensor, for which there is gradient='frozen' and preserve=1 alone, and "
            "no sigma_max or gain"
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


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    norm = x.norm()
    return x / torch.where(norm > 0, norm, 1.0), norm


def measure(
    plan: Plan, weights: Sequence[Tensor], blocks: Sequence[Block], us: Any, vs: Any
) -> tuple[Tensor, Tensor]:
    """A round's flat state and statistics, as :mod:`srn_kernels.ops` describes them.

    ``weights``: this process's blocks in the weights' own shapes; ``us``, ``vs``: whole, updated in
    place where the plan iterates. Same results as the ops on whole weights, to rounding.
    """
    dtype = us[0].dtype
    mats = [matrix(w, d).to(dtype) for w, d in zip(weights, plan.dims, strict=True)]
    u, v = [x.double() for x in us], [x.double() for x in vs]
    n = len(mats)
    frobenius = [torch.linalg.vector_norm(m, dtype=torch.float64).square() for m in mats]
    sigma: list[Tensor] = [f.new_zeros(()) for f in frobenius]
    usable: list[Tensor] = [f.isfinite() for f in frobenius]
    empty = frobenius[0].new_empty(0)
    for step in range(max(1, *plan.iterations)):
        moving = [i for i in range(n) if plan.iterations[i] > step]
        s = [empty] * n
        across = [i for i in moving if blocks[i].across]
        for i in across:
            s[i] = (mats[i] @ v[i][blocks[i].columns].to(dtype)).double()
        if across:
            s = _sum_over_processes(s, blocks)
        parts = [empty] * n
        for i in moving:
            block, m = blocks[i], mats[i]
            if not block.across:
                s[i] = (m @ v[i].to(dtype)).double()
            # t grows as sigma squared: multiply by the unit vector first
            unit, scale = _unit(s[i])
            t = (m.T @ unit.to(dtype)).double() * scale
            pieces = [t if not block.across else _placed(t, block.columns, v[i])]
            if not block.across:
                pieces.append(_placed(s[i], block.rows, u[i]))
            if step == 0:
                pieces.append(frobenius[i].reshape(1))
            parts[i] = torch.cat(pieces)
        if step == 0:
            for i in range(n):
                if plan.iterations[i] == 0:
                    u[i], v[i] = _unit(u[i])[0], _unit(v[i])[0]
                    s_part = mats[i] @ v[i][blocks[i].columns].to(dtype)
                    own = torch.dot(u[i][blocks[i].rows], s_part.double())
                    parts[i] = torch.stack([own, frobenius[i]])
        sums = _sum_over_processes(parts, blocks)
        for i in range(n):
            if plan.iterations[i] == 0 and step == 0:
                sigma[i], frobenius[i] = sums[i]
        for i in moving:
            t, rest = sums[i][: v[i].numel()], sums[i][v[i].numel() :]
            if not blocks[i].across:
                s[i], rest = rest[: u[i].numel()], rest[u[i].numel() :]
            if step == 0:
                frobenius[i] = rest[0]
            (u[i], s_norm), (v[i], t_norm) = _unit(s[i]), _unit(t)
            sigma[i] = t_norm / torch.where(s_norm > 0, s_norm, 1.0)
            usable[i] = s_norm.isfinite() & (s_norm > 0) & t_norm.isfinite() & (t_norm > 0)
    return _finish(plan, us, vs, u, v, torch.stack(sigma), torch.stack(frobenius), usable)


def _finish(
    plan: Plan,
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    sigma: Tensor,
    frobenius_sq: Tensor,
    usable: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """From the sums to the scalars (the reference's formulas), and u, v to their places."""
    known = {"dtype": torch.float64, "device": sigma.device}
    eps, ranks = torch.tensor(plan.eps, **known), torch.tensor(plan.target_ranks, **known)
    finite = frobenius_sq.isfinite()
    good = finite & torch.stack(list(usable)) & (sigma.abs() > eps)
    broken = ~finite | ~sigma.isfinite()
    q = (frobenius_sq / torch.where(good, sigma, 1.0).square() - 1.0).clamp_min(0.0)
    active, gamma = contraction(q, ranks, good)
    stats = layer_stats(sigma, frobenius_sq, q, gamma, active, good, broken)
    round_state = us[0].new_zeros(plan.state_size)
    for i, start in enumerate(plan.offsets):
        middle = start + padded(us[i].numel())
        for old, new, place in ((us[i], u[i], start), (vs[i], v[i], middle)):
            new = new.to(old.dtype)
            if plan.iterations[i] > 0:  # a zero or non-finite weight leaves u and v as they were
                new = torch.where(good[i], new, old)
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
        record: RoundRecord | None,
        blocks: Sequence[Block],
        vectors: Sequence[tuple[Tensor, Tensor]],
        stats: Tensor,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.plan, ctx.record, ctx.blocks, ctx.vectors, ctx.stats = (
            plan,
            record,
            blocks,
            vectors,
            stats,
        )
        # Kept as in StableRankNormFunction: several backwards may reach one round.
        ctx.tensors, ctx.versions = weights, [w._version for w in weights]
        outs = []
        for i, w in enumerate(weights):
            u, v = vectors[i]
            out = repeat_layer(w, u, v, stats[i], plan.dims[i])
            outs.append(out.to(plan.out_dtypes[i]))
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        plan, stats = ctx.plan, ctx.stats
        if ctx.record is not None:
            ctx.record.backward_seen = True
            for layer in ctx.record.layers:
                layer.backward_seen = True
        rows = [i for i, g in enumerate(grads) if g is not None]
        result: list[Tensor | None] = [None] * len(grads)
        branch = stats[:, 6]
        good, active = branch <= STABLE_RANK, branch == STABLE_RANK
        sigma = torch.where(good, stats[:, 0], 1.0)
        parts, scaled, matrices = [], [], []
        for i in rows:
            w = ctx.tensors[i]
            if w._version != ctx.versions[i]:
                raise RuntimeError(
                    f"the weight of layer {plan.names[i]!r} was changed in place between its "
                    "normalisation and this backward (an optimiser step?); run the forward again "
                    "before the second backward"
                )
            u, v = ctx.vectors[i]
            scaled.append(matrix(w, plan.dims[i]).to(u.dtype) / sigma[i].to(u.dtype))
            matrices.append(matrix(grads[i], plan.dims[i]).to(u.dtype))
            g_w = (matrices[-1] * scaled[-1]).sum(dtype=torch.float64)
            g_e = torch.dot(u, matrices[-1] @ v).double()
            parts.append(torch.stack([g_w, g_e]))
        sums = _sum_over_processes(parts, [ctx.blocks[i] for i in rows])
        for g, w, i, (g_w, g_e) in zip(matrices, scaled, rows, sums, strict=True):
            u, v = ctx.vectors[i]
            moving = active[i] & (stats[i, 3] > 0)
            x, y = gradient_coefficients(g_w, g_w - g_e, stats[i, 2], moving, active[i], good[i])
            grad = g + x.to(u.dtype) * w + y.to(u.dtype) * torch.outer(u, v)
            grad = torch.where(good[i], stats[i, 3] / sigma[i], 1.0).to(u.dtype) * grad
            grad = torch.where(branch[i] == NON_FINITE, torch.full_like(grad, math.nan), grad)
            like = ctx.tensors[i]
            result[i] = from_matrix(grad, like, plan.dims[i]).to(like.dtype)
        return (None, None, None, None, None, *result)


def run_split(
    plan: Plan,
    record: RoundRecord | None,
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    *finished: Tensor,
) -> tuple[Tensor, ...]:
    """:func:`srn_kernels.autograd.run_round` for DTensor weights; W_hat is placed as its weight."""
    if plan.preserve:
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
        for i, (start, block) in enumerate(zip(plan.offsets, blocks, strict=True)):
            middle = start + padded(us[i].numel())
            u, v = (
                round_state[start : start + us[i].numel()],
                round_state[middle : middle + vs[i].numel()],
            )
            vectors.append((u[block.rows], v[block.columns]))
    if record is not None:
        record.round_state, record.stats = round_state, stats
    outs = SplitFunction.apply(plan, record, blocks, vectors, stats, *local)
    placed = [
        DTensor.from_local(
            out, w.device_mesh, w.placements, run_check=False, shape=w.shape, stride=w.stride()
        )
        for out, w in zip(outs, weights, strict=True)
    ]
    return (*placed, round_state, stats)
