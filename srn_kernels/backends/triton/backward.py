"""The backward kernel: dL/dW of all layers; see common.py."""

from __future__ import annotations

import triton
import triton.language as tl

from srn_kernels.backends.triton.common import (
    COUNTER_STRIDE,
    FIELDS,
    FIRST_COUNTER,
    POINTERS,
    SCRATCH,
    SLABS,
    SPECTRAL,
    STABLE_RANK,
    STATS,
    STATS_ROW,
    SUMS,
    TICKET,
    _arrive,
    _chunk,
    _leave,
    _load_v,
    _pointer,
    _round_vectors,
    _row_offset,
    _row_range,
    _shape,
    _store_gain,
    _wait,
)


@triton.jit
def _backward_tile(
    record,
    pointers,
    scratch,
    round_state,
    index,
    VARIANTS: tl.constexpr,
    N: tl.constexpr,
    COMBINE: tl.constexpr,
):
    """One slab's <G, W> and u^T G v; or, with COMBINE, its dL/dW."""
    BA: tl.constexpr = VARIANTS[N][0]
    BR: tl.constexpr = VARIANTS[N][1]
    BB: tl.constexpr = VARIANTS[N][2]
    DTYPE: tl.constexpr = VARIANTS[N][3]
    ALIGN: tl.constexpr = VARIANTS[N][4]
    STAGES: tl.constexpr = VARIANTS[N][5]
    GRAD_DTYPE: tl.constexpr = VARIANTS[N][6]
    KEEP: tl.constexpr = not COMBINE and VARIANTS[N][7]
    POLICY: tl.constexpr = "evict_last" if KEEP else "evict_first"
    rows, columns, inner, chunks = _shape(record, BA, BB, ALIGN)
    grad = _pointer(pointers, 0, GRAD_DTYPE, ALIGN)
    weight = _pointer(pointers, 1, DTYPE, ALIGN)
    grad_weight = _pointer(pointers, 2, DTYPE, ALIGN)
    sums = (scratch + tl.load(record + SCRATCH)).to(tl.pointer_type(tl.float64))
    u_in, v_in = _round_vectors(record, round_state, rows)
    begin, end = _row_range(record, index, rows, BR, BB, ALIGN)
    if COMBINE:
        scale = tl.load(sums, cache_modifier=".cg").to(tl.float32)
        w_part = tl.load(sums + 1, cache_modifier=".cg").to(tl.float32)
        outer = tl.load(sums + 2, cache_modifier=".cg").to(tl.float32)
    else:
        g_w = tl.zeros([BR, BA * BB], tl.float32)
        g_e = tl.zeros([BR, BA * BB], tl.float32)
    for chunk in range(chunks):
        c, offset, mask = _chunk(chunk, rows, columns, inner, BA, BB)
        v = _load_v(record, v_in, c, mask)
        for first in tl.range(begin, end, BR, num_stages=STAGES):
            r = first + tl.arange(0, BR)
            at = _row_offset(r, inner, BB)[:, None] + offset[None, :]
            here = (r < end)[:, None] & mask[None, :]
            g = tl.load(grad + at, mask=here, other=0.0, eviction_policy=POLICY).to(tl.float32)
            w = tl.load(weight + at, mask=here, other=0.0, eviction_policy=POLICY).to(tl.float32)
            e = tl.load(u_in + r, mask=r < end, other=0.0)[:, None] * v[None, :]
            if COMBINE:
                d_w = scale * (g + w_part * w) + outer * e
                tl.store(grad_weight + at, d_w.to(DTYPE), mask=here, eviction_policy="evict_first")
            else:
                g_w += g * w
                g_e += g * e
    if not COMBINE:
        tl.store(sums + 4 + 2 * index, tl.sum(g_w.to(tl.float64)))
        tl.store(sums + 5 + 2 * index, tl.sum(g_e.to(tl.float64)))


@triton.jit
def _finish_gradient(record, pointers, scratch, stats):
    """dL/dW = scale (G + weight W) + outer u v^T, from g_w = <G, W> and g_e = u^T G v."""
    sums = (scratch + tl.load(record + SCRATCH)).to(tl.pointer_type(tl.float64))
    slabs = tl.load(record + SLABS).to(tl.int32)
    g_w = tl.zeros([SUMS], tl.float64)
    g_e = tl.zeros([SUMS], tl.float64)
    for first in range(0, slabs, SUMS):
        i = first + tl.arange(0, SUMS)
        g_w += tl.load(sums + 4 + 2 * i, mask=i < slabs, other=0.0, cache_modifier=".cg")
        g_e += tl.load(sums + 5 + 2 * i, mask=i < slabs, other=0.0, cache_modifier=".cg")
    row = stats + tl.load(record + STATS_ROW) * STATS
    branch = tl.load(row + 6)
    good = branch <= STABLE_RANK
    gamma = tl.load(row + 3)
    moving = (branch == STABLE_RANK) & (gamma > 0)
    sigma = tl.where(good, tl.load(row), 1.0)
    q = tl.where(moving, tl.load(row + 2), 1.0)
    a = tl.load(row + 4)
    with_w, with_e = tl.sum(g_w), tl.sum(g_e)
    inner = a * with_w + tl.load(row + 5) * with_e  # <G, W_hat>
    projected = with_w / sigma
    d = projected - with_e
    # |W|_F^2 / (q sigma^2) = (q + 1) / q; the frozen gradient of r = 1 (gamma = 0) is zero
    outer = tl.where(moving, (q + 1) / q * d - projected, 0.0)
    outer = tl.where(branch == SPECTRAL, -projected, outer)
    scale, by_sigma = a * tl.load(row + 8), tl.load(row + 10)
    tl.store(sums, scale)
    tl.store(sums + 1, tl.where(moving, -d / (q * sigma), 0.0))
    # d sigma / dW = u v^T; an infinite gradient times 0 is none
    tl.store(sums + 2, scale * outer + tl.where(by_sigma != 0, inner * by_sigma, 0.0))
    _store_gain(record, pointers, inner * tl.load(row + 9))


@triton.jit(do_not_specialize=["n_tiles", "n_layers"])
def backward_kernel(
    tiles,
    n_tiles,
    n_layers,
    all_pointers,
    records,
    counters,
    scratch,
    round_state,
    stats,
    SLAB_VARIANTS: tl.constexpr,
    COMBINE_VARIANTS: tl.constexpr,
):
    """dL/dW of all layers from G = dL/dW_hat, u and v held constant."""
    # Taking a tile binds names for the whole loop: normalize_kernel has the same lines.
    ticket = tl.atomic_add(counters + TICKET * COUNTER_STRIDE, 1, sem="relaxed")
    while ticket < n_tiles:
        layer = tl.load(tiles + ticket * 4)
        op = tl.load(tiles + ticket * 4 + 1)
        index = tl.load(tiles + ticket * 4 + 2)
        wait = tl.load(tiles + ticket * 4 + 3)
        counter = counters + (layer + FIRST_COUNTER) * COUNTER_STRIDE
        record = records + layer * FIELDS
        pointers = all_pointers + layer * POINTERS
        if wait > 0:
            _wait(counter, wait)
        for i in tl.static_range(len(COMBINE_VARIANTS)):
            if op == 1 + len(SLAB_VARIANTS) + i:
                _backward_tile(
                    record, pointers, scratch, round_state, index, COMBINE_VARIANTS, i, True
                )
        for i in tl.static_range(len(SLAB_VARIANTS)):
            if op == 1 + i:
                _backward_tile(
                    record, pointers, scratch, round_state, index, SLAB_VARIANTS, i, False
                )
        if op <= len(SLAB_VARIANTS):
            before = _arrive(counter)
            if before == tl.load(record + SLABS).to(tl.int32) - 1:
                _finish_gradient(record, pointers, scratch, stats)
                _arrive(counter)
        ticket = tl.atomic_add(counters + TICKET * COUNTER_STRIDE, 1, sem="relaxed")
    _leave(counters, n_layers)
