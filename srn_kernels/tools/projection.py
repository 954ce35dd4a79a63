"""Projection instead of reparametrisation: weights are normalised in place after each step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from srn_kernels import functional
from srn_kernels.core.arguments import check_count
from srn_kernels.maths.matrix import state_dtype
from srn_kernels.model.select import Pattern, select
from srn_kernels.model.settings import Options, takes_options
from srn_kernels.model.weight import NormalizedWeight

if TYPE_CHECKING:
    from typing_extensions import Unpack

_MEANINGLESS = ("gradient", "preserve", "sigma_max", "grad_through_sigma", "gain", "rule")
_WRAPPED = ("normalised already", "its Parameter is normalised by another layer")


class Projection:
    """What :func:`project_after_step` returns: the projected weights with their u and v.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> projection = srn.project_after_step(optimizer, model)
        >>> projection.names, sorted(projection.state_dict()["0.weight"])
        (['0.weight'], ['u', 'v'])
        >>> projection.remove()
    """

    def __init__(
        self, optimizer: Optimizer, entries: Sequence[NormalizedWeight], skipped: list[Any]
    ) -> None:
        self.skipped = skipped
        self._entries = list(entries)
        self._state = [e.drawn_state() for e in entries]
        self._handle = optimizer.register_step_post_hook(self._after_step)
        self.refresh()

    @property
    def names(self) -> list[str]:
        """The parameters' names in the model."""
        return [e.label for e in self._entries]

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.project()

    def _placed(self, place: int) -> tuple[Tensor, Tensor]:
        """u and v where the weight now is."""
        weight = self._entries[place].weight
        dtype = state_dtype(weight.dtype)
        pair = self._state[place]
        if pair[0].device != weight.device or pair[0].dtype != dtype:
            pair = self._state[place] = tuple(x.to(weight.device, dtype) for x in pair)
        return pair

    def _grouped(self) -> list[list[int]]:
        """Layers that one call can take."""
        groups: dict[Any, list[int]] = {}
        for i, entry in enumerate(self._entries):
            if not entry.weight.is_meta:
                s = entry.settings
                groups.setdefault((s.n_power_iterations, s.eps, s.backend), []).append(i)
        return list(groups.values())

    def _arguments(self, group: Sequence[int]) -> tuple[Any, dict[str, Any]]:
        chosen = [self._entries[i] for i in group]
        us, vs = zip(*[self._placed(i) for i in group], strict=True)
        settings = chosen[0].settings
        weights = [e.matrix_weight() for e in chosen]
        return (weights, us, vs, [e.target_rank() for e in chosen]), {
            "eps": settings.eps,
            "dims": [e.settings.dim for e in chosen],
            "backend": settings.backend,
        }

    @torch.no_grad()
    def project(self) -> None:
        """A round's power iterations, and W <- W_hat: what happens after every optimiser step."""
        for group in self._grouped():
            arguments, keywords = self._arguments(group)
            n = self._entries[group[0]].settings.n_power_iterations
            functional.stable_rank_project_(*arguments, n_power_iterations=n, **keywords)

    @torch.no_grad()
    def refresh(self, iterations: int | None = None) -> None:
        """Converges u and v anew (``init_iterations`` unless given); the weights stay."""
        if iterations is not None:
            iterations = check_count(iterations, "iterations", 1)
        for group in self._grouped():
            arguments, keywords = self._arguments(group)
            n = self._entries[group[0]].settings.init_iterations
            n = n if iterations is None else iterations
            if n > 0:
                functional.stable_rank_normalize(*arguments, n_power_iterations=n, **keywords)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """{name: {"u": (rows,), "v": (columns,)}}, for checkpoints."""
        pairs = zip(self._entries, self._state, strict=True)
        return {e.label: {"u": u.clone(), "v": v.clone()} for e, (u, v) in pairs}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Takes over what :meth:`state_dict` gave; ValueError if names or shapes differ."""
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a mapping, got {type(state).__name__}")
        if set(state) != set(self.names):
            raise ValueError(f"state: names differ in {sorted(set(state) ^ set(self.names))}")
        for entry, pair in zip(self._entries, self._state, strict=True):
            for key, x in zip("uv", pair, strict=True):
                if state[entry.label][key].shape != x.shape:
                    raise ValueError(
                        f"state[{entry.label!r}][{key!r}] has shape "
                        f"{tuple(state[entry.label][key].shape)}, expected {tuple(x.shape)}"
                    )
        for entry, pair in zip(self._entries, self._state, strict=True):
            for key, x in zip("uv", pair, strict=True):
                x.copy_(state[entry.label][key])

    def remove(self) -> None:
        """Takes the hook off; the weights stay as they are."""
        self._handle.remove()


# Chooses layers in the words of apply_stable_rank_norm, each written out for its reader.
@takes_options(without=_MEANINGLESS)
def project_after_step(
    optimizer: Optimizer,
    model: nn.Module,
    rank_ratio: float = 0.7,
    *,
    include: Pattern = None,
    exclude: Pattern = None,
    layer_types: Sequence[type] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    **options: Unpack[Options],
) -> Projection:
    """Normalises weights in place after every step of an optimiser (projected gradient).

    The model is not wrapped: its forward and backward see ordinary parameters, no W_hat is kept,
    and nothing is differentiated. After ``optimizer.step()`` each selected weight that the
    optimiser holds becomes its W_hat, all in one fused call. u and v live in what is returned.
    The weights are first changed by the first step; ``.project()`` does it at once.

    Args:
        optimizer: the weights of ``model`` that it does not hold are left alone (see ``skipped``).
        model: not modified; the other arguments choose its layers and their constraint as in
            :func:`srn_kernels.apply_stable_rank_norm`, with those of :class:`srn_kernels.Options`
            that have a meaning without a W_hat in the forward.

    Returns:
        A :class:`Projection`, with ``project()``, ``refresh()``, ``remove()`` and a state_dict.

    Raises:
        ValueError, TypeError: a wrong argument, no layer to project, or a layer that is wrapped by
            srn_kernels already.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8, bias=False))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> projection = srn.project_after_step(optimizer, model, rank_ratio=0.5)
        >>> model(torch.randn(2, 8)).square().sum().backward()
        >>> optimizer.step()  # steps, then W <- W_hat
        >>> bool(model[0].weight.square().sum() <= 4.001)  # |W|_F^2 <= r, as sigma is 1
        True
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch Optimizer, got {type(optimizer).__name__}")
    entries, skipped = select(
        model,
        {"rank_ratio": rank_ratio, **options},
        include=include,
        exclude=exclude,
        layer_types=layer_types,
        overrides=overrides,
    )
    for pattern, values in (overrides or {}).items():
        if idle := set(values).intersection(_MEANINGLESS):
            raise ValueError(
                f"overrides[{pattern!r}]: {sorted(idle)} have no meaning for a projection"
            )
    wrapped = [name for name, reason in skipped if reason in _WRAPPED]
    if wrapped:
        raise ValueError(f"model: {wrapped} are normalised by srn_kernels already")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    chosen = [e for e in entries if id(e.weight) in held]
    skipped += [(e.label, "not a parameter of the optimizer") for e in entries if e not in chosen]
    if not chosen:
        raise ValueError("optimizer: it holds none of the weights selected in model")
    return Projection(optimizer, chosen, skipped)
