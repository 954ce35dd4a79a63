"""The registered ops: numbers of every backend, memory they write, and their registration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import oracle
import pytest
import torch
from live import live_backends
from oracle import DTYPES, LARGE, LAYOUTS, SMALL, Guarded, dtype_id
from torch import Tensor
from torch._subclasses import FakeTensorMode

from srn_kernels.core import ops
from srn_kernels.maths.matrix import padded, round_vectors
from srn_kernels.maths.scalars import STATS

BACKENDS = pytest.mark.parametrize("backend", live_backends())


class Call(NamedTuple):
    """Arguments of one normalize call, outputs poisoned and guarded."""

    weights: list[Tensor]
    us: list[Tensor]
    vs: list[Tensor]
    outs: list[Guarded]
    round_state: Guarded
    stats: Guarded
    offsets: list[int]
    ranks: list[float]
    iterations: list[int]
    dims: list[int]

    @classmethod
    def make(
        cls,
        layout: str,
        shapes: Sequence[tuple[int, int]],
        dtype: torch.dtype,
        iterations: int,
        out_dtype: torch.dtype | None = None,
    ) -> Call:
        made = [oracle.make_weight(layout, shape, dtype) for shape in shapes]
        weights = [w for w, _ in made]
        dims = [dim % w.dim() for w, dim in made]
        states = [oracle.make_state(w, dim) for w, dim in zip(weights, dims, strict=True)]
        offsets, size = ops.state_layout(shapes)
        return cls(
            weights,
            [u for u, _ in states],
            [v for _, v in states],
            [Guarded(w, out_dtype) for w in weights],
            Guarded(torch.empty(size, dtype=oracle.state_dtype(weights[0]))),
            Guarded(torch.empty(len(weights), len(STATS), dtype=torch.float64)),
            offsets,
            oracle.target_ranks(shapes),
            [iterations] * len(weights),
            dims,
        )

    def normalize(self, backend: str) -> None:
        ops.normalize(*self.arguments(backend))

    def arguments(self, backend: str) -> tuple:
        # A vector has no stable rank to lower: functional passes inf for it.
        ranks = [
            float("inf") if min(self.matrix_shape(i)) == 1 else r for i, r in enumerate(self.ranks)
        ]
        return (
            self.weights,
            self.us,
            self.vs,
            [o.tensor for o in self.outs],
            self.round_state.tensor,
            self.stats.tensor,
            self.offsets,
            ranks,
            self.iterations,
            self.dims,
            [1e-12] * len(self.weights),
            *([], [], [], []),  # no gain, no soft bound
            "stable_rank",
            backend,
        )

    def matrix_shape(self, i: int) -> tuple[int, int]:
        rows = self.weights[i].shape[self.dims[i]]
        return rows, self.weights[i].numel() // rows

    def vectors(self, i: int) -> tuple[Tensor, Tensor]:
        return round_vectors(
            self.round_state.tensor, self.offsets[i], self.weights[i], self.dims[i]
        )


# float64 output only for float64 weights; the other narrow types come from float32 weights.
OUT_DTYPES = [(d, None) for d in DTYPES] + [
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.bfloat16),
    (torch.float64, torch.float32),
    (torch.float64, torch.bfloat16),
]


def check_call(
    backend: str,
    layout: str,
    shapes: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    out_dtype: torch.dtype | None,
    iterations: int,
) -> None:
    call = Call.make(layout, shapes, dtype, iterations, out_dtype)
    before = [(u.clone(), v.clone()) for u, v in zip(call.us, call.vs, strict=True)]
    raw = [w.clone() for w in call.weights]
    call.normalize(backend)
    layers = []
    for i, weight in enumerate(call.weights):
        what = f"{shapes[i]}, rank {call.ranks[i]}"
        u, v = call.vectors(i)
        call.outs[i].assert_filled(f"{what}: W_hat")
        assert torch.equal(weight, raw[i]), f"{what}: the weight was written"
        moved = (u, v) if iterations > 0 else before[i]
        assert torch.equal(call.us[i], moved[0]), f"{what}: state u"
        assert torch.equal(call.vs[i], moved[1]), f"{what}: state v"
        layers.append(
            oracle.assert_forward(
                weight,
                call.dims[i],
                before[i],
                call.ranks[i],
                iterations,
                call.outs[i].tensor,
                u,
                v,
                stats=call.stats.tensor[i],
                what=what,
            )
        )
    # Some layers have no gradient, others with every number of iterations.
    rows = [i for i in range(len(shapes)) if i % 3 != iterations]
    grads = [torch.randn_like(call.outs[i].tensor) for i in rows]
    results = [Guarded(call.weights[i]) for i in rows]
    ops.normalize_backward(
        grads,
        [call.weights[i] for i in rows],
        call.round_state.tensor,
        call.stats.tensor,
        [r.tensor for r in results],
        rows,
        [call.offsets[i] for i in rows],
        [call.dims[i] for i in rows],
        *([], [], []),  # no gain, no factor
        [call.ranks[i] for i in rows],
        [1e-12] * len(rows),
        "frozen",
        "stable_rank",
        backend,
    )
    for i, g, result in zip(rows, grads, results, strict=True):
        what = f"{shapes[i]}, rank {call.ranks[i]}"
        result.assert_filled(f"{what}: dL/dW")
        oracle.assert_gradient(layers[i], g, result.tensor, call.dims[i], what)


@BACKENDS
@pytest.mark.parametrize(("dtype", "out_dtype"), OUT_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_small_layers_agree_with_the_oracle(backend, layout, dtype, out_dtype):
    for iterations in (0, 1, 2):
        check_call(backend, layout, SMALL, dtype, out_dtype, iterations)


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_layers_agree_with_the_oracle(backend, layout, dtype):
    check_call(backend, layout, LARGE, dtype, None, 1)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
def test_five_iterations_and_a_large_evaluation_agree_with_the_oracle(backend, dtype):
    check_call(backend, "linear", LARGE, dtype, None, 0)
    check_call(backend, "channels-last-transpose", [(300, 900), (64, 576)], dtype, None, 5)


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_repeated_round_gives_the_same_bits_and_moves_nothing(backend, layout, dtype):
    shapes = [(27, 63), (3, 5), (300, 900)]
    call = Call.make(layout, shapes, dtype, 1)
    call.normalize(backend)
    again = call._replace(
        outs=[Guarded(w) for w in call.weights],
        iterations=[-1] * len(shapes),
        # The state has moved on since; the round keeps its own.
        us=[torch.zeros_like(u) for u in call.us],
        vs=[torch.zeros_like(v) for v in call.vs],
    )
    kept = call.round_state.storage.clone(), call.stats.storage.clone()
    again.normalize(backend)
    for before, after in zip(call.outs, again.outs, strict=True):
        after.assert_filled("repeated W_hat")
        if backend == "reference":  # computes a W + b E in another order than its first time
            bound = 8 * oracle.unit_of(dtype) * (before.tensor.double().abs() + 1)
            oracle.assert_within(after.tensor, before.tensor.double(), bound, "repeated W_hat")
        else:
            assert torch.equal(before.tensor, after.tensor)
    assert not any(x.any() for x in (*again.us, *again.vs))
    for now, then in zip((call.round_state.storage, call.stats.storage), kept, strict=True):
        assert torch.equal(now.nan_to_num(), then.nan_to_num())


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_project_overwrites_the_weights_with_what_normalize_returns(backend, layout, dtype):
    shapes = [(27, 63), (1, 7), (300, 900)]
    call = Call.make(layout, shapes, dtype, 1)
    us, vs = [u.clone() for u in call.us], [v.clone() for v in call.vs]
    weights = [Guarded(w) for w in call.weights]
    for guarded, w in zip(weights, call.weights, strict=True):
        guarded.tensor.copy_(w)
    call = call._replace(weights=[w.tensor for w in weights])
    versions = [w.tensor._version for w in weights], [u._version for u in us]
    call.normalize(backend)
    arguments = call.arguments(backend)
    ops.project([w.tensor for w in weights], us, vs, *arguments[7:11], backend)
    for i, guarded in enumerate(weights):
        guarded.assert_filled("projected weight")
        assert torch.equal(guarded.tensor, call.outs[i].tensor)
        assert torch.equal(us[i], call.us[i])
        assert torch.equal(vs[i], call.vs[i])
        assert guarded.tensor._version > versions[0][i]
        assert us[i]._version > versions[1][i]


@BACKENDS
def test_round_state_padding_and_stats_of_other_rows_stay_untouched(backend):
    shapes = [(3, 5), (7, 9)]
    call = Call.make("linear", shapes, torch.float32, 1)
    call.normalize(backend)
    written = torch.zeros_like(call.round_state.tensor, dtype=torch.bool)
    for (rows, columns), offset in zip(shapes, call.offsets, strict=True):
        written[offset : offset + rows] = True
        written[offset + padded(rows) : offset + padded(rows) + columns] = True
    assert torch.equal(~call.round_state.tensor.isnan(), written)
    assert not call.stats.tensor.isnan().any()


def sample_arguments(dtype: torch.dtype, layout: str, backend: str) -> tuple[tuple, tuple, tuple]:
    """Plain arguments of the three ops, from one round of two layers."""
    shapes = [(5, 12), (3, 4)]
    call = Call.make(layout, shapes, dtype, 1)
    arguments = call.arguments(backend)
    outs = [torch.zeros_like(w) for w in call.weights]
    size = call.round_state.tensor.numel()
    state = torch.zeros(size, dtype=oracle.state_dtype(call.weights[0]))
    stats = torch.zeros(2, len(STATS), dtype=torch.float64)
    forward = (*arguments[:3], outs, state, stats, *arguments[6:])
    done = (*arguments[:3], outs, state.clone(), stats.clone(), *arguments[6:])
    ops.normalize(*done)
    grads = [torch.randn_like(w) for w in call.weights]
    backward = (
        grads,
        call.weights,
        done[4],
        done[5],
        [torch.zeros_like(w) for w in call.weights],
        [0, 1],
        call.offsets,
        call.dims,
        [],
        [],
        [],
        call.ranks,
        [1e-12] * len(call.weights),
        "exact",
        "stable_rank",
        backend,
    )
    return forward, backward, (*arguments[:3], *arguments[7:11], backend)


@BACKENDS
@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        (torch.float32, "linear"),
        (torch.float32, "channels-last-transpose"),
        (torch.float64, "transposed"),
        (torch.bfloat16, "channels-last"),
        (torch.float16, "linear"),
    ],
    ids=dtype_id,
)
@pytest.mark.parametrize("op", ["normalize", "normalize_backward", "project"])
def test_opcheck(backend, op, dtype, layout):
    forward, backward, project = sample_arguments(dtype, layout, backend)
    arguments = {"normalize": forward, "normalize_backward": backward, "project": project}[op]
    torch.library.opcheck(getattr(torch.ops.srn_kernels, op).default, arguments)


@pytest.mark.parametrize("op", ["normalize", "normalize_backward", "project"])
def test_fake_tensors_run_no_kernel_and_keep_their_metadata(op):
    samples = sample_arguments(torch.float32, "channels-last", "reference")
    arguments = samples[["normalize", "normalize_backward", "project"].index(op)]
    with FakeTensorMode() as mode:
        fake = torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, arguments)
        before = [
            (t.shape, t.stride(), t.dtype)
            for t in torch.utils._pytree.tree_leaves(fake)
            if isinstance(t, Tensor)
        ]
        assert getattr(torch.ops.srn_kernels, op)(*fake) is None
    after = [t for t in torch.utils._pytree.tree_leaves(fake) if isinstance(t, Tensor)]
    assert before == [(t.shape, t.stride(), t.dtype) for t in after]


def test_ops_refuse_an_unknown_backend():
    forward, _, _ = sample_arguments(torch.float32, "linear", "reference")
    with pytest.raises(ModuleNotFoundError, match="nowhere"):
        ops.normalize(*forward[:-1], "nowhere")
