"""Any layer that hypothesis draws, through every backend, against the oracle."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from live import live_backends, serves
from one_layer import run
from oracle import DTYPES, LAYOUTS


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 130),
    exponent=st.integers(-6, 12),
    fraction=st.sampled_from([0.0, 0.1, 0.4, 0.8, math.inf]),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(sorted(LAYOUTS)),
    iterations=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize("backend", live_backends())
def test_any_layer_agrees_with_the_oracle(
    backend, rows, columns, exponent, fraction, dtype, layout, iterations, seed
):
    assume(serves(backend, dtype))
    torch.manual_seed(seed)
    weight, dim = oracle.make_weight(layout, (rows, columns), torch.float64)
    # 16-bit weights keep a scale that float16 can hold.
    scale = 10.0**exponent if dtype in (torch.float32, torch.float64) else 2.0 ** (exponent / 3)
    weight = (weight * scale).to(dtype)
    rank = max(1.0, fraction * min(rows, columns)) if fraction < math.inf else math.inf
    if min(rows, columns) == 1:
        rank = math.inf
    result = run(backend, weight, rank, iterations=iterations, dim=dim)
    w = oracle.matrix_of(weight, dim)
    pair = (result.u, result.v) if iterations else oracle.iterate(w, *result.before, 0)
    layer = oracle.normalized(w, *pair, rank)
    bounds = oracle.Bounds(layer, oracle.unit_of(result.u.dtype))
    if abs(layer.q - (rank - 1)) <= bounds.q:
        return  # either branch is right, and their gradients differ
    result.check(rank, iterations=iterations, dim=dim)
