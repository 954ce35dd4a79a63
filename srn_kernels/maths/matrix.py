"""A weight as a matrix, and the flat state that a round keeps of all layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# u and v of a round lie in one flat tensor, each padded to this many elements.
STATE_ALIGNMENT = 16


def padded(n: int) -> int:
    return -(-n // STATE_ALIGNMENT) * STATE_ALIGNMENT


def state_dtype(weight_dtype: torch.dtype) -> torch.dtype:
    """The dtype of u, v and of the arithmetic: float64 for float64 weights, else float32."""
    return torch.float64 if weight_dtype == torch.float64 else torch.float32


def matrix(weight: Tensor, dim: int) -> Tensor:
    """The (rows, columns) view of a weight whose output dimension is ``dim``."""
    return weight.movedim(dim, 0).flatten(1)


def from_matrix(w: Tensor, like: Tensor, dim: int) -> Tensor:
    """The inverse of :func:`matrix`."""
    shape = list(like.shape)
    rows = shape.pop(dim)
    return w.reshape(rows, *shape).movedim(0, dim)


def round_vectors(
    round_state: Tensor, offset: int, weight: Tensor, dim: int
) -> tuple[Tensor, Tensor]:
    """Views of u and v in a round's flat state."""
    rows = weight.shape[dim]
    columns = weight.numel() // rows
    start = offset + padded(rows)
    return round_state[offset : offset + rows], round_state[start : start + columns]


def state_layout(shapes: Sequence[tuple[int, int]]) -> tuple[list[int], int]:
    """Offsets of the layers' u in a round's flat state, and its size, from (rows, columns)."""
    offsets, size = [], 0
    for rows, columns in shapes:
        offsets.append(size)
        size += padded(rows) + padded(columns)
    return offsets, size
