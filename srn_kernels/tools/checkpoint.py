"""State dicts that the code a model came from loads strictly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from srn_kernels.maths.matrix import first_vector, matrix
from srn_kernels.model.attach import refuse_in_use
from srn_kernels.model.formats import FORMATS, Origin, Written, origin_of
from srn_kernels.model.freshness import is_split
from srn_kernels.model.rounds import settled
from srn_kernels.model.weight import KEY, NormalizedWeight
from srn_kernels.model.wrap import all_entries

FORMS = (*(name for name, form in FORMATS.items() if form.general), "original")


def to_torch_state_dict(model: nn.Module, form: str = "legacy") -> dict[str, Any]:
    """The state of ``model`` as another implementation of spectral norm loads it, strictly.

    The other model then evaluates to the same output, to rounding. Parameters are the model's own
    tensors, as in ``state_dict()``; u and v are unit vectors of the state's dtype. Nothing changes.

    Args:
        model: with layers normalised by this library.
        form: "legacy" for the same model wrapped by torch.nn.utils.spectral_norm,
            "parametrization" by torch.nn.utils.parametrizations.spectral_norm, with the same
            ``dim``; both need rank_ratio 1. "original" for the code that
            :func:`srn_kernels.convert_spectral_norm` took each layer from, with the settings it
            had. Code that keeps u alone and iterates in evaluation gets a u from which its next
            iteration arrives at this model's sigma.

    Raises:
        ValueError: a wrong form; nothing normalised; a layer that the form cannot express, by name
            (a stable rank, a soft bound, a gain, a zero weight, or, for "original", a layer that
            was not converted or whose settings were changed since).

    Example:
        >>> model = srn.apply_stable_rank_norm(nn.Sequential(nn.Linear(8, 4)), rank_ratio=1.0)
        >>> state = srn.to_torch_state_dict(model, "legacy")
        >>> sorted(state)
        ['0.bias', '0.weight_orig', '0.weight_u', '0.weight_v']
        >>> nn.Sequential(nn.utils.spectral_norm(nn.Linear(8, 4))).load_state_dict(state)
        <All keys matched successfully>
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {FORMS}, got {form!r}")
    refuse_in_use(all_entries(model), "to_torch_state_dict")
    modules = dict(model.named_modules(remove_duplicate=False))
    replaced: dict[str, dict[str, Tensor]] = {}
    wrapped: list[str] = []
    for path, module in modules.items():
        prefix = f"{path}." if path else ""
        for name, entry in module.__dict__.get(KEY, {}).items():
            origin = _origin(module, name, entry, form)
            try:
                keys = FORMATS[origin.format].write(_written(name, entry), origin)
            except ValueError as error:
                raise ValueError(f"{prefix}{name}: {error}") from None
            for suffix in ("_u", "_v"):
                replaced[prefix + name + suffix] = {}
            replaced[prefix + name] = {prefix + key: value for key, value in keys.items()}
            parent, _, key = path.rpartition(".")
            if any(modules.get(parent) is p and key == k for p, k in origin.places):
                wrapped.append(prefix)
    state: dict[str, Any] = {}
    for key, value in model.state_dict().items():
        for new, tensor in replaced.get(key, {key: value}).items():
            state[_inside(new, wrapped)] = tensor.detach() if isinstance(tensor, Tensor) else tensor
    return state


def _inside(key: str, wrapped: list[str]) -> str:
    """The key with ``module.`` at every place where a wrapper module was, the innermost first."""
    for prefix in sorted(set(wrapped), key=len, reverse=True):
        if key.startswith(prefix):
            key = f"{prefix}module.{key[len(prefix) :]}"
    return key


def _origin(module: nn.Module, name: str, entry: NormalizedWeight, form: str) -> Origin:
    settings, label = entry.settings, entry.label
    if form != "original":
        for key, value in (("rank_ratio", 1.0), ("stable_rank", None), ("sigma_max", None)):
            if getattr(settings, key) != value:
                raise ValueError(
                    f"{label}: torch's spectral norm has no {key}={getattr(settings, key)!r}; "
                    "save state_dict(), or bake it in with srn_kernels.export(model)"
                )
        origin = Origin(form, settings)
    else:
        origin = origin_of(module, name)
        if origin is None:
            raise ValueError(
                f"{label}: was not taken over by convert_spectral_norm, so that it has no original "
                "form; use form='legacy' or 'parametrization'"
            )
        for key in ("rank_ratio", "stable_rank", "sigma_max"):
            now, then = getattr(settings, key), getattr(origin.settings, key)
            if now != then:
                raise ValueError(
                    f"{label}: {key} is {now!r}, but {then!r} in the original code, which would "
                    "compute another weight"
                )
    if settings.gain:
        raise ValueError(
            f"{label}: that form has no gain; bake it in with srn_kernels.export(model)"
        )
    return origin


@torch.no_grad()
def _written(name: str, entry: NormalizedWeight) -> Written:
    weight, settings = entry.weight, entry.settings
    if is_split(weight) or weight.is_meta:
        raise ValueError("is distributed or on the meta device; gather it first")
    u, v = (first_vector(x).double() for x in settled(entry))
    u, v = u / u.norm(), v / v.norm()
    dtype = entry.u.dtype
    sigma = float(u @ (matrix(entry.matrix_weight(), settings.dim).double() @ v))
    if not abs(sigma) > settings.eps:
        raise ValueError(f"sigma is {sigma:g}, which other code divides by")
    return Written(name, weight, settings.dim, u.to(dtype), v.to(dtype), sigma)
