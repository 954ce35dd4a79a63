"""The options of one wrapped parameter: the one list of them, and the checks."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypedDict, TypeVar

from srn_kernels import backends
from srn_kernels.core.arguments import (
    check_count,
    check_eps,
    check_gradient,
    check_number,
    effective_rank,
)
from srn_kernels.maths.rule import Rule
from srn_kernels.maths.rules import check_rule, choose, named
from srn_kernels.maths.top_one import TOP_ONE


class Options(TypedDict, total=False):
    """The keywords of every function that normalises weights.

    Attributes:
        n_power_iterations: per training forward (1).
        eps: |sigma| at or below it passes the weight unchanged (1e-12).
        dim: the output dimension; None: 1 for transposed convolutions, else 0.
        stable_rank: r itself, >= 1, in place of rank_ratio (None).
        init_iterations: power iterations at wrapping, and whenever the weight is found replaced
            (15).
        backend: "auto", "reference", "cpu", "triton" or "cuda" ("auto").
        gradient: "frozen" (u and v held constant, as SN does), or "exact" (they turn with the
            weight; differentiable once); the same at rank_ratio 1 ("frozen").
        preserve: k, how many singular values keep their ratio to the largest (Theorem 1 of arXiv
            1906.04659; fewer where r is too small for k). Above 1 the buffers are blocks, (rows, k)
            and (columns, k), of at most min(rows, columns) vectors. 0: the nearest matrix of stable
            rank r, whose spectral norm exceeds 1. Other values than 1 run in plain PyTorch (1).
        sigma_max: s, a soft bound in place of spectral norm 1: sigma W_hat / max(1, sigma / s), so
            that a weight with sigma <= s keeps its norm, and at rank_ratio 1 stays as it is (None).
        grad_through_sigma: whether the gradient goes through the divisor max(1, sigma / s) (True).
        gain: multiplies W_hat by a learnable Parameter ``<name>_gain`` (1,), 1 at first, which the
            layer gains; create the optimiser afterwards (False).
        rule: the normalisation, "stable_rank" or the name of one that
            :func:`srn_kernels.register_rule` was given, which then says what the options mean
            ("stable_rank").

    Example:
        >>> gentle: srn.Options = {"sigma_max": 6.0, "n_power_iterations": 2}
        >>> model = srn.apply_stable_rank_norm(nn.Sequential(nn.Linear(8, 8)), 1.0, **gentle)
        >>> srn.report(model)[0].note
        'sigma_max=6'
    """

    n_power_iterations: int
    eps: float
    dim: int | None
    stable_rank: float | None
    init_iterations: int
    backend: str
    gradient: str
    preserve: int
    sigma_max: float | None
    grad_through_sigma: bool
    gain: bool
    rule: str


@dataclass(frozen=True)
class Settings:
    """The checked :class:`Options` of one wrapped parameter, and its rank_ratio in (0, 1].

    ``dim`` is resolved and not negative. numpy's scalars are numbers, and are kept as Python's.
    """

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
        for field in fields(self):
            object.__setattr__(self, field.name, _plain(getattr(self, field.name)))
        check_ratio(self.rank_ratio)
        rank, bound = self.stable_rank, self.sigma_max
        if rank is not None and not 1 <= check_number(rank, "stable_rank") < math.inf:
            raise ValueError(f"stable_rank must be a finite number >= 1 or None, got {rank}")
        check_count(self.n_power_iterations, "n_power_iterations", 1)
        check_count(self.init_iterations, "init_iterations", 0)
        check_eps(self.eps)
        backends.check_name(self.backend)
        check_gradient(self.gradient)
        check_count(self.preserve, "preserve", 0)
        if bound is not None and not 0 < check_number(bound, "sigma_max") < math.inf:
            raise ValueError(f"sigma_max must be positive and finite, or None, got {bound}")
        for argument in ("grad_through_sigma", "gain"):
            if not isinstance(getattr(self, argument), bool):
                raise TypeError(f"{argument} must be a bool, got {getattr(self, argument)!r}")
        check_rule(self.rule)
        rule = self.chosen_rule
        what = f"rule={self.rule!r}" if self.preserve == 1 else f"preserve={self.preserve}"
        if not rule.kernels and self.backend not in ("auto", "reference"):
            raise ValueError(
                f"{what} is served by plain PyTorch, backend 'auto' or 'reference', not by "
                f"{self.backend!r}"
            )
        if bound is not None and not rule.pairs(1, 1):
            raise ValueError(f"{what} knows no sigma for sigma_max={bound} to bound")

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


def _plain(value: Any) -> Any:
    """Python's own number for numpy's scalars, which register as numbers; else the value."""
    if isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    return bool(value) if type(value).__name__ in ("bool_", "bool") else value


def check_ratio(value: float) -> float:
    if not 0 < check_number(value, "rank_ratio") <= 1:
        raise ValueError(f"rank_ratio must be in (0, 1], got {value}")
    return float(value)


def nearest(name: str, names: Iterable[str]) -> str:
    """What to say of a name that is none of ``names``."""
    names = sorted(names)
    close = difflib.get_close_matches(name, names, 1, 0.5)
    return f"did you mean {close[0]!r}?" if close else f"there are {', '.join(names)}"


def split_dim(options: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """The options that :class:`Settings` takes as they are, and ``dim``."""
    options = dict(options)
    return options, options.pop("dim", None)


F = TypeVar("F", bound=Callable[..., Any])

_DEFAULTS = {**{f.name: f.default for f in fields(Settings)}, "dim": None}


def takes_options(without: Iterable[str] = (), **defaults: Any) -> Callable[[F], F]:
    """For functions with ``**options: Unpack[Options]``: ``inspect.signature`` and ``help`` show
    the names, and an unknown one is refused naming the nearest that there is.

    ``without``: options that have no meaning for the function; ``defaults``: where its own differ.
    """
    without = frozenset(without)

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        known = {p.name for p in own}
        names = [n for n in Options.__annotations__ if n not in known and n not in without]
        shown = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=defaults.get(name, _DEFAULTS[name]),
                annotation=Options.__annotations__[name].__forward_arg__,
            )
            for name in names
        ]

        @functools.wraps(function)
        def checked(*args: Any, **keywords: Any) -> Any:
            for name in keywords:
                if name in without:
                    raise TypeError(f"{function.__name__}(): {name!r} has no meaning here")
                if name not in known and name not in names:
                    raise TypeError(
                        f"{function.__name__}() got an unexpected keyword argument {name!r}; "
                        f"{nearest(name, known.union(names))}"
                    )
            return function(*args, **keywords)

        checked.__signature__ = signature.replace(parameters=[*own, *shown])
        return checked

    return decorate
