"""What the kernels share. Each runs a whole list of tiles (see schedule.py) in one launch.

A weight is (outer, rows, inner) in memory; column j = a * inner + b of matrix row r lies at
(a * rows + r) * inner + b. A block is BR rows by BA * BB columns of it; WHOLE blocks hold complete
rows, so that s = W v and W^T s come from one read. A variant, a tuple of constants, is one body for
blocks of one shape and one set of dtypes; a launch compiles the variants that its layers need.

Every tile's function names its variant's constants first, because a constexpr is bound where it is
used; both kernels take their tiles in the same lines, which bind what the rest of the loop uses.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Fields of a layer's record, in int64.
ROWS = tl.constexpr(0)
COLUMNS = tl.constexpr(1)
INNER = tl.constexpr(2)
COLUMN_OF = tl.constexpr(3)  # pointer to the matrix column of each column in memory, or 0
SLAB_ROWS = tl.constexpr(4)
SLABS = tl.constexpr(5)
COLUMN_WIDTH = tl.constexpr(6)
COLUMN_TILES = tl.constexpr(7)
ITERATIONS = tl.constexpr(8)
ROUND = tl.constexpr(9)  # offset of u in the round's state
SCRATCH = tl.constexpr(10)  # offset in the workspace, in 4-byte words
STATS_ROW = tl.constexpr(11)
GAIN = tl.constexpr(12)  # which of the dtypes of _load_gain its gain has; -1: it has none
THROUGH = tl.constexpr(13)  # whether the soft bound's divisor moves with W in the gradient
ZERO = tl.constexpr(15)
FIELDS = tl.constexpr(16)
# Of a layer's changing values: weight, out, u, v pointers, the bits of three doubles, the gain's
# pointer; in backward: gradient, weight, gradient of the weight, of the gain.
TARGET_RANK = tl.constexpr(4)
EPS = tl.constexpr(5)
SIGMA_MAX = tl.constexpr(6)  # 0: no soft bound
GAIN_AT = tl.constexpr(7)
GRAD_GAIN_AT = tl.constexpr(3)
POINTERS = tl.constexpr(8)
STATS = tl.constexpr(11)  # columns of the statistics

COUNTER_STRIDE = tl.constexpr(32)  # int32: a 128-byte line each
TICKET, EXITS, FIRST_COUNTER = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # lines
STATE_PAD = tl.constexpr(16)  # u is padded to this before v in a round's state
PAD = tl.constexpr(32)  # words: every array of the workspace starts a 128-byte line
VECTOR = tl.constexpr(2048)  # elements of u, v, s, t handled at a time
LANES = tl.constexpr(256)  # of them next to each other, one a thread
SUMS = tl.constexpr(256)  # doubles added at a time
COLUMN_BLOCK = tl.constexpr(128)
SHARE_BLOCK = tl.constexpr(32)  # slabs whose partial sums are added at a time

# Squares of weights up to 1e18 leave float32, as W^T (W v) does: both are formed times 2^-40, which
# is exact and keeps the squares of weights down to 1e-11 among the normal numbers.
SHRINK = tl.constexpr(2.0**-20)
SHRINK_SQ = tl.constexpr(2.0**-40)
GROW_SQ = tl.constexpr(2.0**40)

# A scalar condition enters a mask as a limit, ALL or 0: Triton's interpreter cannot broadcast it.
ALL = tl.constexpr(2**31 - 1)

SPECTRAL, STABLE_RANK = tl.constexpr(0.0), tl.constexpr(1.0)
PASS_THROUGH, NON_FINITE = tl.constexpr(2.0), tl.constexpr(3.0)
LARGEST = tl.constexpr(1.7976931348623157e308)


@triton.jit
def _padded(n, to):
    return (n + to - 1) // to * to


@triton.jit
def _double(values, i):
    return tl.load(values + i).to(tl.float64, bitcast=True)


@triton.jit
def _pointer(pointers, i, DTYPE: tl.constexpr, ALIGN: tl.constexpr):
    p = tl.load(pointers + i).to(tl.pointer_type(DTYPE))
    if ALIGN > 1:  # a pointer read from a table has lost its alignment
        p = tl.multiple_of(p, 16)
    return p


@triton.jit
def _load_gain(record, pointers):
    """The layer's gain, 1 without one."""
    dtype = tl.load(record + GAIN)
    at = tl.load(pointers + GAIN_AT)
    gain = tl.full([], 1.0, tl.float64)
    if dtype == 0:
        gain = tl.load(at.to(tl.pointer_type(tl.float32))).to(tl.float64)
    elif dtype == 1:
        gain = tl.load(at.to(tl.pointer_type(tl.bfloat16))).to(tl.float32).to(tl.float64)
    elif dtype == 2:
        gain = tl.load(at.to(tl.pointer_type(tl.float16))).to(tl.float32).to(tl.float64)
    elif dtype == 3:
        gain = tl.load(at.to(tl.pointer_type(tl.float64)))
    return gain


@triton.jit
def _store_gain(record, pointers, value):
    """The gradient of the layer's gain, if there is a place for it."""
    dtype = tl.load(record + GAIN)
    at = tl.load(pointers + GRAD_GAIN_AT)
    if dtype == 0:
        tl.store(at.to(tl.pointer_type(tl.float32)), value.to(tl.float32))
    elif dtype == 1:
        tl.store(at.to(tl.pointer_type(tl.bfloat16)), value.to(tl.float32).to(tl.bfloat16))
    elif dtype == 2:
        tl.store(at.to(tl.pointer_type(tl.float16)), value.to(tl.float32).to(tl.float16))
    elif dtype == 3:
        tl.store(at.to(tl.pointer_type(tl.float64)), value)


@triton.jit
def _factor(record, pointers, sigma, branch):
    """The factor of W_hat and its derivatives by gain and sigma; csrc/scalars.h has the same."""
    gain = _load_gain(record, pointers)
    bound = _double(pointers, SIGMA_MAX)
    bounded = (bound > 0) & (branch <= STABLE_RANK)
    beyond = bounded & (sigma > bound)
    by_gain = tl.where(bounded, tl.where(beyond, bound, sigma), 1.0)
    held = tl.where(tl.load(record + THROUGH) != 0, 0.0, bound / tl.where(beyond, sigma, 1.0))
    by_sigma = gain * tl.where(bounded, tl.where(beyond, held, 1.0), 0.0)
    return gain * by_gain, by_gain, by_sigma


@triton.jit
def _wait(counter, value):
    seen = tl.atomic_add(counter, 0, sem="acquire")
    while seen < value:
        seen = tl.atomic_add(counter, 0, sem="acquire")
    tl.debug_barrier()


@triton.jit
def _arrive(counter):
    """Publishes what this CTA wrote; returns the arrivals before it."""
    tl.debug_barrier()
    before = tl.atomic_add(counter, 1, sem="acq_rel")
    tl.debug_barrier()
    return before


@triton.jit
def _leave(counters, n_layers):
    """The last CTA to leave cleans all counters for the next launch."""
    exits = counters + EXITS * COUNTER_STRIDE
    if tl.atomic_add(exits, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        for first in range(0, n_layers + FIRST_COUNTER, 128):
            line = first + tl.arange(0, 128)
            mask = line < n_layers + FIRST_COUNTER
            tl.store(counters + line * COUNTER_STRIDE, tl.zeros([128], tl.int32), mask=mask)


@triton.jit
def _shape(record, BA: tl.constexpr, BB: tl.constexpr, ALIGN: tl.constexpr):
    """rows, columns, inner and the number of column chunks."""
    rows = tl.load(record + ROWS).to(tl.int32)
    columns = tl.load(record + COLUMNS).to(tl.int32)
    inner = tl.load(record + INNER).to(tl.int32)
    if BA == 1:
        inner = columns
    if BB == 1:
        rows = tl.multiple_of(rows, ALIGN)
    else:
        inner = tl.multiple_of(inner, ALIGN)
    chunks = tl.cdiv(columns // inner, BA) * tl.cdiv(inner, BB)
    return rows, columns, inner, chunks


@triton.jit
def _row_range(record, index, rows, BR: tl.constexpr, BB: tl.constexpr, ALIGN: tl.constexpr):
    """First row of a slab and the one after its last."""
    slab_rows = tl.load(record + SLAB_ROWS).to(tl.int32)
    begin = index * slab_rows
    end = tl.minimum(begin + slab_rows, rows)
    if BB == 1:  # rows are neighbours in memory, and such slabs are multiples of BR
        begin = tl.multiple_of(begin, BR)
        end = tl.multiple_of(end, ALIGN)
    return begin, end


@triton.jit
def _chunk(chunk, rows, columns, inner, BA: tl.constexpr, BB: tl.constexpr):
    """Of a chunk's columns: their numbers in memory order, offsets, and which exist."""
    j = tl.arange(0, BA * BB)
    if BA == 1:
        j += chunk * BB
        return j, j.to(tl.int64), j < inner
    if BB == 1:
        j += chunk * BA
        return j, j.to(tl.int64) * rows, j < columns
    across = tl.cdiv(inner, BB)
    a = chunk // across * BA + j // BB
    b = chunk % across * BB + j % BB
    offset = a.to(tl.int64) * (rows.to(tl.int64) * inner) + b
    return a * inner + b, offset, (a * inner < columns) & (b < inner)


@triton.jit
def _row_offset(r, inner, BB: tl.constexpr):
    # BB = 1 means inner = 1: neighbouring rows are neighbours in memory, and the compiler sees it.
    if BB == 1:
        return r.to(tl.int64)
    return r.to(tl.int64) * inner


@triton.jit
def _matrix_column(record, c, mask):
    """Column numbers in memory order -> in the matrix's own order."""
    table = tl.load(record + COLUMN_OF)
    listed = mask & (c < tl.where(table != 0, ALL, 0))
    permuted = tl.load(table.to(tl.pointer_type(tl.int32)) + c, mask=listed, other=0)
    return tl.where(listed, permuted, c)


@triton.jit
def _load_v(record, values, c, mask):
    """Of a vector in the matrix's column order, the values of columns in memory order."""
    if tl.load(record + COLUMN_OF) != 0:
        j = _matrix_column(record, c, mask)
        v = tl.load(values + j, mask=mask, other=0.0, cache_modifier=".cg")
    else:
        v = tl.load(values + c, mask=mask, other=0.0, cache_modifier=".cg")
    return v


@triton.jit
def _round_vectors(record, round_state, rows):
    u = round_state + tl.multiple_of(tl.load(record + ROUND), STATE_PAD)
    return u, u + _padded(rows, STATE_PAD)


@triton.jit
def _workspace(record, scratch):
    """squares (slabs doubles), s (rows), t (columns) and the slabs' shares of t."""
    start = scratch + tl.multiple_of(tl.load(record + SCRATCH), PAD)
    squares = start.to(tl.pointer_type(tl.float64))
    s = start + _padded(2 * tl.load(record + SLABS), PAD)
    t = s + _padded(tl.load(record + ROWS), PAD)
    return squares, s, t, t + _padded(tl.load(record + COLUMNS), PAD)
