"""The C++ backend: instruction sets, threads, conversions and range."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import oracle
import pytest
import torch
from oracle import DTYPES, LARGE, SMALL, dtype_id
from torch import Tensor

from srn_kernels import functional
from srn_kernels.backends import cpu
from srn_kernels.core import ops
from srn_kernels.maths.scalars import STATS

pytestmark = pytest.mark.skipif(cpu._cpu is None, reason=f"cpu: {cpu.unavailable_reason()}")

ISAS = ("baseline", "avx2", "avx512")


@pytest.fixture(params=ISAS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    if not cpu._cpu.select_instruction_set(request.param):
        pytest.skip(f"this processor cannot run {request.param}")
    assert cpu.instruction_set() == request.param
    yield request.param
    assert cpu._cpu.select_instruction_set("auto")


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run_round(
    weights: list[Tensor],
    dims: list[int],
    ranks: list[float],
    *,
    training: bool = True,
    out_dtype: torch.dtype | None = None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """(us, vs, W_hat, G, dL/dW) of one round through the cpu backend, from a fixed state."""
    leaves = [w.detach().requires_grad_() for w in weights]
    streams = [torch.Generator().manual_seed(i) for i in range(len(weights))]
    us, vs = [], []
    for w, dim, stream in zip(weights, dims, streams, strict=True):
        rows = w.shape[dim]
        u, v = (torch.randn(n, generator=stream) for n in (rows, w.numel() // rows))
        us.append((u / u.norm()).to(oracle.state_dtype(w)))
        vs.append((v / v.norm()).to(oracle.state_dtype(w)))
    outs = functional.stable_rank_normalize(
        leaves, us, vs, ranks, dims=dims, training=training, out_dtype=out_dtype, backend="cpu"
    )
    grads = [
        torch.randn(o.shape, generator=g).to(o.dtype) for o, g in zip(outs, streams, strict=True)
    ]
    results = torch.autograd.grad(outs, leaves, grads)
    return us, vs, [o.detach() for o in outs], grads, list(results)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("layout", ["linear", "conv-transpose", "permuted"])
def test_every_instruction_set_agrees_with_the_oracle(instruction_set, layout, dtype):
    shapes = [*SMALL, *LARGE]
    made = [oracle.make_weight(layout, s, dtype) for s in shapes]
    weights, dims = [w for w, _ in made], [d for _, d in made]
    ranks = oracle.target_ranks(shapes)
    start = run_round(weights, dims, ranks, training=False)[:2]
    us, vs, outs, grads, results = run_round(weights, dims, ranks)
    for i, weight in enumerate(weights):
        what = f"{shapes[i]}, rank {ranks[i]}"
        before = start[0][i], start[1][i]
        layer = oracle.assert_forward(
            weight, dims[i], before, ranks[i], 1, outs[i], us[i], vs[i], what=what
        )
        oracle.assert_gradient(layer, grads[i], results[i], dims[i], what)


@pytest.mark.parametrize("scale", [1e-11, 1e18])
def test_every_instruction_set_covers_the_range_of_float32(instruction_set, scale):
    weight = torch.randn(40, 1500) * scale  # the squares' sums leave float32
    start = run_round([weight], [0], [2.5], training=False)[:2]
    us, vs, outs, grads, results = run_round([weight], [0], [2.5])
    before = start[0][0], start[1][0]
    layer = oracle.assert_forward(weight, 0, before, 2.5, 1, outs[0], us[0], vs[0])
    oracle.assert_gradient(layer, grads[0], results[0], 0, "dL/dW")


def test_an_instruction_set_that_does_not_exist_is_refused_and_changes_nothing():
    before = cpu.instruction_set()
    assert not cpu._cpu.select_instruction_set("avx1024")
    assert cpu.instruction_set() == before


# Conversions, over all 65536 values of a 16-bit format. With W v = 0 a layer passes W through
# unchanged and G unchanged, so that the only arithmetic left is the conversion.
NARROW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
# Rows of 3 go through the scalar code of every instruction set, rows of 64 + 1 through both.
WIDTHS = pytest.mark.parametrize("columns", [3, 65])


def every_value(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def neighbourhood(dtype: torch.dtype) -> Tensor:
    """Float32: each finite value of ``dtype``, the midpoint to the next, and their neighbours."""
    values = every_value(dtype).float()
    values = values[values.isfinite()].sort().values.unique()
    top = values[-1] + (values[-1] - values[-2]) / 2
    midpoints = (values[1:].double() + values[:-1].double()).div(2).float()
    points = torch.cat([values, midpoints, top[None], -top[None]])
    up, down = (torch.nextafter(points, torch.tensor(end)) for end in (torch.inf, -torch.inf))
    return torch.cat([points, up, down])


def with_zero_column(values: Tensor, columns: int) -> Tensor:
    """Rows of ``columns`` elements that hold all values, the first column zero."""
    rows = -(-len(values) // (columns - 1))
    w = torch.zeros(rows * (columns - 1), dtype=values.dtype)
    w[: len(values)] = values
    return torch.cat([w.new_zeros(rows, 1), w.view(rows, columns - 1)], 1)


def pass_through(w: Tensor, out_dtype: torch.dtype, g: Tensor | None = None) -> Tensor:
    """W_hat, or dL/dW for the gradient ``g``, of a layer whose sigma is exactly 0."""
    w.requires_grad_(g is not None)
    v = torch.zeros(w.shape[1])
    v[0] = 1.0
    u = torch.ones(w.shape[0]) / w.shape[0] ** 0.5
    (out,) = functional.stable_rank_normalize(
        [w], [u], [v], [2.0], training=False, out_dtype=out_dtype, backend="cpu"
    )
    return out.detach() if g is None else torch.autograd.grad(out, w, g)[0]


def assert_same_numbers(actual: Tensor, expected: Tensor) -> None:
    """Equal, NaN equal to NaN; in float64, which holds all of them."""
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=0, equal_nan=True)


@NARROW
@WIDTHS
def test_every_16_bit_weight_is_read_exactly(instruction_set, dtype, columns):
    values = every_value(dtype)
    w = with_zero_column(values[values.isfinite()], columns)
    assert_same_numbers(pass_through(w, torch.float32), w.float())
    assert_same_numbers(pass_through(w, dtype), w)


@NARROW
@WIDTHS
def test_every_16_bit_gradient_is_read_exactly_infinities_and_nan_too(
    instruction_set, dtype, columns
):
    g = with_zero_column(every_value(dtype), columns)
    w = torch.zeros(g.shape)
    assert_same_numbers(pass_through(w, dtype, g), g.float())


@NARROW
@WIDTHS
def test_weights_are_rounded_to_nearest_even_with_subnormals_and_overflow(
    instruction_set, dtype, columns
):
    w = with_zero_column(neighbourhood(dtype), columns)
    expected = w.to(dtype)
    assert expected.isinf().any()
    assert ((expected != 0) & (expected.abs() < torch.finfo(dtype).tiny)).any()
    assert_same_numbers(pass_through(w, dtype), expected)


@NARROW
@WIDTHS
def test_gradients_are_rounded_to_nearest_even_with_nan_and_infinity(
    instruction_set, dtype, columns
):
    special = torch.tensor([float("inf"), float("-inf"), float("nan")])
    g = with_zero_column(torch.cat([neighbourhood(dtype), special.repeat(100)]), columns)
    w = torch.zeros(g.shape, dtype=dtype)
    assert_same_numbers(pass_through(w, torch.float32, g), g.to(dtype))


# Threads.


def tensors_of(result: tuple[list[Tensor], ...]) -> list[Tensor]:
    return [t.clone() for part in result for t in part]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("layout", ["linear", "channels-last-transpose"])
def test_results_are_the_same_bits_for_any_number_of_threads(threads, layout, dtype):
    shapes = [(300, 2500), (1, 7), (2048, 36), (12, 13824), (27, 63), (5, 5)]
    made = [oracle.make_weight(layout, s, dtype) for s in shapes]
    weights, dims = [w for w, _ in made], [d for _, d in made]
    ranks = oracle.target_ranks(shapes)
    torch.set_num_threads(1)
    expected = tensors_of(run_round(weights, dims, ranks))
    for count in (2, 3, 5, 2, 1):
        torch.set_num_threads(count)
        actual = run_round(weights, dims, ranks)
        assert all(map(torch.equal, tensors_of(actual), expected)), f"{count} threads"


STREAMED = 8 << 20  # bytes; a call that writes more goes past the cache


def test_a_layer_has_the_same_bits_alone_and_in_a_call_larger_than_the_cache(instruction_set):
    # Odd rows: the aligned stores begin at another element in each.
    odd = torch.randn(63, 1001)
    large = torch.ones(STREAMED // odd.element_size() // 4096 + 1, 4096)
    ranks = [2.0, float("inf")]
    alone = run_round([odd], [0], ranks[:1])
    together = run_round([odd, large], [0, 0], ranks)
    for part, whole in zip(alone, together, strict=True):
        assert torch.equal(part[0], whole[0])
    # The large one has rank 1 and equal elements: W / sigma = E is constant.
    constant = large[::97].double() * large.numel() ** -0.5
    bound = 8 * oracle.summed(large.numel(), oracle.unit_of(torch.float32)) * constant
    oracle.assert_within(together[2][1][::97], constant, bound, "large W_hat")


def test_rounds_on_several_python_threads_do_not_disturb_each_other(threads):
    torch.set_num_threads(2)
    # A set of weights for each thread; the scratch memory and the recycler are common.
    sets = [
        [torch.randn(shape) for shape in [(64 + 8 * k, 700), (5, 7), (200, 300)]] for k in range(3)
    ]
    expected = [tensors_of(run_round(ws, [0] * 3, [2.0] * 3)) for ws in sets]
    wrong: list[str] = []

    def work(k: int) -> None:
        for step in range(15):
            actual = tensors_of(run_round(sets[k], [0] * 3, [2.0] * 3))
            if not all(map(torch.equal, actual, expected[k])):
                wrong.append(f"thread {k}, step {step}")

    workers = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


# Checks of the binding itself: what reaches it is never silently wrong.


def test_the_binding_refuses_tensors_that_do_not_fit():
    w, (u, v) = torch.randn(4, 6), oracle.make_state(torch.randn(4, 6))
    state, stats = torch.zeros(32), torch.zeros(1, len(STATS), dtype=torch.float64)

    def call(**changed: object) -> None:
        arguments = {
            "weights": [w],
            "us": [u],
            "vs": [v],
            "outs": [torch.empty_like(w)],
            "round_state": state,
            "stats": stats,
            "offsets": [0],
            "ranks": [2.0],
            "iterations": [1],
            "dims": [0],
            "eps": [1e-12],
            "gains": [],
            "gained": [],
            "sigma_max": [],
            "through": [],
        }
        ops.normalize(*{**arguments, **changed}.values(), "stable_rank", "cpu")

    call()
    before = u.clone()
    for changed, error, message in [
        ({"us": [u.double()]}, ValueError, "u must be"),
        ({"vs": [v[:-1]]}, ValueError, "v must be"),
        ({"outs": [torch.empty(6, 4).T]}, ValueError, "out must have the sizes and strides"),
        ({"outs": [w.double()]}, TypeError, "float64 output"),
        ({"round_state": state[:-11]}, ValueError, "round_state is too small"),
        ({"stats": stats.float()}, ValueError, "stats must be"),
        ({"offsets": [1]}, ValueError, "round_state is too small"),
        ({"dims": [2]}, ValueError, "dim 2 of a 2-dimensional"),
        ({"iterations": [1, 1]}, ValueError, "lists of different lengths"),
        ({"weights": [torch.randn(4, 12)[:, ::2]]}, ValueError, "not dense"),
        ({"weights": [w.int()]}, TypeError, "unsupported dtype"),
        ({"sigma_max": [1.0, 1.0]}, ValueError, "lists of different lengths"),
        ({"gained": [0]}, ValueError, "gain 0 of 0"),
        ({"gains": [torch.ones(2)], "gained": [0]}, ValueError, "a gain must have one element"),
        ({"gains": [torch.ones(1).int()], "gained": [0]}, TypeError, "unsupported dtype"),
    ]:
        if "offsets" in changed:
            changed = {**changed, "round_state": state[:22]}
        with pytest.raises(error, match=message):
            call(**changed)
    assert torch.equal(u, before)
