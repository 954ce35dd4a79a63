"""Taking over models that use torch's spectral norm, in both its forms, or the stable_rank hook."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from srn_kernels import layers, rounds
from srn_kernels.reference import state_dtype
from srn_kernels.state import KEY, NormalizedWeight, Settings, check_weight


class Found(NamedTuple):
    """One spectral norm in somebody else's form."""

    module: nn.Module
    name: str
    hook: Any  # the pre-hook object (legacy) or the parametrization module
    legacy: bool


def _hooks(module: nn.Module) -> list[Found]:
    found = []
    for hook in module._forward_pre_hooks.values():
        # The public stable_rank hook is a copy of torch's class under another name.
        copied = all(hasattr(hook, a) for a in ("name", "dim", "n_power_iterations", "eps"))
        if isinstance(hook, SpectralNorm) or (copied and hasattr(hook, "compute_weight")):
            found.append(Found(module, hook.name, hook, True))
    if parametrize.is_parametrized(module):
        for name, chain in module.parametrizations.items():
            norms = [p for p in chain if isinstance(p, _SpectralNorm)]
            if norms and len(chain) > 1:
                raise ValueError(
                    f"{name!r} of {type(module).__name__} has other parametrizations beside "
                    "spectral norm and cannot be taken over"
                )
            found.extend(Found(module, name, norm, False) for norm in norms)
    return found


def _raw(item: Found) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The raw Parameter and the stored u, v (None for vectors, which torch keeps none for)."""
    if item.legacy:
        weight = item.module._parameters[item.name + "_orig"]
        pair = (item.module._buffers[item.name + s] for s in ("_u", "_v"))
        return weight, *pair
    weight = item.module.parametrizations[item.name].original
    return weight, getattr(item.hook, "_u", None), getattr(item.hook, "_v", None)


def _strip(item: Found, weight: Tensor) -> None:
    """Takes the foreign hook or parametrization off; the same Parameter is ``name`` again."""
    module, name = item.module, item.name
    if not item.legacy:
        _strip_parametrization(module, name)
        module.register_parameter(name, weight)
        return
    module.__dict__.pop(name, None)
    del module._parameters[name + "_orig"]
    for suffix in ("_u", "_v"):
        del module._buffers[name + suffix]
    module.register_parameter(name, weight)
    for hooks in (
        module._forward_pre_hooks,
        module._state_dict_hooks,
        module._load_state_dict_pre_hooks,
    ):
        for key, hook in list(hooks.items()):
            hook = getattr(hook, "hook", hook)
            if hook is item.hook or getattr(hook, "fn", None) is item.hook:
                del hooks[key]


def _strip_parametrization(module: nn.Module, name: str) -> None:
    """As torch's remove_parametrizations, which deletes ``name`` from a class that every deepcopy
    of the module shares, and so breaks the copies."""
    del module.parametrizations[name]
    cls = type(module)
    if len(module.parametrizations) == 0:
        del module.parametrizations
        module.__class__ = cls.__bases__[0]
        return
    members = {k: v for k, v in vars(cls).items() if k not in (name, "__dict__", "__weakref__")}
    module.__class__ = type(cls.__name__, cls.__bases__, members)


def _settings(item: Found, weight: Tensor, keywords: dict[str, Any]) -> Settings:
    own = {"n_power_iterations": item.hook.n_power_iterations, "eps": item.hook.eps}
    ratio = getattr(item.hook, "rank_ratio", None)
    if ratio is not None:  # above 0.9999 the hook is plain spectral norm
        own["rank_ratio"] = 1.0 if ratio > 0.9999 else ratio
    if keywords.get("rank_ratio") == 1.0 and "rank_ratio" in own:
        keywords = {k: v for k, v in keywords.items() if k != "rank_ratio"}
    dim = item.hook.dim if weight.dim() > 1 else 0
    return Settings(**{**own, **keywords, "dim": dim % weight.dim()})


def convert_spectral_norm(
    model: nn.Module,
    rank_ratio: float = 1.0,
    *,
    n_power_iterations: int | None = None,
    eps: float | None = None,
    stable_rank: float | None = None,
    init_iterations: int = 15,
    backend: str = "auto",
    gradient: str = "frozen",
) -> nn.Module:
    """Takes over every spectral norm in a model and fuses them into one round.

    It finds torch.nn.utils.spectral_norm, torch.nn.utils.parametrizations.spectral_norm and the
    public ``stable_rank`` hook. Raw Parameters keep their identity (optimisers go on working), u
    and v their exact values: no power iteration is made, and at rank_ratio=1 the next evaluation
    output is unchanged to rounding. Layers of srn_kernels join the round as they are.

    Args:
        model: modified in place and returned.
        rank_ratio: for all layers; at 1, stable_rank hooks keep the ratio they have.
        n_power_iterations, eps: None: what each layer has now.
        stable_rank, init_iterations, backend, gradient: see :func:`srn_kernels.stable_rank_norm`.

    Raises:
        ValueError, TypeError: nothing to take over, or a wrong argument; the model is as it was.
    """
    keywords: dict[str, Any] = {
        "rank_ratio": rank_ratio,
        "stable_rank": stable_rank,
        "init_iterations": init_iterations,
        "backend": backend,
        "gradient": gradient,
    }
    if n_power_iterations is not None:
        keywords["n_power_iterations"] = n_power_iterations
    if eps is not None:
        keywords["eps"] = eps
    Settings(**keywords)

    prepared: list[tuple[NormalizedWeight, Found, Tensor, Tensor | None, Tensor | None]] = []
    first_of: dict[int, NormalizedWeight] = {}
    also: list[tuple[NormalizedWeight, Found, Tensor]] = []
    for prefix, module in model.named_modules():
        for item in _hooks(module):
            label = f"{prefix}.{item.name}" if prefix else item.name
            weight, u, v = _raw(item)
            check_weight(weight, label)
            entry = NormalizedWeight(
                module, item.name, label, _settings(item, weight, dict(keywords))
            )
            if id(weight) in first_of:
                also.append((first_of[id(weight)], item, weight))
            else:
                first_of[id(weight)] = entry
                prepared.append((entry, item, weight, u, v))
    if not prepared and not rounds.entries_of(model):
        raise ValueError(
            f"model: {type(model).__name__} uses neither form of torch's spectral norm nor the "
            "stable_rank hook"
        )

    for entry, item, weight, u, v in prepared:
        _strip(item, weight)
        for first, other, _ in also:
            if first is entry:
                _strip(other, weight)
                entry.sites.append((other.module, other.name))
        if u is None:  # torch keeps no u, v for a vector: w / |w| is exact
            norm = torch.linalg.vector_norm(weight.detach().double()).clamp_min(1e-30)
            u, v = weight.new_ones(1), (weight.detach().double() / norm)
        dtype = state_dtype(weight.dtype)
        layers._attach(entry, (u.detach().to(dtype).clone(), v.detach().to(dtype).clone()))
        entry.mark_fresh()
    assert all(KEY in entry.sites[0][0].__dict__ for entry, *_ in prepared)
    return layers.fuse(model)
