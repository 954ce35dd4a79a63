"""How weights lie in memory, the blocks their tiles are made of, and so the work of a launch.

Host data only, as in schedule.py.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from srn_kernels.backends.tiling.config import LaunchConfig
from srn_kernels.backends.tiling.schedule import Work

WIDEST_ROW = 16384  # columns; a wider row does not fit a CTA's registers


class Layout(NamedTuple):
    """Element (a, r, b) lies at (a * rows + r) * inner + b; r is the matrix row."""

    outer: int
    rows: int
    inner: int
    column_of: tuple[int, ...] | None  # matrix column of each column in memory; None: the same

    @property
    def columns(self) -> int:
        return self.outer * self.inner


@functools.lru_cache(maxsize=4096)
def make_layout(shape: tuple[int, ...], strides: tuple[int, ...], dim: int) -> Layout:
    """The layout of a dense weight of any memory order, rows along ``dim``."""
    memory = sorted((d for d in range(len(shape)) if shape[d] != 1), key=lambda d: -strides[d])
    step = 1
    for d in reversed(memory):
        if strides[d] != step:
            raise ValueError(f"strides {strides} of shape {shape} are not dense")
        step *= shape[d]
    at = memory.index(dim) if dim in memory else 0  # a single row is contiguous
    before, after = memory[:at], [d for d in memory[at:] if d != dim]
    columns = before + after
    outer, inner = math.prod(shape[d] for d in before), math.prod(shape[d] for d in after)
    if columns == sorted(columns):
        return Layout(outer, shape[dim], inner, None)
    column_strides = {
        d: math.prod(shape[d + 1 :]) // (shape[dim] if d < dim else 1) for d in columns
    }
    table = [0]
    for d in columns:
        table = [base + i * column_strides[d] for base in table for i in range(shape[d])]
    return Layout(outer, shape[dim], inner, tuple(table))


class Block(NamedTuple):
    """What a CTA holds at a time: ``rows`` by ``outer * inner`` columns; whole: complete rows."""

    outer: int
    rows: int
    inner: int
    whole: bool

    @property
    def elements(self) -> int:
        return self.outer * self.rows * self.inner


def alignment(layout: Layout, bits: int) -> int:
    """Elements that always start at a multiple of 16 bytes together, in elements of ``bits``."""
    run = layout.inner if layout.inner > 1 or layout.outer == 1 else layout.rows
    return math.gcd(run, 128 // bits)


def _elements(aligned: int, config: LaunchConfig) -> int:
    # Elements that are loaded one by one take an address each.
    return config.block if aligned >= 4 else config.block // 4


def _transposed(layout: Layout, aligned: int, config: LaunchConfig) -> Block:
    inner = 1 if layout.inner == 1 else 4 if layout.inner <= 4 else 16
    rows = {1: 32, 4: 16, 16: 4}[inner]
    outer = max(2, min(config.block // 2, _elements(aligned, config)) // (rows * inner))
    return Block(outer, rows, inner, False)


def slab_block(layout: Layout, aligned: int, config: LaunchConfig) -> Block:
    """Whole rows where they can be loaded wide; else the slab's rows are read twice, by chunks."""
    if layout.outer > 1:
        return _transposed(layout, aligned, config)
    if aligned < 4:
        return Block(1, max(1, _elements(aligned, config) // 256), 256, False)
    if layout.inner > WIDEST_ROW:
        return Block(1, config.block // 1024, 1024, False)
    inner = max(64, 1 << (layout.inner - 1).bit_length())
    return Block(1, max(1, config.block // inner), inner, True)


def rescale_block(layout: Layout, aligned: int, config: LaunchConfig) -> Block:
    if layout.outer > 1:
        return _transposed(layout, aligned, config)
    inner = 64 if layout.inner <= 64 else 256 if layout.inner <= 256 else 1024
    return Block(1, max(1, _elements(aligned, config) // inner), inner, False)


def merge_rare(blocks: Sequence[Block], sizes: Sequence[int]) -> list[Block]:
    """Fewer bodies to compile: small layers use the next wider block that others need anyway."""
    share: dict[Block, int] = {}
    for block, size in zip(blocks, sizes, strict=True):
        share[block] = share.get(block, 0) + size
    instead = {b: b for b in share}
    # Blocks that differ in width alone: complete rows, or chunks of as many elements.
    kinds: dict[tuple[int, int], list[Block]] = {}
    for block in sorted(share, key=lambda b: b.inner):
        if block.outer == 1:
            kinds.setdefault((block.whole, block.whole or block.elements), []).append(block)
    for kind in kinds.values():
        for block, wider in itertools.pairwise(kind):
            if share[block] * 32 < sum(sizes) and wider.inner <= 16 * block.inner:
                instead[block] = wider
                share[wider] += share[block]
        for block in reversed(kind):
            instead[block] = instead[instead[block]]
    return [instead[b] for b in blocks]


class Spec(NamedTuple):
    """What a layer's tiles depend on."""

    layout: Layout
    weight_bytes: int  # of an element
    other_bytes: int  # of an element of W_hat; in backward of G
    aligned: bool  # every pointer is a multiple of 16
    iterations: int = 1

    @property
    def alignment(self) -> int:
        if not self.aligned:
            return 1
        return alignment(self.layout, 8 * min(self.weight_bytes, self.other_bytes))

    def read_bytes(self, backward: bool) -> int:
        """Of an element, by every tile."""
        return self.weight_bytes + (self.other_bytes if backward else 0)


class Design(NamedTuple):
    """Of each layer: the blocks of its slabs and of its rescale tiles, and its work."""

    slabs: list[Block]
    rescales: list[Block]
    works: list[Work]


def model_bytes(specs: Sequence[Spec], backward: bool) -> int:
    return sum(s.layout.rows * s.layout.columns * s.read_bytes(backward) for s in specs)


def design(specs: Sequence[Spec], config: LaunchConfig, backward: bool) -> Design:
    sizes = [s.layout.rows * s.layout.columns for s in specs]
    rescales = [rescale_block(s.layout, s.alignment, config) for s in specs]
    rescales = slabs = merge_rare(rescales, sizes)
    if not backward:
        slabs = [slab_block(s.layout, s.alignment, config) for s in specs]
        slabs = merge_rare(slabs, sizes)
    works = []
    for spec, a, b in zip(specs, slabs, rescales, strict=True):
        # Short rows fill a block by the hundred: a tile need not be whole blocks of them.
        whole_blocks = spec.layout.columns > 1024 or spec.layout.outer > 1
        works.append(
            Work(
                spec.layout.rows,
                spec.layout.columns,
                spec.read_bytes(backward),
                max(a.rows, b.rows) if whole_blocks else 1,
                1 if backward or spec.iterations == 0 else max(0, spec.iterations),
                not backward and spec.iterations > 0,
            )
        )
    return Design(slabs, rescales, works)
