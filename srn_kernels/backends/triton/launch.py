"""The verbs: from tensors to one launch. Plans hold all that does not change between calls."""

from __future__ import annotations

import functools
import threading
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from srn_kernels.backends.tiling.config import MB, LaunchConfig
from srn_kernels.backends.tiling.layout import (
    Block,
    Design,
    Layout,
    Spec,
    design,
    make_layout,
    model_bytes,
)
from srn_kernels.backends.tiling.schedule import Phase, build, round_up
from srn_kernels.backends.triton import common, interpreter
from srn_kernels.backends.triton.backward import backward_kernel
from srn_kernels.backends.triton.forward import _add_both, normalize_kernel
from srn_kernels.backends.triton.tables import CudaRuntime, HostRuntime, Slots
from srn_kernels.maths.scalars import STATS

INTERPRETED = bool(triton.knobs.runtime.interpret)
if INTERPRETED:
    interpreter.repair(_add_both)
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
GAINS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # as in _load_gain
assert common.STATS.value == len(STATS)
FIELDS, POINTERS, PAD = common.FIELDS.value, common.POINTERS.value, common.PAD.value
COUNTER_STRIDE = common.COUNTER_STRIDE.value
FIRST_COUNTER = common.FIRST_COUNTER.value


class Layer(NamedTuple):
    """One layer of a call; equal layers of equal calls share a plan."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dim: int
    dtype: torch.dtype
    other: torch.dtype  # of W_hat; in backward of G
    aligned: bool  # every pointer is a multiple of 16
    iterations: int
    offset: int  # of u in the round's state
    row: int  # of the statistics
    gain: torch.dtype | None  # of its gain or the gain's gradient; None: it has none
    through: bool  # see srn_kernels.maths.bound


@functools.cache
def device_config(device: torch.device, model_bytes: int, backward: bool) -> LaunchConfig:
    if device.type == "cpu":
        return LaunchConfig.for_device(4, 50 * MB, 227 << 10, model_bytes, backward)
    p = torch.cuda.get_device_properties(device)
    return LaunchConfig.for_device(
        p.multi_processor_count,
        p.L2_cache_size,
        p.shared_memory_per_block_optin,
        model_bytes,
        backward,
    )


class Variants(NamedTuple):
    """The kernel's constants, and every tile's op code."""

    slabs: tuple[tuple[Any, ...], ...]
    rescales: tuple[tuple[Any, ...], ...]
    ops: list[int]


class Plan:
    """One model's schedule, tables and compiled variants, for one set of shapes and dtypes."""

    def __init__(self, layers: tuple[Layer, ...], device: torch.device, backward: bool) -> None:
        self.backward, self.device = backward, device
        self.specs = [
            Spec(
                make_layout(x.shape, x.strides, x.dim),
                x.dtype.itemsize,
                x.other.itemsize,
                x.aligned,
                x.iterations,
            )
            for x in layers
        ]
        self.config = device_config(device, model_bytes(self.specs, backward), backward)
        blocks = design(self.specs, self.config, backward)
        self.schedule = build(blocks.works, self.config)
        self.variants = self._variants(layers, blocks)
        self._upload(layers)
        runtime = HostRuntime() if device.type == "cpu" else CudaRuntime(device)
        counters = (FIRST_COUNTER + len(layers)) * COUNTER_STRIDE
        constants = (self.tiles, self.records, *self.column_tables)
        self.slots = Slots(runtime, len(layers) * POINTERS, counters, constants)

    def _variants(self, layers: Sequence[Layer], blocks: Design) -> Variants:
        slabs: dict[tuple[Any, ...], int] = {}
        rescales: dict[tuple[Any, ...], int] = {}
        codes: list[tuple[int, int, int]] = []  # slab in passing, slab to keep, rescale

        def prefix(b: Block, i: int) -> tuple[Any, ...]:
            spec = self.specs[i]
            stages = self.config.stages(b.elements * spec.read_bytes(self.backward))
            return b.outer, b.rows, b.inner, DTYPES[layers[i].dtype], spec.alignment, stages

        for i, x in enumerate(layers):
            cut = self.schedule.layers[i]
            other = DTYPES[x.other]

            def slab(keep: bool, i=i, other=other) -> int:
                b = blocks.slabs[i]
                last = (other, keep) if self.backward else (keep, b.whole)
                key = (*prefix(b, i), *last)
                return slabs.setdefault(key, len(slabs))

            passing = slab(False) if cut.passes and cut.first_protected else -1
            keep = slab(True) if cut.passes and cut.first_protected < cut.slabs else -1
            key = (*prefix(blocks.rescales[i], i), other)
            codes.append((passing, keep, rescales.setdefault(key, len(rescales))))
        ops = []
        for tile in self.schedule.tiles:
            passing, keep, rescale = codes[tile.layer]
            if tile.phase == Phase.COLUMNS:
                ops.append(0)
            elif tile.phase == Phase.RESCALE:
                ops.append(1 + len(slabs) + rescale)
            else:
                protected = tile.index >= self.schedule.layers[tile.layer].first_protected
                ops.append(1 + (keep if protected else passing))
        return Variants(tuple(slabs), tuple(rescales), ops)

    def _upload(self, layers: Sequence[Layer]) -> None:
        tiles = array("i")
        for tile, op in zip(self.schedule.tiles, self.variants.ops, strict=True):
            tiles.extend((tile.layer, op, tile.index, tile.wait))
        records = array("q")
        self.scratch_words = 0
        self.column_tables: list[Tensor] = []
        for x, spec, cut in zip(layers, self.specs, self.schedule.layers, strict=True):
            y = spec.layout
            record = [0] * FIELDS
            record[: common.THROUGH.value + 1] = (
                y.rows,
                y.columns,
                y.inner,
                self._column_table(y),
                cut.slab_rows,
                cut.slabs,
                cut.column_width,
                cut.column_tiles,
                x.iterations,
                x.offset,
                self.scratch_words,
                x.row,
                -1 if x.gain is None else GAINS.index(x.gain),
                x.through,
            )
            records.extend(record)
            self.scratch_words += self._scratch_words(y, cut.slabs, x.iterations > 0)
        self.tiles = torch.frombuffer(tiles, dtype=torch.int32).to(self.device, copy=True)
        self.records = torch.frombuffer(records, dtype=torch.int64).to(self.device, copy=True)

    def _column_table(self, layout: Layout) -> int:
        if layout.column_of is None:
            return 0
        table = torch.tensor(layout.column_of, dtype=torch.int32, device=self.device)
        self.column_tables.append(table)
        return table.data_ptr()

    def _scratch_words(self, layout: Layout, slabs: int, partial_sums: bool) -> int:
        if self.backward:
            return round_up(2 * (4 + 2 * slabs), PAD)
        columns = round_up(layout.columns, PAD)
        words = round_up(2 * slabs, PAD) + round_up(layout.rows, PAD) + columns
        return words + (slabs * columns if partial_sums else 0)

    def options(self, target: str = "cuda") -> dict[str, Any]:
        """Triton's compiler options."""
        options = {"num_warps": self.config.warps, "enable_fp_fusion": True}
        return options if target == "hip" else {**options, "maxnreg": self.config.registers}

    def launch(self, values: tuple[int, ...], round_state: Tensor, stats: Tensor) -> None:
        kernel = backward_kernel if self.backward else normalize_kernel
        config, n_tiles = self.config, len(self.schedule.tiles)
        scratch = torch.empty(self.scratch_words, dtype=torch.float32, device=self.device)
        with self.slots.holding(values) as slot:
            kernel[(min(config.programs, n_tiles),)](
                self.tiles,
                n_tiles,
                len(self.specs),
                slot.device,
                self.records,
                slot.counters,
                scratch,
                round_state,
                stats,
                self.variants.slabs,
                self.variants.rescales,
                **self.options("hip" if torch.version.hip else "cuda"),
            )


@functools.lru_cache(maxsize=128)
def plan_for(layers: tuple[Layer, ...], device: torch.device, backward: bool) -> Plan:
    return Plan(layers, device, backward)


_interpreter = threading.Lock()  # it patches Triton's language while it runs


def _launch(plan: Plan, values: list[int], round_state: Tensor, stats: Tensor) -> None:
    if stats.shape[1:] != (len(STATS),) or stats.dtype != torch.float64:  # rows by plain pointers
        raise ValueError(f"stats must be float64 of (layers, {len(STATS)}), got {stats.shape}")
    with torch.cuda.device(plan.device) if plan.device.type == "cuda" else _interpreter:
        plan.launch(tuple(values), round_state, stats)


def _bits(values: Sequence[float]) -> array:
    return array("q", array("d", values).tobytes())


# The verbs' parameters are written out in every backend, since the ops pass them by place.


def normalize(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    outs: Sequence[Tensor],
    round_state: Tensor,
    stats: Tensor,
    offsets: Sequence[int],
    target_ranks: Sequence[float],
    iterations: Sequence[int],
    dims: Sequence[int],
    eps: Sequence[float],
    gains: Sequence[Tensor] = (),
    gained: Sequence[int] = (),
    sigma_max: Sequence[float] = (),
    through: Sequence[bool] = (),
) -> None:
    ranks, epsilons, bounds = (_bits(x) for x in (target_ranks, eps, sigma_max))
    layers, values = [], []
    for i, (w, u, v, out) in enumerate(zip(weights, us, vs, outs, strict=True)):
        at, out_at, v_at = w.data_ptr(), out.data_ptr(), v.data_ptr()
        gain = gains[gained[i]] if gained and gained[i] >= 0 else None
        values += (at, out_at, u.data_ptr(), v_at, ranks[i], epsilons[i])
        values += (bounds[i] if bounds else 0, 0 if gain is None else gain.data_ptr())
        layers.append(
            Layer(
                tuple(w.shape),
                w.stride(),
                dims[i],
                w.dtype,
                out.dtype,
                (at | out_at | v_at) % 16 == 0,
                iterations[i],
                offsets[i],
                i,
                None if gain is None else gain.dtype,
                through[i] if through else True,
            )
        )
    plan = plan_for(tuple(layers), weights[0].device, False)
    _launch(plan, values, round_state, stats)


def normalize_backward(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    round_state: Tensor,
    stats: Tensor,
    grad_weights: Sequence[Tensor],
    rows: Sequence[int],
    offsets: Sequence[int],
    dims: Sequence[int],
    grad_gains: Sequence[Tensor] = (),
    gained: Sequence[int] = (),
) -> None:
    layers, values = [], []
    for i, (g, w, out) in enumerate(zip(grads, weights, grad_weights, strict=True)):
        grad_at, at, out_at = g.data_ptr(), w.data_ptr(), out.data_ptr()
        gain = grad_gains[gained[i]] if gained and gained[i] >= 0 else None
        values += (grad_at, at, out_at, 0 if gain is None else gain.data_ptr(), 0, 0, 0, 0)
        aligned = (grad_at | at | out_at) % 16 == 0
        layers.append(
            Layer(
                tuple(w.shape),
                w.stride(),
                dims[i],
                w.dtype,
                g.dtype,
                aligned,
                1,
                offsets[i],
                rows[i],
                None if gain is None else gain.dtype,
                True,
            )
        )
    plan = plan_for(tuple(layers), weights[0].device, True)
    _launch(plan, values, round_state, stats)
