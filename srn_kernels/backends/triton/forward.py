"""The forward kernel: power iterations, statistics and W_hat of all layers; see common.py.

Beyond 400 lines because a kernel is one program, its phases in their order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from srn_kernels.backends.triton.common import (
    ALL,
    COLUMN_BLOCK,
    COLUMN_TILES,
    COLUMN_WIDTH,
    COLUMNS,
    COUNTER_STRIDE,
    EPS,
    FIELDS,
    FIRST_COUNTER,
    GROW_SQ,
    ITERATIONS,
    LANES,
    LARGEST,
    NON_FINITE,
    PAD,
    PASS_THROUGH,
    POINTERS,
    ROWS,
    SHARE_BLOCK,
    SHRINK,
    SHRINK_SQ,
    SLABS,
    SPECTRAL,
    STABLE_RANK,
    STATS,
    STATS_ROW,
    TARGET_RANK,
    TICKET,
    VECTOR,
    ZERO,
    _arrive,
    _chunk,
    _double,
    _factor,
    _leave,
    _load_v,
    _matrix_column,
    _padded,
    _pointer,
    _round_vectors,
    _row_offset,
    _row_range,
    _shape,
    _wait,
    _workspace,
)


@triton.jit
def _slab_v(record, state, t_work, c, mask, first_pass):
    """The stored v, or the v of the pass before, which is in memory order."""
    if first_pass:
        v = _load_v(record, state, c, mask)
    else:
        v = tl.load(t_work + c, mask=mask, other=0.0, cache_modifier=".cg")
    return v


@triton.jit
def _add_both(a, b, c, d):
    return a + c, b + d


@triton.jit
def _slab(record, pointers, scratch, index, first_pass, VARIANTS: tl.constexpr, N: tl.constexpr):
    BA: tl.constexpr = VARIANTS[N][0]
    BR: tl.constexpr = VARIANTS[N][1]
    BB: tl.constexpr = VARIANTS[N][2]
    DTYPE: tl.constexpr = VARIANTS[N][3]
    ALIGN: tl.constexpr = VARIANTS[N][4]
    STAGES: tl.constexpr = VARIANTS[N][5]
    POLICY: tl.constexpr = "evict_last" if VARIANTS[N][6] else "evict_first"
    WHOLE: tl.constexpr = VARIANTS[N][7]
    rows, columns, inner, chunks = _shape(record, BA, BB, ALIGN)
    weight = _pointer(pointers, 0, DTYPE, ALIGN)
    squares, s_out, t_work, shares = _workspace(record, scratch)
    share = shares + index.to(tl.int64) * _padded(columns, PAD)
    iterate = tl.load(record + ITERATIONS) > 0
    state = _pointer(pointers, 3, tl.float32, ALIGN)
    begin, end = _row_range(record, index, rows, BR, BB, ALIGN)

    f = tl.zeros([BR], tl.float32)
    if WHOLE:
        # A zero that the compiler does not know: it would keep every variant's column numbers in
        # registers over the whole list of tiles.
        chunk = tl.load(record + ZERO).to(tl.int32)
        c, offset, mask = _chunk(chunk, rows, columns, inner, BA, BB)
        v = _slab_v(record, state, t_work, c, mask, first_pass)
        t = tl.zeros([BR, BA * BB], tl.float32)
        for first in tl.range(begin, end, BR, num_stages=STAGES):
            r = first + tl.arange(0, BR)
            w = tl.load(
                weight + (_row_offset(r, inner, BB)[:, None] + offset[None, :]),
                mask=(r < end)[:, None] & mask[None, :],
                other=0.0,
                eviction_policy=POLICY,
            ).to(tl.float32)
            # Both sums through one exchange between the warps.
            s, f_rows = tl.reduce((w * v[None, :], (w * SHRINK) * (w * SHRINK)), 1, _add_both)
            tl.store(s_out + r, s, mask=r < end)
            f += f_rows
            t += w * (s * SHRINK_SQ)[:, None]
        if iterate:
            tl.store(share + c, tl.sum(t, 0), mask=mask)
    else:
        for first in range(begin, end, BR):
            r = first + tl.arange(0, BR)
            row = _row_offset(r, inner, BB)
            products = tl.zeros([BR, BA * BB], tl.float32)
            w_squares = tl.zeros([BR, BA * BB], tl.float32)
            for chunk in tl.range(0, chunks, num_stages=STAGES):
                c, offset, mask = _chunk(chunk, rows, columns, inner, BA, BB)
                v = _slab_v(record, state, t_work, c, mask, first_pass)
                w = tl.load(
                    weight + (row[:, None] + offset[None, :]),
                    mask=(r < end)[:, None] & mask[None, :],
                    other=0.0,
                    eviction_policy=POLICY,
                ).to(tl.float32)
                products += w * v[None, :]
                w_squares += (w * SHRINK) * (w * SHRINK)
            s, f_rows = tl.reduce((products, w_squares), 1, _add_both)
            f += f_rows
            tl.store(s_out + r, s, mask=r < end)
            if iterate:
                tl.debug_barrier()  # the share's last values, written by other threads
                for chunk in tl.range(0, chunks, num_stages=STAGES):
                    c, offset, mask = _chunk(chunk, rows, columns, inner, BA, BB)
                    w = tl.load(
                        weight + (row[:, None] + offset[None, :]),
                        mask=(r < end)[:, None] & mask[None, :],
                        other=0.0,
                        eviction_policy=POLICY,
                    ).to(tl.float32)
                    earlier = mask & (c < tl.where(first > begin, ALL, 0))
                    t = tl.load(share + c, mask=earlier, other=0.0)
                    t += tl.sum(w * (s * SHRINK_SQ)[:, None], 0)
                    tl.store(share + c, t, mask=mask)
    tl.store(squares + index, tl.sum(f.to(tl.float64)))


@triton.jit
def _add_shares(record, scratch, begin, end):
    """t = W^T s of some columns: the slabs' shares, added in fixed order."""
    columns = tl.load(record + COLUMNS).to(tl.int32)
    slabs = tl.load(record + SLABS).to(tl.int32)
    pitch = _padded(columns, PAD)
    _, _, t_work, shares = _workspace(record, scratch)
    for first in range(begin, tl.minimum(end, columns), COLUMN_BLOCK):
        # The masks allow single elements only: neighbours go to neighbouring threads.
        c = tl.max_contiguous(first + tl.arange(0, COLUMN_BLOCK), 1)
        total = tl.zeros([SHARE_BLOCK, COLUMN_BLOCK], tl.float32)
        for k in range(0, slabs, SHARE_BLOCK):
            slab = k + tl.arange(0, SHARE_BLOCK)
            total += tl.load(
                shares + (slab.to(tl.int64)[:, None] * pitch + c[None, :]),
                mask=(slab < slabs)[:, None] & (c < columns)[None, :],
                other=0.0,
                cache_modifier=".cg",
            )
        tl.store(t_work + c, tl.sum(total, 0), mask=c < columns)


@triton.jit
def _vector(first):
    """VECTOR indices from ``first``, neighbours in neighbouring threads."""
    # Told of no run, and in a shape that no block of a weight has, all accesses get one layout:
    # nothing is exchanged between loads and stores.
    outer = tl.arange(0, VECTOR // LANES) * LANES
    return tl.max_contiguous(first + outer[:, None] + tl.arange(0, LANES)[None, :], (1, 1))


@triton.jit
def _sum_doubles(values, n):
    total = tl.zeros([VECTOR // LANES, LANES], tl.float64)
    for first in range(0, n, VECTOR):
        i = _vector(first)
        total += tl.load(values + i, mask=i < n, other=0.0, cache_modifier=".cg")
    return tl.sum(total)


@triton.jit
def _finish_pass(record, pointers, scratch, round_state, stats, last_pass):
    """sigma, then u and v; after the last pass the statistics and the state too."""
    rows = tl.load(record + ROWS).to(tl.int32)
    columns = tl.load(record + COLUMNS).to(tl.int32)
    iterate = tl.load(record + ITERATIONS) > 0
    squares, s, t, _ = _workspace(record, scratch)
    u_state = tl.load(pointers + 2).to(tl.pointer_type(tl.float32))
    v_state = tl.load(pointers + 3).to(tl.pointer_type(tl.float32))

    # Training: u ~ s, v ~ t, sigma = |t| / |s|. Evaluation: u and v as stored, sigma = u^T s.
    dot = tl.zeros([VECTOR // LANES, LANES], tl.float64)
    uu = tl.zeros([VECTOR // LANES, LANES], tl.float64)
    vv = tl.zeros([VECTOR // LANES, LANES], tl.float64)
    for first in range(0, rows, VECTOR):
        r = _vector(first)
        x = tl.load(s + r, mask=r < rows, other=0.0, cache_modifier=".cg").to(tl.float64)
        y = _u_direction(u_state, s, r, r < rows, iterate)
        dot += x * y
        uu += y * y
    for first in range(0, columns, VECTOR):
        c = _vector(first)
        z = _v_direction(record, v_state, t, c, c < columns, iterate)
        vv += z * z
    u_norm = tl.sqrt(tl.sum(uu))
    v_norm = tl.sqrt(tl.sum(vv))
    if iterate:
        sigma = tl.where(u_norm > 0, v_norm / u_norm * GROW_SQ, u_norm)
    else:
        u_norm = tl.where(u_norm == 0, 1.0, u_norm)  # zeros stay zeros, and sigma is 0
        v_norm = tl.where(v_norm == 0, 1.0, v_norm)
        sigma = tl.sum(dot) / u_norm / v_norm

    if last_pass:
        frobenius_sq = _sum_doubles(squares, tl.load(record + SLABS).to(tl.int32)) * GROW_SQ
        branch = _write_stats(record, pointers, stats, sigma, frobenius_sq)
        round_u, round_v = _round_vectors(record, round_state, rows)
        # A zero or non-finite weight leaves the state as it was, so that training can go on.
        old = tl.where(iterate & (branch >= PASS_THROUGH), ALL, 0)
        new = tl.where(iterate & (branch < PASS_THROUGH), ALL, 0)
        for first in range(0, rows, VECTOR):
            r = _vector(first)
            mask = r < rows
            y = (_u_direction(u_state, s, r, mask, iterate) / u_norm).to(tl.float32)
            y = tl.where(r < old, tl.load(u_state + r, mask=mask & (r < old), other=0.0), y)
            tl.store(round_u + r, y, mask=mask)
            tl.store(u_state + r, y, mask=mask & (r < new))
        for first in range(0, columns, VECTOR):
            c = _vector(first)
            mask = c < columns
            j = _matrix_column(record, c, mask)
            z = (_v_direction(record, v_state, t, c, mask, iterate) / v_norm).to(tl.float32)
            z = tl.where(c < old, tl.load(v_state + j, mask=mask & (c < old), other=0.0), z)
            tl.store(round_v + j, z, mask=mask)
            tl.store(v_state + j, z, mask=mask & (c < new))
    else:
        # t = 0 (a zero weight) stays 0, so that the next sigma is 0 and not NaN.
        v_norm = tl.where(v_norm == 0, 1.0, v_norm)
        for first in range(0, columns, VECTOR):
            c = _vector(first)
            z = tl.load(t + c, mask=c < columns, other=0.0, cache_modifier=".cg")
            tl.store(t + c, (z.to(tl.float64) / v_norm).to(tl.float32), mask=c < columns)


@triton.jit
def _u_direction(u_state, s, r, mask, iterate):
    if iterate:
        y = tl.load(s + r, mask=mask, other=0.0, cache_modifier=".cg")
    else:
        y = tl.load(u_state + r, mask=mask, other=0.0)
    return y.to(tl.float64)


@triton.jit
def _v_direction(record, v_state, t, c, mask, iterate):
    if iterate:
        z = tl.load(t + c, mask=mask, other=0.0, cache_modifier=".cg")
    else:
        z = tl.load(v_state + _matrix_column(record, c, mask), mask=mask, other=0.0)
    return z.to(tl.float64)


@triton.jit
def _write_stats(record, pointers, stats, sigma, frobenius_sq):
    """The scalars of Theorem 1 with k = 1: W_hat = a W + b u v^T; returns the branch."""
    nan = float("nan")
    r = _double(pointers, TARGET_RANK)
    ratio = frobenius_sq / sigma / sigma
    finite = (tl.abs(sigma) <= LARGEST) & (frobenius_sq <= LARGEST)  # false for NaN
    good = finite & (tl.abs(sigma) > _double(pointers, EPS))
    # q = |W / sigma - u v^T|_F^2 = |W|_F^2 / sigma^2 - 1 for any unit u, v
    q = tl.where(good & (ratio > 1), ratio - 1, 0.0)
    active = good & (q > r - 1)
    gamma = tl.where(active, tl.sqrt((r - 1) / tl.where(active, q, 1.0)), 1.0)
    a = tl.where(good, gamma / tl.where(good, sigma, 1.0), 1.0)
    branch = tl.where(active, STABLE_RANK, SPECTRAL)
    branch = tl.where(good, branch, tl.where(finite, PASS_THROUGH, NON_FINITE))
    row = stats + tl.load(record + STATS_ROW) * STATS
    tl.store(row, sigma)
    tl.store(row + 1, frobenius_sq)
    tl.store(row + 2, tl.where(finite, q, nan))
    tl.store(row + 3, tl.where(finite, gamma, nan))
    tl.store(row + 4, tl.where(finite, a, nan))
    tl.store(row + 5, tl.where(finite, 1 - gamma, nan))
    tl.store(row + 6, branch.to(tl.float64))
    tl.store(row + 7, tl.zeros([], tl.float64))
    factor, by_gain, by_sigma = _factor(record, pointers, sigma, branch)
    tl.store(row + 8, factor)
    tl.store(row + 9, by_gain)
    tl.store(row + 10, by_sigma)
    return branch


@triton.jit
def _factor_again(record, pointers, row, index):
    """Of a round that is repeated: from what no tile of it writes."""
    factor, by_gain, by_sigma = _factor(record, pointers, tl.load(row), tl.load(row + 6))
    if index == 0:
        tl.store(row + 8, factor)
        tl.store(row + 9, by_gain)
        tl.store(row + 10, by_sigma)
    return factor


@triton.jit
def _rescale(record, pointers, round_state, stats, index, VARIANTS: tl.constexpr, N: tl.constexpr):
    """factor W_hat = factor (a W + b u v^T) for the rows of one slab."""
    # As in _slab: a constexpr is bound where it is used.
    BA: tl.constexpr = VARIANTS[N][0]
    BR: tl.constexpr = VARIANTS[N][1]
    BB: tl.constexpr = VARIANTS[N][2]
    DTYPE: tl.constexpr = VARIANTS[N][3]
    ALIGN: tl.constexpr = VARIANTS[N][4]
    STAGES: tl.constexpr = VARIANTS[N][5]
    OUT_DTYPE: tl.constexpr = VARIANTS[N][6]
    rows, columns, inner, chunks = _shape(record, BA, BB, ALIGN)
    weight = _pointer(pointers, 0, DTYPE, ALIGN)
    out = _pointer(pointers, 1, OUT_DTYPE, ALIGN)
    row = stats + tl.load(record + STATS_ROW) * STATS
    if tl.load(record + ITERATIONS) < 0:
        factor = _factor_again(record, pointers, row, index)
    else:
        factor = tl.load(row + 8, cache_modifier=".cg")
    scale = (factor * tl.load(row + 4, cache_modifier=".cg")).to(tl.float32)
    outer = (factor * tl.load(row + 5, cache_modifier=".cg")).to(tl.float32)
    u_in, v_in = _round_vectors(record, round_state, rows)
    begin, end = _row_range(record, index, rows, BR, BB, ALIGN)
    for chunk in range(chunks):
        c, offset, mask = _chunk(chunk, rows, columns, inner, BA, BB)
        v = outer * _load_v(record, v_in, c, mask)
        for first in tl.range(begin, end, BR, num_stages=STAGES):
            r = first + tl.arange(0, BR)
            at = _row_offset(r, inner, BB)[:, None] + offset[None, :]
            here = (r < end)[:, None] & mask[None, :]
            w = tl.load(weight + at, mask=here, other=0.0, eviction_policy="evict_first")
            u = tl.load(u_in + r, mask=r < end, other=0.0, cache_modifier=".cg")
            # Which product is fused must not depend on the block: repeated rounds have equal bits.
            w_hat = tl.fma(w.to(tl.float32), scale, u[:, None] * v[None, :])
            tl.store(out + at, w_hat.to(OUT_DTYPE), mask=here, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["n_tiles", "n_layers"])
def normalize_kernel(
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
    RESCALE_VARIANTS: tl.constexpr,
):
    """Power iterations, statistics and W_hat of all layers; op codes as numbered in launch.py."""
    # Taking a tile binds names for the whole loop: backward_kernel has the same lines.
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
        for i in tl.static_range(len(RESCALE_VARIANTS)):
            if op == 1 + len(SLAB_VARIANTS) + i:
                _rescale(record, pointers, round_state, stats, index, RESCALE_VARIANTS, i)
        for i in tl.static_range(len(SLAB_VARIANTS)):
            if op == 1 + i:
                _slab(record, pointers, scratch, index, wait == 0, SLAB_VARIANTS, i)
        if len(SLAB_VARIANTS) > 0:
            slabs = tl.load(record + SLABS).to(tl.int32)
            column_tiles = tl.load(record + COLUMN_TILES).to(tl.int32)
            if op == 0:
                width = tl.load(record + COLUMN_WIDTH).to(tl.int32)
                _add_shares(record, scratch, index * width, (index + 1) * width)
            if op <= len(SLAB_VARIANTS):
                arrivals = slabs + column_tiles + 1
                before = _arrive(counter)
                if before % arrivals == arrivals - 2:
                    iterations = tl.load(record + ITERATIONS).to(tl.int32)
                    if (column_tiles == 0) & (iterations > 0):
                        _add_shares(record, scratch, 0, tl.load(record + COLUMNS).to(tl.int32))
                        tl.debug_barrier()
                    _finish_pass(
                        record,
                        pointers,
                        scratch,
                        round_state,
                        stats,
                        before // arrivals + 1 >= iterations,
                    )
                    _arrive(counter)
        ticket = tl.atomic_add(counters + TICKET * COUNTER_STRIDE, 1, sem="relaxed")
    _leave(counters, n_layers)
