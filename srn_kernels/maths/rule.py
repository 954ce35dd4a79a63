"""What a normalisation is: the one interface that rounds, backends, gradients and reports use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from srn_kernels.maths.matrix import from_matrix, matrix, state_dtype
from srn_kernels.maths.scalars import SPECTRAL, Stats


class Normalized(NamedTuple):
    """One layer, normalised."""

    weight: Tensor  #: W_hat
    u: Tensor  #: (rows,), or (rows, pairs), the unit u of this round
    v: Tensor  #: (columns,), or (columns, pairs)
    stats: Tensor  #: float64, a row of Stats


class Rule:
    """A normalisation of a matrix W, in plain PyTorch; a subclass gives its formulas.

    Everywhere w is (rows, columns), float32 or float64; u and v, in its dtype, are (rows,) and
    (columns,) where the rule keeps one pair of vectors, else (rows, pairs) and (columns, pairs);
    target_rank is the layer's r, inf for none; stats is the layer's float64 row of
    :class:`srn_kernels.maths.scalars.Stats`. :func:`srn_kernels.register_rule` makes a rule an
    option of every function that normalises.

    Example:
        >>> class Doubled(srn.Rule):
        ...     name = "doubled"
        ...     def normalize(self, w, u, v, target_rank, iterations, eps):
        ...         return 2 * w, u, v, self.stats_of(w)
        ...     def gradient(self, g, w, u, v, stats, target_rank):
        ...         return 2 * g
        >>> no_vectors = torch.empty(0)
        >>> Doubled().normalize_layer(torch.eye(2), no_vectors, no_vectors, 1.0, 1, 1e-12, 0).weight
        tensor([[2., 0.],
                [0., 2.]])
    """

    name: str  # what ``rule=`` calls it
    kernels = False  # whether the kernels of the backends serve it, or plain PyTorch alone
    split = False  # whether it works on DTensors, whose matrices lie with several processes

    def pairs(self, rows: int, columns: int) -> int:
        """How many u and v a layer keeps from one round to the next."""
        return 0

    def preserving(self, preserve: int) -> Rule:
        """The rule that keeps the top ``preserve`` singular values in proportion."""
        raise ValueError(f"rule {self.name!r} has no preserve, got {preserve}")

    def normalize(
        self, w: Tensor, u: Tensor, v: Tensor, target_rank: float, iterations: int, eps: float
    ) -> Normalized:
        """W_hat, a matrix, with the u and v of this round and its statistics (:meth:`stats_of`).

        Nothing given is modified. iterations: how often u and v move; 0: evaluation.
        """
        raise NotImplementedError

    def repeat(
        self, w: Tensor, u: Tensor, v: Tensor, stats: Tensor, target_rank: float, eps: float
    ) -> Tensor:
        """W_hat of a finished round once more, from that round's own u, v and stats."""
        return self.normalize(w, u, v, target_rank, 0, eps)[0]

    def gradient(
        self, g: Tensor, w: Tensor, u: Tensor, v: Tensor, stats: Tensor, target_rank: float
    ) -> Tensor:
        """dL/dW from g = dL/dW_hat, u and v of the round held constant.

        Its operations are differentiable in g and w, as functions of W and not of stats alone:
        they are the second derivative.
        """
        raise NotImplementedError

    def exact_part(
        self, g: Tensor, w: Tensor, u: Tensor, v: Tensor, stats: Tensor, target_rank: float
    ) -> Tensor | None:
        """What ``gradient="exact"`` adds, because u and v turn with W; None: nothing."""
        return None

    def note(self, stats: Tensor) -> str:
        """What a report says of the layer beside its numbers."""
        return f"rule={self.name!r}; plain PyTorch (reference)"

    @staticmethod
    def stats_of(w: Tensor, branch: int = SPECTRAL, **known: float | Tensor) -> Tensor:
        """A row of statistics by name; those that a rule does not have are nan."""
        row = dict.fromkeys(Stats._fields, float("nan")) | Stats._field_defaults
        row |= {"branch": branch, "kept": 0} | known
        tensors = [torch.as_tensor(x, dtype=torch.float64, device=w.device) for x in row.values()]
        return torch.stack(tensors)

    # The same for a weight of any shape and dtype, whose output dimension is ``dim``.

    def normalize_layer(
        self,
        weight: Tensor,
        u: Tensor,
        v: Tensor,
        target_rank: float,
        iterations: int,
        eps: float,
        dim: int,
        out_dtype: torch.dtype | None = None,
        **options: str,
    ) -> Normalized:
        """:meth:`normalize` with W_hat in the weight's shape, and in its dtype or ``out_dtype``."""
        dtype = state_dtype(weight.dtype)
        w = matrix(weight, dim).to(dtype)
        made = self.normalize(w, u.to(dtype), v.to(dtype), target_rank, iterations, eps, **options)
        w_hat, *rest = made
        return Normalized(from_matrix(w_hat, weight, dim).to(out_dtype or weight.dtype), *rest)

    def repeat_layer(
        self,
        weight: Tensor,
        u: Tensor,
        v: Tensor,
        stats: Tensor,
        target_rank: float,
        eps: float,
        dim: int,
    ) -> Tensor:
        """:meth:`repeat` in the weight's shape and the arithmetic's dtype."""
        w = matrix(weight, dim).to(u.dtype)
        return from_matrix(self.repeat(w, u, v, stats, target_rank, eps), weight, dim)

    def layer_gradient(self, *layer: Any) -> Tensor:
        """:meth:`gradient` in the weight's shape and dtype, of (grad, weight, u, v, stats,
        target_rank, dim)."""
        return _of_layer(self.gradient, *layer).to(layer[1].dtype)

    def layer_exact_part(self, *layer: Any) -> Tensor | None:
        """:meth:`exact_part` of the same, in the weight's shape and the arithmetic's dtype."""
        return _of_layer(self.exact_part, *layer)


def _of_layer(
    formula: Callable[..., Tensor | None], grad: Tensor, weight: Tensor, u: Tensor, *known: Any
) -> Tensor | None:
    *known, dim = known
    g, w = (matrix(x, dim).to(u.dtype) for x in (grad, weight))
    result = formula(g, w, u, *known)
    return None if result is None else from_matrix(result, weight, dim)
