"""Other code's spectral norms in a model: whose parameter, in which form, known or not.

Known are torch's two forms, copies of its hook that add ``coeff`` (a soft bound) or ``rank_ratio``
(the public stable_rank hook), layer classes that keep u in a buffer (BigGAN, mimicry), and wrapper
modules (Self-Attention GAN). What only resembles one of them is found too, with the reason why it
is not taken.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm


class Found(NamedTuple):
    """One spectral norm in somebody else's form."""

    module: nn.Module  # whose parameter it is
    name: str
    holder: Any  # what holds the settings: the pre-hook, the parametrization, the module, a wrapper
    form: str  # "hook", "parametrization", "class", "wrapper", or "unknown"
    reason: str = ""  # why it cannot be taken over

    def unknown(self, reason: str) -> Found:
        return self._replace(form="unknown", reason=reason)


class OwnHook(SpectralNorm):
    """What this library registers so that torch finds a normalised parameter as one of its own."""


class LayerClass(NamedTuple):
    """How a layer class of somebody's own keeps its spectral norm."""

    u: str  # the buffer of u
    method: str  # that returns the normalised weight
    iterations: str  # the attribute with their number
    sigma: str  # the buffer of sigma


CLASSES = (
    LayerClass("u0", "W_", "num_itrs", "sv0"),
    LayerClass("sn_u", "sn_weights", "num_iters", "sn_sigma"),
)

_HOOK_ATTRIBUTES = {"name", "dim", "n_power_iterations", "eps"}
_HOOK_ADDITIONS = ({"coeff"}, {"rank_ratio"}, {"rank_ratio", "rank"})
_WRAPPER_ATTRIBUTES = {"name", "power_iterations"}
_MODULE_ATTRIBUTES = set(nn.Module().__dict__)
_TELLING = re.compile(r"spectral_?norm|stable_?rank|lipschitz|^_?sn_?(conv|linear|embed)", re.I)


def class_form(module: nn.Module) -> LayerClass | None:
    for form in CLASSES:
        if module._buffers.get(form.u) is not None and callable(getattr(module, form.method, None)):
            return form
    return None


def plain_class(module: nn.Module) -> type | None:
    """The torch layer that a class of its own derives from."""
    for base in type(module).__mro__:
        if base.__module__.startswith("torch.nn.") and base is not nn.Module:
            return base
    return None


def is_wrapper(module: nn.Module) -> bool:
    inner, name = module._modules.get("module"), getattr(module, "name", None)
    if inner is None or not isinstance(name, str):
        return False
    return all(name + suffix in inner._parameters for suffix in ("_bar", "_u", "_v"))


def find(module: nn.Module) -> list[Found]:
    """Every spectral norm of this module's own parameters that is not this library's."""
    found = [*_hooks(module), *_parametrizations(module), *_classes(module)]
    if is_wrapper(module):
        inner, name = module._modules["module"], module.name
        item = Found(inner, name, module, "wrapper")
        more = set(module.__dict__) - _MODULE_ATTRIBUTES - _WRAPPER_ATTRIBUTES
        if more:
            item = item.unknown(
                f"wrapper {type(module).__name__} keeps {sorted(more)}, unlike the known one"
            )
        found.append(item)
    known = {(id(item.module), item.name) for item in found}
    for name, what in _resembling(module):
        if (id(module), name) not in known:
            found.append(Found(module, name, module, "unknown", what))
    return found


def _hooks(module: nn.Module) -> Iterator[Found]:
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, OwnHook):
            continue
        kind = getattr(hook, "__qualname__", type(hook).__qualname__)
        name = getattr(hook, "name", None)
        item = Found(module, name if isinstance(name, str) else "weight", hook, "hook")
        attributes = set(getattr(hook, "__dict__", ()))
        if type(hook) is SpectralNorm:
            yield item
        elif attributes >= _HOOK_ATTRIBUTES and hasattr(hook, "compute_weight"):
            more = attributes - _HOOK_ATTRIBUTES
            if more and more not in _HOOK_ADDITIONS:
                item = item.unknown(f"hook {kind} keeps {sorted(more)}, which no known form does")
            yield item
        elif getattr(hook, "__module__", "").startswith("srn_kernels."):
            continue
        elif isinstance(hook, SpectralNorm) or _TELLING.search(kind):
            yield item.unknown(f"hook {kind} is no form that is known")


def _parametrizations(module: nn.Module) -> Iterator[Found]:
    if not parametrize.is_parametrized(module):
        return
    for name, chain in module.parametrizations.items():
        for norm in chain:
            kind = type(norm)
            item = Found(module, name, norm, "parametrization")
            if kind is _SpectralNorm:
                if len(chain) > 1:
                    item = item.unknown(
                        "has other parametrizations beside spectral norm: "
                        + ", ".join(type(p).__name__ for p in chain if p is not norm)
                    )
                yield item
                break
            if kind.__module__.startswith("srn_kernels."):
                continue
            if isinstance(norm, _SpectralNorm) or _TELLING.search(kind.__name__):
                yield item.unknown(f"parametrization {kind.__name__} is no form that is known")
                break


def _classes(module: nn.Module) -> Iterator[Found]:
    if class_form(module):
        item = Found(module, "weight", module, "class")
        if plain_class(module) is None:
            item = item.unknown(f"{type(module).__name__} is no subclass of a torch layer")
        yield item


def _resembling(module: nn.Module) -> Iterator[tuple[str, str]]:
    """(parameter, reason) of what looks like spectral norm by its buffers or its class's name."""
    for buffer in module._buffers:
        if buffer in ("u0", "sn_u"):
            yield "weight", f"{type(module).__name__} keeps a buffer {buffer!r}, in no known form"
        elif buffer.endswith("_u"):
            name = buffer[:-2]
            if name + "_orig" in module._parameters or name + "_bar" in module._parameters:
                yield name, f"{type(module).__name__} keeps {buffer!r}, in no known form"
    if not _TELLING.search(type(module).__name__):
        return
    for name, parameter in module._parameters.items():
        lazy = isinstance(parameter, nn.parameter.UninitializedTensorMixin)
        if parameter is not None and not lazy and parameter.dim() > 1:
            yield name, f"class {type(module).__name__} is no form that is known"
            return


def obstacle(module: nn.Module, name: str) -> str | None:
    """Why ``name`` is no Parameter that could be normalised now, and the remedy."""
    kind = type(module).__name__
    if parametrize.is_parametrized(module, name):
        chain = module.parametrizations[name]
        if any(type(p) is _SpectralNorm for p in chain):
            return "normalised by torch's parametrization; see convert_spectral_norm(model)"
        kinds = ", ".join(type(p).__name__ for p in chain)
        return (
            f"parametrized by {kinds}; take it off first, with "
            "torch.nn.utils.parametrize.remove_parametrizations"
        )
    parameters = module._parameters
    if name + "_orig" in parameters and name + "_mask" in module._buffers:
        return "pruned; make that permanent first, with torch.nn.utils.prune.remove"
    if name + "_g" in parameters and name + "_v" in parameters:
        return (
            "normalised by weight_norm; take it off first, with torch.nn.utils.remove_weight_norm"
        )
    for item in find(module):
        if item.name == name:
            if item.form == "unknown":
                return f"looks spectrally normalised: {item.reason}"
            return f"normalised by a {item.form} of {kind}; see convert_spectral_norm(model)"
    if name + "_bar" in parameters:
        return f"normalised by a wrapper of {kind}; see convert_spectral_norm(model)"
    if name + "_orig" in parameters:
        return f"replaced by {name + '_orig'!r}; take off what computes it from that first"
    return None
