"""The forms of spectral norm that convert knows: what each would do, its state, taking it off."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from srn_kernels.maths.matrix import state_dtype
from srn_kernels.model.foreign import Found, class_form, plain_class
from srn_kernels.model.formats import CLASS_BUFFERS, Origin, next_pair
from srn_kernels.model.freshness import State
from srn_kernels.model.rounds import current_weights
from srn_kernels.model.settings import Settings
from srn_kernels.model.weight import NormalizedWeight

_CLASS_ATTRIBUTES = ("num_svs", "num_itrs", "num_iters", "transpose", "eps")


def raw_weight(item: Found) -> Tensor | None:
    """The raw Parameter."""
    if item.form == "parametrization":
        return item.module.parametrizations[item.name].original
    suffix = {"hook": "_orig", "wrapper": "_bar", "class": ""}[item.form]
    return item.module._parameters.get(item.name + suffix)


def iterations_of(item: Found) -> int:
    """Power iterations per forward."""
    if item.form == "class":
        return getattr(item.module, class_form(item.module).iterations, 1)
    if item.form == "wrapper":
        return getattr(item.holder, "power_iterations", 1)
    return getattr(item.holder, "n_power_iterations", 1)  # torch's of a vector has none


def own_settings(item: Found, weight: Tensor) -> Settings:
    """What the other code does, in our options."""
    own: dict[str, Any] = {
        "rank_ratio": 1.0,
        "n_power_iterations": iterations_of(item),
        "eps": getattr(item.holder, "eps", 1e-12),
    }
    ratio = getattr(item.holder, "rank_ratio", None)
    if ratio is not None and ratio <= 0.9999:  # above it the hook is plain spectral norm
        own["rank_ratio"] = ratio
    if item.form == "hook" and hasattr(item.holder, "coeff"):
        own["sigma_max"] = item.holder.coeff
    # their own code normalises along dimension 0, transposed convolutions too
    dim = item.holder.dim if weight.dim() > 1 and item.form in ("hook", "parametrization") else 0
    return Settings(**own, dim=dim % weight.dim())


def current_pair(item: Found, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The u, v of its next evaluation (None for vectors, which torch keeps none for)."""
    module, name = item.module, item.name
    if item.form == "parametrization":
        return getattr(item.holder, "_u", None), getattr(item.holder, "_v", None)
    if item.form == "hook":
        return module._buffers.get(name + "_u"), module._buffers.get(name + "_v")
    u, steps = _own_u(item), iterations_of(item)  # these iterate in evaluation as well
    if _is_transposed(item):
        v, u = next_pair(weight.flatten(1).T, 0, u, steps)
        return u, v
    return next_pair(weight, 0, u, steps)


def _own_u(item: Found) -> Tensor:
    """The u of code that keeps u alone."""
    if item.form == "wrapper":
        return item.module._parameters[item.name + "_u"]
    return item.module._buffers[class_form(item.module).u]


def _is_transposed(item: Found) -> bool:
    """Whether its u belongs to the columns."""
    return item.form == "class" and getattr(item.module, "transpose", False)


def difference(item: Found, weight: Tensor, settings: Settings) -> str | None:
    """Why our W_hat under ``settings`` would not be the other code's weight, if it would not.

    Sizes are compared in the model; what a copy of torch's hook computes, on a small matrix at two
    scales, gradient included. Nothing of the model is changed.
    """
    rows = weight.shape[settings.dim] if weight.dim() else 0
    columns = weight.numel() // rows if rows else 0
    if item.form in ("hook", "parametrization"):
        pair = current_pair(item, weight)
        if weight.dim() < 2 and item.form == "parametrization":
            return None
        sizes = tuple(None if x is None else x.numel() for x in pair)
        if sizes != (rows, columns):
            return f"its u and v have {sizes} elements, a {rows} x {columns} matrix needs others"
    else:
        size = _own_u(item).numel()
        if size != (columns if _is_transposed(item) else rows):
            return f"its u has {size} elements, a {rows} x {columns} matrix needs others"
    if item.form == "hook":
        return _hook_difference(item.holder, settings)
    if item.form == "class":
        return _class_difference(item, weight)
    return None


def _hook_difference(hook: Any, settings: Settings) -> str | None:
    kind = type(hook).__qualname__
    if type(hook).__module__.startswith("torch.nn.utils"):
        return None
    if settings.rank_ratio < 1 and hook.dim != 0:
        return f"hook {kind} reorders weights whose dim is not 0"
    base = torch.linspace(-1.0, 1.7, 30).sin().mul(7).cos().reshape(5, 6).double()
    base = torch.linalg.qr(base)[0] @ torch.diag(torch.tensor([1.0, 0.95, 0.9, 0.85, 0.8])).double()
    base = torch.cat([base, base[:, :1] * 0.3], 1).flip(0)
    u, s, vh = torch.linalg.svd(base, full_matrices=False)
    if settings.rank_ratio < 1:  # one that five rows can have
        settings = replace(settings, rank_ratio=0.5)
    for scale in (0.25, 4.0):  # of sigma, on both sides of a soft bound
        w = (base / s[0] * scale * (settings.sigma_max or 1.0)).float()
        probe = nn.Module()
        probe.weight_orig = nn.Parameter(w)
        for name, value in (("u", u[:, 0]), ("v", vh[0])):
            probe.register_buffer(f"weight_{name}", value.float())
        probe.register_buffer("weight_sigma", torch.ones(1))
        twin = copy.copy(hook)
        twin.name, twin.dim = "weight", 0
        if settings.rank_ratio < 1:
            twin.rank_ratio = settings.rank_ratio
        grad = torch.arange(30.0).reshape(5, 6).sin()
        try:
            theirs = twin.compute_weight(probe, False)
            (their_grad,) = torch.autograd.grad(theirs, probe.weight_orig, grad)
        except Exception as error:
            return f"hook {kind} fails on a 5 x 6 matrix: {error}"
        ours, own_grad = _our_weight(w, u[:, 0].float(), vh[0].float(), settings, grad)
        # a copy may add 1e-5 to its divisor
        if theirs.shape != ours.shape or not torch.allclose(theirs, ours, 1e-4, 1e-5):
            return f"hook {kind} computes another weight than its attributes say"
        if not torch.allclose(their_grad, own_grad, 1e-3, 1e-4 * float(own_grad.abs().max())):
            return f"hook {kind} has another gradient than spectral norm"
    return None


def _our_weight(
    w: Tensor, u: Tensor, v: Tensor, settings: Settings, grad: Tensor
) -> tuple[Tensor, Tensor]:
    layer = nn.Linear(w.shape[1], w.shape[0], bias=False)
    layer.weight = nn.Parameter(w)
    known = Settings(rank_ratio=settings.rank_ratio, sigma_max=settings.sigma_max)
    entry = NormalizedWeight(layer, "weight", "weight", known)
    entry.set_state(u, v)
    entry.become(State.FRESH)
    with torch.enable_grad():
        (out,) = current_weights([entry])
        (own,) = torch.autograd.grad(out, layer.weight, grad)
    return out.detach(), own


def _class_difference(item: Found, weight: Tensor) -> str | None:
    """Compares what the class's own method returns next, on a copy in evaluation."""
    form = class_form(item.module)
    twin = copy.deepcopy(item.module).eval()
    try:
        with torch.no_grad():
            theirs = getattr(twin, form.method)()
    except Exception as error:
        return f"{type(item.module).__name__}.{form.method} fails: {error}"
    u, v = current_pair(item, weight)
    ours = weight.detach()
    matrix = ours.flatten(1).to(u)
    ours = ours / (u @ (matrix @ v)).to(ours)
    error = (theirs - ours).abs().max() if theirs.shape == ours.shape else torch.inf
    # three sums and a division in the state's dtype, whatever their order
    close = 64 * torch.finfo(weight.dtype).eps * max(matrix.shape) ** 0.5
    if not float(error) <= close * float(ours.abs().max()):
        return f"{type(item.module).__name__}.{form.method} computes another weight than W / sigma"
    return None


def origin(item: Found, settings: Settings, parents: tuple[Any, ...]) -> Origin:
    """What is kept to write the original format again."""
    module, name = item.module, item.name
    if item.form == "class":
        form = class_form(module)
        kind = "BigGAN" if form.u == "u0" else "mimicry"
        buffers = {
            k: b.shape for k, b in module._buffers.items() if CLASS_BUFFERS[kind].fullmatch(k)
        }
        return Origin(kind, settings, iterations_of(item), _is_transposed(item), buffers)
    if item.form == "wrapper":
        return Origin("wrapper", settings, iterations_of(item), places=parents)
    if item.form == "parametrization":
        return Origin("parametrization", settings)
    logged = module._buffers.get(name + "_sigma")
    return Origin(
        "legacy", settings, extras={} if logged is None else {name + "_sigma": logged.shape}
    )


def strip(item: Found, weight: Tensor) -> None:
    """Takes the foreign form off; the same Parameter is ``name`` again."""
    module, name = item.module, item.name
    if item.form == "parametrization":
        _strip_parametrization(module, name)
        module.register_parameter(name, weight)
        return
    if item.form == "class":
        module.__class__ = plain_class(module)
        for pattern in CLASS_BUFFERS.values():
            for key in [k for k in module._buffers if pattern.fullmatch(k)]:
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
    for suffix in ("_u", "_v", "_sigma"):
        module._buffers.pop(name + suffix, None)
    module.register_parameter(name, weight)
    for hooks in (
        module._forward_pre_hooks,
        module._state_dict_hooks,
        module._load_state_dict_pre_hooks,
    ):
        for key, hook in list(hooks.items()):
            hook = getattr(hook, "hook", hook)
            if hook is item.holder or getattr(hook, "fn", None) is item.holder:
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


def vector_pair(weight: Tensor) -> tuple[Tensor, Tensor]:
    """u, v of a vector, exactly: 1 and w / |w|; of zero, any direction."""
    w = weight.detach().double()
    return weight.new_ones(1), nn.functional.normalize(w if w.any() else torch.ones_like(w), dim=0)


def as_state(pair: tuple[Tensor, Tensor], weight: Tensor) -> tuple[Tensor, Tensor]:
    dtype = state_dtype(weight.dtype)
    return tuple(x.detach().to(dtype).clone() for x in pair)
