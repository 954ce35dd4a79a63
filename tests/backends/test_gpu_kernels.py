"""The kernels of both GPU backends against the float64 oracle; see test_cuda_kernels.py and
test_triton_kernels.py for what each has of its own."""

from __future__ import annotations

from types import ModuleType

import oracle
import pytest
import torch
from gpu_rounds import (
    Round,
    check_a_repeated_round,
    check_edge_cases,
    check_evaluation_with_shrunk_and_negative_vectors,
    check_range,
    check_round,
    scaled_down,
)
from scaled_rounds import check_scaled_rounds

from benchmarks.cases import workloads
from srn_kernels import backends
from srn_kernels.maths.matrix import padded

WORKLOADS = workloads.load()
pytestmark = pytest.mark.parametrize("backend", ["cuda", "triton"])


@pytest.fixture
def kernels(backend: str, request: pytest.FixtureRequest) -> ModuleType:
    """A backend's module, in the surroundings of its own tests."""
    module = backends.load(backend)
    if reason := module.unavailable_reason():
        pytest.skip(f"{backend}: {reason}")
    if backend == "triton":
        request.getfixturevalue("small_tiles")
        request.getfixturevalue("poisoned")
    return module


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_workload_scaled_down(kernels, name):
    check_round(Round.make([(torch.randn(s), 0) for s in scaled_down(name)], backend=kernels))


def test_mixed_dtypes_layouts_and_iterations_in_one_launch(kernels):
    kinds = ["linear", "conv-transpose", "channels-last", "transposed", "linear"]
    types = [torch.float32, torch.bfloat16, torch.float16]
    made, outs, iterations = [], [], []
    for i, dtype in enumerate(types):
        for k, kind in enumerate(kinds):
            shape = [(40, 144), (33, 96), (24, 27)][(i + k) % 3]
            made.append(oracle.make_weight(kind, shape, dtype))
            outs.append(types[(i + k) % 3])
            iterations.append((1, 0, 2)[k % 3])
    made.append((torch.randn(6, 9, 5, 5), 1))  # 25 elements from one row to the next
    outs.append(None)
    iterations.append(2)
    check_round(Round.make(made, outs, backend=kernels), iterations)


@pytest.mark.parametrize("scale", [1e-11, 1e-6, 1.0, 1e12, 1e18])
def test_range(kernels, scale):
    check_range(kernels, scale)


@pytest.mark.parametrize("iterations", [0, 1, 2])
def test_edge_cases(kernels, iterations):
    check_edge_cases(kernels, iterations)


def test_evaluation_with_shrunk_and_negative_vectors(kernels):
    check_evaluation_with_shrunk_and_negative_vectors(kernels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=oracle.dtype_id)
def test_soft_bounds_and_gains(kernels, dtype):
    check_scaled_rounds(kernels, dtype)


def test_a_repeated_round_has_the_same_bits(kernels):
    check_a_repeated_round(kernels)


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=oracle.dtype_id)
def test_projection_in_place_equals_the_forward(kernels, dtype):
    weights = [oracle.make_weight(k, (36, 144), dtype) for k in oracle.LAYOUTS]
    made = Round.make(weights, backend=kernels)
    projected = made.copy()
    projected = projected._replace(outs=projected.weights)
    made.normalize(2)
    projected.normalize(2)
    assert all(torch.equal(a, b) for a, b in zip(made.outs, projected.weights, strict=True))


def test_the_padding_of_a_rounds_state_stays_untouched(kernels):
    made = Round.make([(torch.randn(3, 5), 0), (torch.randn(7, 9), 0)], backend=kernels)
    made.normalize(1)
    written = torch.zeros_like(made.round_state, dtype=torch.bool)
    for (rows, columns), offset in zip([(3, 5), (7, 9)], made.offsets, strict=True):
        written[offset : offset + rows] = True
        written[offset + padded(rows) : offset + padded(rows) + columns] = True
    assert torch.equal(~made.round_state.isnan(), written)
