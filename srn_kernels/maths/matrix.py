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


def matrix_shape(weight: Tensor, dim: int) -> tuple[int, int]:
    """(rows, columns) of :func:`matrix`."""
    rows = weight.shape[dim]
    return rows, weight.numel() // rows


def vector_shape(n: int, pairs: int) -> tuple[int, ...]:
    """The shape of the u of n rows, or the v of n columns, of a layer that keeps ``pairs``."""
    return (n,) if pairs == 1 else (n, pairs)


def round_vectors(
    round_state: Tensor, offset: int, weight: Tensor, dim: int, pairs: int = 1
) -> tuple[Tensor, Tensor]:
    """Views of u and v in a round's flat state, of :func:`vector_shape`."""
    rows, columns = matrix_shape(weight, dim)
    start = offset + padded(rows * pairs)
    u = round_state[offset : offset + rows * pairs].view(vector_shape(rows, pairs))
    return u, round_state[start : start + columns * pairs].view(vector_shape(columns, pairs))


def first_vector(x: Tensor) -> Tensor:
    """The u or v of the first pair; nothing where a layer keeps none."""
    return x if x.dim() == 1 else x[:, :1].flatten()


def state_layout(sizes: Sequence[tuple[int, int]]) -> tuple[list[int], int]:
    """Offsets of the layers' u in a round's flat state, and its size, from the numbers of elements
    of each layer's u and v."""
    offsets, size = [], 0
    for of_u, of_v in sizes:
        offsets.append(size)
        size += padded(of_u) + padded(of_v)
    return offsets, size
