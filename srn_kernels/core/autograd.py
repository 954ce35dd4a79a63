"""The autograd node of a round: all layers forward in one op, all gradients back in one op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from srn_kernels.backends import cpu, host
from srn_kernels.core import exact, ops
from srn_kernels.core.guard import are_plain, is_traced, naming
from srn_kernels.core.plan import Plan
from srn_kernels.core.record import Round, begin_backward, versions_of
from srn_kernels.maths.scalars import STATS

State = tuple[Sequence[Tensor], Sequence[Tensor]]  # us and vs


_BATCHED = (
    "torch.vmap over the weights of a normalised model is not supported; normalise a list of the "
    "members' weights in one stable_rank_normalize call instead"
)


def refuse_batched(weights: Sequence[Tensor]) -> None:
    """Raises RuntimeError for weights that torch.vmap maps over."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is None:
        return
    if any(torch._C._functorch.is_batchedtensor(w) for w in weights):
        raise RuntimeError(_BATCHED)


def plain_eager() -> bool:
    """Neither compiling nor under a torch.func transform."""
    return (
        not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is None
    )


def _new_like(
    weights: Sequence[Tensor], dtypes: Sequence[torch.dtype] | None = None
) -> list[Tensor]:
    """Uninitialised tensors with the weights' sizes and strides, and dtypes unless given."""
    same = [w.dtype for w in weights]
    dtypes = same if dtypes is None else list(dtypes)
    if torch.compiler.is_compiling():
        return [
            torch.empty_strided(w.shape, w.stride(), dtype=d, device=w.device)
            for w, d in zip(weights, dtypes, strict=True)
        ]
    if cpu.unavailable_reason() is None and weights[0].is_cpu and are_plain(weights):
        # Recycled memory: on a CPU, touching fresh pages costs more than the arithmetic.
        if dtypes == same:
            return cpu.take_like(weights)
        if len(set(dtypes)) == 1:
            return cpu.take_like(weights, dtypes[0])
    return [torch.empty_like(w, dtype=d) for w, d in zip(weights, dtypes, strict=True)]


class StableRankNormFunction(torch.autograd.Function):
    """W_hat of all layers of a round, with the gradient of constant u and v (Algorithm 2).

    ``apply(plan, record, None, *weights, *gains, *us, *vs)`` returns ``(*W_hat, round_state,
    stats)``, W_hat with the factor of a soft bound and a gain, if a layer has them; the last two
    carry no gradient. ``record`` is None or a ``Round`` to fill. Given a finished round's
    ``round_state`` and ``stats`` as two more arguments, the same W_hat is computed again without
    touching the state. In eager mode, ``apply(plan, record, (us, vs), *weights, *gains)`` spares
    autograd the look at tensors that never have a gradient. Twice differentiable in eager mode.
    Several backwards may reach one node; layers without a gradient get None.

    Example:
        >>> weight = torch.randn(4, 8, requires_grad=True)
        >>> u, v = torch.eye(4)[0], torch.eye(8)[0]
        >>> (out,) = srn.functional.stable_rank_normalize([weight], [u], [v], [2.0])
        >>> out.grad_fn.name()
        'StableRankNormFunctionBackward'
    """

    @staticmethod
    def forward(
        plan: Plan, record: Round | None, state: State | None, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        n, parameters = len(plan.dims), len(plan.dims) + plan.n_gains
        weights, gains, others = tensors[:n], tensors[n:parameters], tensors[parameters:]
        if state is None:
            us, vs, finished = others[:n], others[n : 2 * n], others[2 * n :]
        else:
            (us, vs), finished = state, others
        outs = _new_like(weights, plan.out_dtypes)
        if finished:
            round_state, stats = (t.clone() for t in finished)
        else:
            round_state = us[0].new_empty(plan.state_size)
            stats = us[0].new_empty((n, len(STATS)), dtype=torch.float64)
        ops.normalize(
            weights,
            us,
            vs,
            outs,
            round_state,
            stats,
            plan.offsets,
            plan.target_ranks,
            plan.iterations,
            plan.dims,
            plan.eps,
            gains,
            plan.gained,
            plan.sigma_max,
            plan.through,
            plan.rule,
            plan.backend,
        )
        return (*outs, round_state, stats)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        plan, record, _, *tensors = inputs
        n, parameters = len(plan.dims), len(plan.dims) + plan.n_gains
        weights, gains = tuple(tensors[:n]), tuple(tensors[n:parameters])
        round_state, stats = output[-2:]
        ctx.mark_non_differentiable(round_state, stats)
        ctx.set_materialize_grads(False)
        ctx.plan = plan
        ctx.state_arguments = len(tensors) - parameters
        # Saved tensors die with the first backward; a round may be reached by several (D(real) and
        # D(fake)), so in eager mode the node itself keeps them and checks their versions.
        ctx.kept = plain_eager()
        if ctx.kept:
            ctx.tensors = (*weights, *gains, round_state, stats)
            ctx.versions, ctx.gain_versions = versions_of(weights), versions_of(gains)
            ctx.record = record
            if record is not None:
                record.fill(round_state, stats, ctx.versions)
        else:
            ctx.save_for_backward(*weights, *gains, round_state, stats)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        plan = ctx.plan
        n = len(plan.dims)
        *parameters, round_state, stats = ctx.tensors if ctx.kept else ctx.saved_tensors
        weights, gains = parameters[:n], parameters[n:]
        if ctx.kept:
            begin_backward(plan, ctx.record, weights, ctx.versions, grads)
        wanted = ctx.needs_input_grad[3:]  # made anew by every look at it
        # Of each layer the place of its gain, if that wants a gradient.
        gained = [p if p >= 0 and wanted[n + p] else -1 for p in plan.gained] or [-1] * n
        rows = [i for i in range(n) if grads[i] is not None and (wanted[i] or gained[i] >= 0)]
        result: list[Tensor | None] = [None] * len(parameters)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # create_graph: the same formula in differentiable operations.
            if ctx.kept and versions_of(gains) != ctx.gain_versions:
                raise RuntimeError(
                    "a gain was changed in place between its normalisation and this backward"
                )
            for i in rows:
                settled = (round_state, stats, plan, i)
                if not plan.scaled(i):
                    result[i] = exact.graphed_gradient(grads[i], weights[i], *settled)
                    continue
                gain = gains[plan.gained[i]] if plan.gained[i] >= 0 else None
                result[i], by_gain = exact.graphed_scaled_gradient(
                    grads[i], weights[i], gain, *settled
                )
                if gained[i] >= 0:
                    result[n + gained[i]] = by_gain.to(gain.dtype).reshape(gain.shape)
        elif rows:

            def of_rows(column: Sequence[Any]) -> Sequence[Any]:
                return column if len(rows) == n else [column[i] for i in rows]

            chosen = of_rows(weights)
            given = _same_memory(of_rows(grads[:n]), chosen)
            outs = _new_like(chosen)
            places = [gained[i] for i in rows if gained[i] >= 0]
            grad_gains = [torch.empty_like(gains[p]) for p in places]
            ops.normalize_backward(
                given,
                chosen,
                round_state,
                stats,
                outs,
                rows,
                of_rows(plan.offsets),
                of_rows(plan.dims),
                grad_gains,
                [places.index(gained[i]) if gained[i] >= 0 else -1 for i in rows] if places else [],
                [plan.scaled(i) for i in rows] if plan.gained else [],
                of_rows(plan.target_ranks),
                of_rows(plan.eps),
                plan.gradient,
                plan.rule,
                plan.backend if is_traced() or are_plain(given) else "reference",
            )
            for i, out in zip([*rows, *(n + p for p in places)], [*outs, *grad_gains], strict=True):
                if wanted[i]:  # not of a frozen weight whose gain learns
                    result[i] = out
        return (None, None, None, *result, *[None] * ctx.state_arguments)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        plan: Plan,
        record: Round | None,
        state: State | None,
        *tensors: Tensor,
    ) -> Any:
        if any(d is not None for d in in_dims[3:]):
            raise RuntimeError(_BATCHED)
        outs = StableRankNormFunction.apply(plan, record, state, *tensors)
        return outs, (None,) * len(outs)


def run_round(
    plan: Plan,
    record: Round | None,
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    *finished: Tensor,
    gains: Sequence[Tensor] = (),
) -> tuple[Tensor, ...]:
    """:class:`StableRankNormFunction`, or its forward alone where nothing wants a gradient.

    ``finished``: nothing, or round_state and stats of the round to repeat. ``gains``: of the layers
    that have one, in their order.
    """
    if plan.backend == "reference" and not is_traced() and not are_plain(weights):
        with naming(plan.names[0], weights[0]):  # a call of its own, see srn_kernels.core.guard
            return _run(plan, record, weights, gains, us, vs, *finished)
    return _run(plan, record, weights, gains, us, vs, *finished)


def _run(
    plan: Plan,
    record: Round | None,
    weights: Sequence[Tensor],
    gains: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    *finished: Tensor,
) -> tuple[Tensor, ...]:
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*weights, *gains)):
        if plain_eager():
            # Function.apply would inspect forward's signature on every call, for 60 us.
            return super(torch.autograd.Function, StableRankNormFunction).apply(
                plan, record, (us, vs), *weights, *gains, *finished
            )
        return StableRankNormFunction.apply(
            plan, record, None, *weights, *gains, *us, *vs, *finished
        )
    outputs = StableRankNormFunction.forward(plan, record, (us, vs), *weights, *gains, *finished)
    if record is not None:
        record.fill(*outputs[-2:], versions_of(weights))
    return outputs


def _same_memory(grads: Sequence[Tensor], weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """``grads`` with the strides of ``weights``; copies only where they differ."""
    if not torch.compiler.is_compiling() and host.have_equal_strides(grads, weights):
        return grads
    return [
        g
        if g.stride() == w.stride()
        else torch.empty_strided(w.shape, w.stride(), dtype=g.dtype, device=g.device).copy_(g)
        for g, w in zip(grads, weights, strict=True)
    ]
