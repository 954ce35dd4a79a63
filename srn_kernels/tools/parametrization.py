"""Stable rank normalisation as a parametrization, for users of torch.nn.utils.parametrize."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srn_kernels import functional
from srn_kernels.maths.matrix import state_dtype
from srn_kernels.model.settings import Settings, plain
from srn_kernels.model.weight import check_weight


class StableRankNorm(nn.Module):
    """``register_parametrization(module, "weight", StableRankNorm(module.weight))``.

    It has the semantics of torch's own spectral-norm parametrization: computed at every access,
    one power iteration per access in training, buffers ``_u`` (rows,) and ``_v`` (columns,) drawn
    from the global random state and iterated 15 times. With rank_ratio=1 it equals torch's to
    rounding, step for step. A one-dimensional weight becomes W / |W|_2.

    Raises ValueError or TypeError for a weight or setting that cannot be used.

    Example:
        >>> layer = nn.Linear(64, 32)
        >>> rule = srn.StableRankNorm(layer.weight, rank_ratio=0.25)
        >>> _ = nn.utils.parametrize.register_parametrization(layer, "weight", rule)
        >>> bool(srn.linalg.stable_rank(layer.weight) <= 8.01)
        True
    """

    rank_ratio: float
    n_power_iterations: int
    eps: float
    dim: int
    target_rank: float  # of a matrix; a vector has none, and no u, v
    _u: Tensor
    _v: Tensor

    def __init__(
        self,
        weight: Tensor,
        rank_ratio: float = 0.7,
        n_power_iterations: int = 1,
        eps: float = 1e-12,
        dim: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(weight, Tensor):
            remedy = ", not the module" if isinstance(weight, nn.Module) else ""
            raise TypeError(
                f"weight must be a Tensor{remedy}, got {type(weight).__name__}; "
                "StableRankNorm(module.weight)"
            )
        check_weight(self, weight, "weight")
        dim = plain(dim)
        if not isinstance(dim, int) or isinstance(dim, bool):
            raise TypeError(f"dim must be an int, got {dim!r}")
        if not -weight.dim() <= dim < weight.dim():
            raise ValueError(f"dim {dim} is no dimension of a weight of {tuple(weight.shape)}")
        settings = Settings(rank_ratio=rank_ratio, n_power_iterations=n_power_iterations, eps=eps)
        self.rank_ratio = settings.rank_ratio
        self.n_power_iterations = settings.n_power_iterations
        self.eps = settings.eps
        self.dim = dim % weight.dim()
        if weight.dim() == 1:
            return
        rows = weight.shape[self.dim]
        columns = weight.numel() // rows
        self.target_rank = settings.target_rank(rows, columns)
        for name, size in (("_u", rows), ("_v", columns)):
            drawn = torch.empty(size, dtype=state_dtype(weight.dtype), device=weight.device)
            self.register_buffer(name, F.normalize(drawn.normal_(0, 1), dim=0, eps=self.eps))
        with torch.no_grad():
            self._normalize(weight, 15, training=True)

    def _normalize(self, weight: Tensor, iterations: int, training: bool) -> Tensor:
        (out,) = functional.stable_rank_normalize(
            [weight],
            [self._u],
            [self._v],
            [self.target_rank],
            n_power_iterations=iterations,
            eps=self.eps,
            dims=[self.dim],
            training=training,
        )
        return out

    def forward(self, weight: Tensor) -> Tensor:
        if weight.dim() == 1:
            return F.normalize(weight, dim=0, eps=self.eps)
        return self._normalize(weight, self.n_power_iterations, self.training)

    def right_inverse(self, value: Tensor) -> Tensor:
        return value
