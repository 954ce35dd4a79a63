"""The options of one wrapped parameter, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass

from srn_kernels import backends
from srn_kernels.core.arguments import (
    check_count,
    check_eps,
    check_gradient,
    effective_rank,
)
from srn_kernels.maths.rule import Rule
from srn_kernels.maths.rules import check_rule, choose, named
from srn_kernels.maths.top_one import TOP_ONE


@dataclass(frozen=True)
class Settings:
    """The checked keywords of one wrapped parameter; ``dim`` is resolved and not negative."""

    rank_ratio: float = 0.7
    stable_rank: float | None = None
    n_power_iterations: int = 1
    eps: float = 1e-12
    dim: int = 0
    init_iterations: int = 15
    backend: str = "auto"
    gradient: str = "frozen"
    preserve: int = 1
    sigma_max: float | None = None
    grad_through_sigma: bool = True
    gain: bool = False
    rule: str = TOP_ONE.name

    def __post_init__(self) -> None:
        check_ratio(self.rank_ratio)
        if self.stable_rank is not None and not (
            isinstance(self.stable_rank, (int, float)) and 1 <= self.stable_rank < math.inf
        ):
            raise ValueError(
                f"stable_rank must be a finite number >= 1 or None, got {self.stable_rank!r}"
            )
        check_count(self.n_power_iterations, "n_power_iterations", 1)
        check_count(self.init_iterations, "init_iterations", 0)
        check_eps(self.eps)
        backends.check_name(self.backend)
        check_gradient(self.gradient)
        check_count(self.preserve, "preserve", 0)
        check_sigma_max(self.sigma_max)
        for argument in ("grad_through_sigma", "gain"):
            if not isinstance(getattr(self, argument), bool):
                raise TypeError(f"{argument} must be a bool, got {getattr(self, argument)!r}")
        check_rule(self.rule)
        rule, what = self.chosen_rule, f"preserve={self.preserve}"
        if self.preserve == 1:
            what = f"rule={self.rule!r}"
        if not rule.kernels and self.backend not in ("auto", "reference"):
            raise ValueError(
                f"{what} is served by plain PyTorch, backend 'auto' or 'reference', not by "
                f"{self.backend!r}"
            )
        if self.sigma_max is not None and not rule.pairs(1, 1):
            raise ValueError(f"{what} knows no sigma for sigma_max={self.sigma_max} to bound")

    @property
    def chosen_rule(self) -> Rule:
        """What ``rule`` and ``preserve`` come to."""
        return named(choose(self.rule, self.preserve))

    @property
    def scales(self) -> bool:
        """Whether W_hat gets a factor of its own."""
        return self.gain or self.sigma_max is not None

    def target_rank(self, rows: int, columns: int) -> float:
        """The stable rank r to keep below; inf means spectral normalisation alone."""
        if self.stable_rank is not None:
            return effective_rank(self.stable_rank, rows, columns)
        if self.rank_ratio == 1:
            return math.inf
        return effective_rank(max(1.0, self.rank_ratio * min(rows, columns)), rows, columns)


def check_ratio(value: float) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"rank_ratio must be a number, got {value!r}")
    if not 0 < value <= 1:
        raise ValueError(f"rank_ratio must be in (0, 1], got {value}")
    return value


def check_sigma_max(value: float | None) -> None:
    if value is None:
        return
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"sigma_max must be a number or None, got {value!r}")
    if not 0 < value < math.inf:
        raise ValueError(f"sigma_max must be positive and finite, or None, got {value}")
