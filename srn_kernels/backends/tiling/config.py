"""Launch parameters, chosen once per device and size of model; nothing is timed."""

from __future__ import annotations

from dataclasses import dataclass, replace

KB, MB = 1 << 10, 1 << 20
RESERVED_BYTES = 16 * KB  # of shared memory, for reductions
MOST_BUFFERS = 4  # 64 KB in flight for blocks of 4096 float32


@dataclass(frozen=True)
class LaunchConfig:
    """What a launch and its schedule need to know of the device.

    programs: CTAs, one for each SM: fewer bytes in flight mean shorter waits at equal bandwidth
    warps, registers: of a CTA, and of a thread at most: one CTA may use all that an SM has
    staging_bytes: of shared memory, filled ahead of the arithmetic
    block: elements of a weight held in registers at a time (twice as many for the widest rows)
    tile_bytes: of weight (backward: weight and gradient) that one tile touches, over all dtypes
    min_rows: of a tile; a slab of fewer rows would write more partial sums than it saves
    max_slabs: of a layer, so that adding its partial sums stays short
    column_bytes: of partial sums added by one column tile; below it the last slab adds them itself
    lookahead_bytes: tiles listed between a layer's last slab and its first rescale tile
    follow_ratio: bytes of rescale tiles listed for each byte of the following layers' slabs
    protected_bytes: at the end of a layer that are asked to stay in L2 until they are rescaled
    """

    programs: int
    warps: int = 8
    registers: int = 255
    staging_bytes: int = 128 * KB
    block: int = 4096
    tile_bytes: int = 128 * KB
    min_rows: int = 16
    max_slabs: int = 264
    column_bytes: int = 64 * KB
    lookahead_bytes: int = 20 * MB
    follow_ratio: int = 2
    protected_bytes: int = 36 * MB

    @classmethod
    def for_device(
        cls,
        processors: int,
        l2_bytes: int,
        shared_bytes: int,
        model_bytes: int,
        backward: bool,
        fewest_slabs: float = 1.0,
    ) -> LaunchConfig:
        """The heuristic: everything that must fit L2 is a share of it, the rest is a constant.

        processors: SMs; shared_bytes: of one CTA at most; model_bytes: that the tiles of one phase
        touch; fewest_slabs: for each SM, down to tiles of 16 KB. The lookahead must exceed what all
        CTAs hold at a time (programs * tile_bytes) by one or two waits, and stay far enough below
        L2 for the slabs to be found there again.
        """
        config = cls(programs=processors)
        tile, rows = config.tile_bytes, config.min_rows
        if model_bytes < fewest_slabs * processors * tile:
            # A small model: spread it over all SMs, waiting costs more than partial sums.
            tile, rows = max(16 * KB, int(model_bytes / (fewest_slabs * processors))), 4
        return replace(
            config,
            staging_bytes=min(config.staging_bytes, shared_bytes - RESERVED_BYTES),
            tile_bytes=tile,
            min_rows=rows,
            max_slabs=2 * processors,
            lookahead_bytes=l2_bytes * (32 if backward else 40) // 100,
            follow_ratio=3 if backward else 2,
            protected_bytes=l2_bytes * 72 // 100,
        )

    def stages(self, block_bytes: int) -> int:
        """Triton's num_stages for a loop over blocks: one more than the buffers filled ahead."""
        return 1 + max(1, min(MOST_BUFFERS, self.staging_bytes // block_bytes))
