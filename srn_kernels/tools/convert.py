"""Taking over models that use torch's spectral norm in both its forms, or code of their own.

Their own code is known by what it keeps: the public stable_rank hook by the attributes of torch's
hook; layer classes by a buffer for u and a method that returns the normalised weight (BigGAN:
``u0``, ``W_``; mimicry: ``sn_u``, ``sn_weights``); a wrapper module by ``module``, ``name`` and the
Parameters ``weight_bar``, ``weight_u``, ``weight_v`` (Self-Attention GAN).
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from srn_kernels.core.arguments import check_count
from srn_kernels.maths.matrix import state_dtype
from srn_kernels.model import root, wrap
from srn_kernels.model.loading import next_pair
from srn_kernels.model.settings import Settings
from srn_kernels.model.weight import KEY, NormalizedWeight, check_weight


class Found(NamedTuple):
    """One spectral norm in somebody else's form."""

    module: nn.Module  # whose parameter it is
    name: str
    hook: Any  # what holds the settings: the pre-hook, the parametrization, the module, the wrapper
    form: str  # "hook", "parametrization", "class" or "wrapper"


# Layer classes: the buffer of u, the method of the normalised weight, the number of iterations.
_CLASSES = (("u0", "W_", "num_itrs"), ("sn_u", "sn_weights", "num_iters"))


_CLASS_BUFFERS = re.compile(r"(u|sv)\d+|sn_(u|sigma)")


_CLASS_ATTRIBUTES = ("num_svs", "num_itrs", "num_iters", "transpose", "eps")


def _class_form(module: nn.Module) -> tuple[str, str, str] | None:
    for form in _CLASSES:
        u, method, _ = form
        if module._buffers.get(u) is not None and callable(getattr(module, method, None)):
            return form
    return None


def _plain_class(module: nn.Module) -> type:
    """The torch layer that a class of its own derives from."""
    for base in type(module).__mro__:
        if base.__module__.startswith("torch.nn.") and base is not nn.Module:
            return base
    raise TypeError(f"{type(module).__name__} is no subclass of a torch layer")


def _is_wrapper(module: nn.Module) -> bool:
    inner, name = module._modules.get("module"), getattr(module, "name", None)
    if inner is None or not isinstance(name, str):
        return False
    return all(name + suffix in inner._parameters for suffix in ("_bar", "_u", "_v"))


def _hooks(module: nn.Module) -> list[Found]:
    found = []
    for hook in module._forward_pre_hooks.values():
        # The public stable_rank hook is a copy of torch's class under another name.
        copied = all(hasattr(hook, a) for a in ("name", "dim", "n_power_iterations", "eps"))
        if isinstance(hook, SpectralNorm) or (copied and hasattr(hook, "compute_weight")):
            found.append(Found(module, hook.name, hook, "hook"))
    if parametrize.is_parametrized(module):
        for name, chain in module.parametrizations.items():
            norms = [p for p in chain if isinstance(p, _SpectralNorm)]
            if norms and len(chain) > 1:
                raise ValueError(
                    f"{name!r} of {type(module).__name__} has other parametrizations beside "
                    "spectral norm and cannot be taken over"
                )
            found.extend(Found(module, name, norm, "parametrization") for norm in norms)
    if _class_form(module):
        _plain_class(module)
        found.append(Found(module, "weight", module, "class"))
    if _is_wrapper(module):
        found.append(Found(module._modules["module"], module.name, module, "wrapper"))
    return found


def _weight(item: Found) -> Tensor | None:
    """The raw Parameter."""
    if item.form == "parametrization":
        return item.module.parametrizations[item.name].original
    suffix = {"hook": "_orig", "wrapper": "_bar", "class": ""}[item.form]
    return item.module._parameters[item.name + suffix]


def _pair(item: Found, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The u, v of its next evaluation (None for vectors, which torch keeps none for)."""
    module, name = item.module, item.name
    if item.form == "parametrization":
        return getattr(item.hook, "_u", None), getattr(item.hook, "_v", None)
    if item.form == "hook":
        return module._buffers[name + "_u"], module._buffers[name + "_v"]
    steps = _iterations(item)  # these iterate in evaluation as well
    if item.form == "wrapper":
        return next_pair(weight, 0, module._parameters[name + "_u"], steps)
    u = module._buffers[_class_form(module)[0]]
    if getattr(module, "transpose", False):
        v, u = next_pair(weight.flatten(1).T, 0, u, steps)
        return u, v
    return next_pair(weight, 0, u, steps)


def _iterations(item: Found) -> int:
    """Power iterations per forward."""
    if item.form == "class":
        return getattr(item.module, _class_form(item.module)[2], 1)
    if item.form == "wrapper":
        return getattr(item.hook, "power_iterations", 1)
    return item.hook.n_power_iterations


def _strip(item: Found, weight: Tensor) -> None:
    """Takes the foreign hook or parametrization off; the same Parameter is ``name`` again."""
    module, name = item.module, item.name
    if item.form == "parametrization":
        _strip_parametrization(module, name)
        module.register_parameter(name, weight)
        return
    if item.form == "class":
        module.__class__ = _plain_class(module)
        for key in [k for k in module._buffers if _CLASS_BUFFERS.fullmatch(k)]:
            del module._buffers[key]
        for key in _CLASS_ATTRIBUTES:
            module.__dict__.pop(key, None)
        return
    if item.form == "wrapper":
        for suffix in ("_bar", "_u", "_v"):
            del module._parameters[name + suffix]
        module.__dict__.pop(name, None)
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
    eps = getattr(item.hook, "eps", 1e-12)
    own = {"n_power_iterations": _iterations(item), "eps": eps}
    ratio = getattr(item.hook, "rank_ratio", None)
    if ratio is not None:  # above 0.9999 the hook is plain spectral norm
        own["rank_ratio"] = 1.0 if ratio > 0.9999 else ratio
    if keywords.get("rank_ratio") == 1.0 and "rank_ratio" in own:
        keywords = {k: v for k, v in keywords.items() if k != "rank_ratio"}
    # their own code normalises along dimension 0, transposed convolutions too
    dim = item.hook.dim if weight.dim() > 1 and item.form in ("hook", "parametrization") else 0
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
    sigma_max: float | None = None,
    grad_through_sigma: bool = True,
    gain: bool = False,
    groups: int = 1,
) -> nn.Module:
    """Takes over every spectral norm in a model and fuses them into one round.

    It finds torch.nn.utils.spectral_norm, torch.nn.utils.parametrizations.spectral_norm, the public
    ``stable_rank`` hook, layer classes like BigGAN's and mimicry's (which become the torch layers
    they derive from) and wrapper modules like Self-Attention GAN's (whose place the wrapped layer
    takes); their old checkpoints load into the converted model. Raw Parameters keep their identity
    (optimisers go on working), and u and v their exact values: no power iteration is made but what
    code that iterates in evaluation would make next. At rank_ratio=1 the next evaluation output is
    unchanged to rounding. Layers of srn_kernels join the round as they are.

    Args:
        model: modified in place and returned.
        rank_ratio: for all layers; at 1, stable_rank hooks keep the ratio they have.
        n_power_iterations, eps: None: what each layer has now.
        stable_rank, init_iterations, backend, gradient, sigma_max, grad_through_sigma, gain: see
            :func:`srn_kernels.stable_rank_norm`.
        groups: see :func:`srn_kernels.apply_stable_rank_norm`.

    Raises:
        ValueError, TypeError: nothing to take over, or a wrong argument; the model is as it was.
    """
    keywords: dict[str, Any] = {
        "rank_ratio": rank_ratio,
        "stable_rank": stable_rank,
        "init_iterations": init_iterations,
        "backend": backend,
        "gradient": gradient,
        "sigma_max": sigma_max,
        "grad_through_sigma": grad_through_sigma,
        "gain": gain,
    }
    if n_power_iterations is not None:
        keywords["n_power_iterations"] = n_power_iterations
    if eps is not None:
        keywords["eps"] = eps
    Settings(**keywords)
    check_count(groups, "groups", 1)

    prepared: list[tuple[NormalizedWeight, Found, Tensor, Tensor | None, Tensor | None]] = []
    first_of: dict[int, NormalizedWeight] = {}
    also: list[tuple[NormalizedWeight, Found, Tensor]] = []
    for prefix, module in model.named_modules():
        for item in _hooks(module):
            label = f"{prefix}.{item.name}" if prefix else item.name
            weight = _weight(item)
            check_weight(item.module, weight, label)
            settings = _settings(item, weight, dict(keywords))
            if gain and hasattr(item.module, item.name + "_gain"):
                raise ValueError(f"{label}: the module has an attribute {item.name + '_gain'!r}")
            entry = NormalizedWeight(item.module, item.name, label, settings)
            if id(weight) in first_of:
                also.append((first_of[id(weight)], item, weight))
            else:
                first_of[id(weight)] = entry
                prepared.append((entry, item, weight, *_pair(item, weight)))
    if not prepared and not root.entries_of(model):
        raise ValueError(
            f"model: {type(model).__name__} uses neither form of torch's spectral norm nor another "
            "that is known"
        )
    if _is_wrapper(model):
        raise ValueError(
            "model: is itself a wrapper, whose place its layer would have to take; convert the "
            "model that holds it, or model.module"
        )

    wrappers = [x[1] for x in (*prepared, *also) if x[1].form == "wrapper"]
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
        wrap._attach(entry, (u.detach().to(dtype).clone(), v.detach().to(dtype).clone()))
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if any(item.hook is child for item in wrappers):
                parent._modules[key] = child._modules["module"]
    assert all(KEY in entry.sites[0][0].__dict__ for entry, *_ in prepared)
    return wrap.fuse(model, groups=groups)
