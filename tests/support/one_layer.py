"""One layer through a round of any backend, and the oracle's word on it."""

from __future__ import annotations

from typing import NamedTuple

import oracle
import torch
from torch import Tensor

from srn_kernels.functional import stable_rank_normalize


class Round(NamedTuple):
    """One layer's round: state before and after, W_hat, G and dL/dW."""

    weight: Tensor
    before: tuple[Tensor, Tensor]
    u: Tensor
    v: Tensor
    out: Tensor
    g: Tensor
    grad: Tensor

    @property
    def moved(self) -> bool:
        return not all(map(torch.equal, self.before, (self.u, self.v)))

    def check(self, rank: float, *, iterations: int = 1, dim: int = 0, what: str = "") -> None:
        """Against the oracle, forward and backward."""
        pair = self.u, self.v
        if iterations == 0:  # the round's own u and v are the state's unit vectors
            assert not self.moved
            pair = oracle.iterate(oracle.matrix_of(self.weight, dim), *self.before, 0)
        layer = oracle.assert_forward(
            self.weight, dim, self.before, rank, iterations, self.out, *pair, what=what
        )
        oracle.assert_gradient(layer, self.g, self.grad, dim, what)


def run(
    backend: str,
    weight: Tensor,
    rank: float,
    *,
    state: tuple[Tensor, Tensor] | None = None,
    iterations: int = 1,
    dim: int = 0,
    out_dtype: torch.dtype | None = None,
) -> Round:
    u, v = state or oracle.make_state(weight, dim)
    before = u.clone(), v.clone()
    leaf = weight.detach().requires_grad_()
    (out,) = stable_rank_normalize(
        [leaf],
        [u],
        [v],
        [rank],
        n_power_iterations=max(1, iterations),
        training=iterations > 0,
        dims=[dim],
        out_dtype=out_dtype,
        backend=backend,
    )
    g = torch.randn(out.shape).to(out.dtype)
    (grad,) = torch.autograd.grad(out, leaf, g)
    return Round(weight.detach(), before, u, v, out.detach(), g, grad)
