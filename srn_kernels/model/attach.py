"""Putting a normalised parameter into its modules, and taking it out again."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from srn_kernels.model import loading, root
from srn_kernels.model.foreign import OwnHook
from srn_kernels.model.freshness import State
from srn_kernels.model.rounds import current_weights
from srn_kernels.model.weight import FORM, KEY, KeepState, NormalizedWeight

# id of every Parameter that some layer normalises, so that none is wrapped twice under two names.
# No weak reference to a tensor: swap_tensors refuses those.
_normalized: weakref.WeakValueDictionary[int, NormalizedWeight] = weakref.WeakValueDictionary()


def normalized_by(weight: Tensor) -> NormalizedWeight | None:
    """The entry, of whatever model, that normalises this Parameter."""
    entry = _normalized.get(id(weight))
    if entry is None:
        return None
    module, name = entry.sites[0]
    attached = module.__dict__.get(KEY, {}).get(name) is entry
    return entry if attached and module._parameters.get(name) is weight else None


class Shown:
    """``module.extra_repr`` of a wrapped layer: the user's own text, and what is normalised."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.before = module.__dict__.get("extra_repr")

    def __call__(self) -> str:
        module = self.module
        text = type(module).extra_repr(module) if self.before is None else self.before()
        notes = [_note(name, entry) for name, entry in module.__dict__.get(KEY, {}).items()]
        return ", ".join([*([text] if text else []), *notes])


def _note(name: str, entry: NormalizedWeight) -> str:
    settings = entry.settings
    if settings.stable_rank is not None:
        return f"stable_rank_norm({name}, stable_rank={settings.stable_rank:g})"
    if settings.rank_ratio == 1:
        return f"spectral_norm({name})"
    return f"stable_rank_norm({name}, rank_ratio={settings.rank_ratio:g})"


class TorchHook(OwnHook):
    """A layer's forward pre-hook. torch.nn.utils.remove_spectral_norm finds it, and so does
    torch.nn.utils.spectral_norm, which then refuses to normalise the parameter once more."""

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        root.enter_layer(module, inputs)

    def compute_weight(self, module: nn.Module, do_power_iteration: bool) -> Tensor:
        return current_weights([module.__dict__[KEY][self.name]])[0]

    def remove(self, module: nn.Module) -> None:
        bake([module.__dict__[KEY][self.name]], keep=self)


def attach(entry: NormalizedWeight, state: tuple[Tensor, Tensor] | None = None) -> None:
    """Gives every site of a prepared entry its buffers and hooks."""
    entry.set_state(*(state or entry.drawn_state()))
    if state is not None:
        entry.become(State.FRESH)
    if entry.settings.gain:
        entry.set_gain(nn.Parameter(entry.weight.detach().new_ones(1)))
    _normalized[id(entry.weight)] = entry
    for module, name in entry.sites:
        module.__dict__.setdefault(KEY, {})[name] = entry
        module.__dict__.setdefault("_apply", KeepState(module))
        if not isinstance(module.__dict__.get("extra_repr"), Shown):
            module.__dict__["extra_repr"] = Shown(module)
        module.__dict__.setdefault(root.HOOKS, {})[name] = TorchHook(name)
        root.hook_layer(module)
        loading.hook_loading(module)


def detach(entry: NormalizedWeight, keep: TorchHook | None = None) -> None:
    """Undoes :func:`attach`; the raw parameters stay. ``keep``: a hook that its caller removes."""
    for module, name in entry.sites:
        entries = module.__dict__.get(KEY, {})
        entries.pop(name, None)
        module.__dict__.get(FORM, {}).pop(name, None)
        for suffix in ("_u", "_v"):
            module._buffers.pop(name + suffix, None)
            module._non_persistent_buffers_set.discard(name + suffix)
        if entry.settings.gain:
            module._parameters.pop(name + "_gain", None)
        hook = module.__dict__.get(root.HOOKS, {}).pop(name, None)
        for key in [k for k, f in module._forward_pre_hooks.items() if f is hook is not keep]:
            del module._forward_pre_hooks[key]
        if not entries:
            for key in (KEY, FORM, root.HOOKS, "_apply"):
                module.__dict__.pop(key, None)
            shown = module.__dict__.pop("extra_repr", None)
            if isinstance(shown, Shown) and shown.before is not None:
                module.__dict__["extra_repr"] = shown.before
            root.unhook_layer(module)
            loading.unhook_loading(module)
    if _normalized.get(id(entry.weight)) is entry:
        del _normalized[id(entry.weight)]


def refuse_in_use(entries: Sequence[NormalizedWeight], what: str) -> None:
    """Raises where a forward or a shared_round is using the weights."""
    for entry in entries:
        if entry.shadow is not None:
            raise RuntimeError(
                f"{what} cannot be called inside a forward or a shared_round, where "
                f"{entry.label!r} is in use; call it afterwards"
            )


@torch.no_grad()
def bake(
    entries: Sequence[NormalizedWeight], untie: bool = False, keep: TorchHook | None = None
) -> None:
    """Writes the present W_hat into the parameters and detaches; nothing happens if that raises.

    ``untie``: give the sites a Parameter of their own, for one that others use as it is.
    """
    refuse_in_use(entries, "remove_stable_rank_norm")
    if not entries:
        return
    for entry in entries:
        if entry.weight.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError(f"{entry.label!r} is an inference tensor and cannot be written")
    outs = current_weights(entries)
    for entry, out in zip(entries, outs, strict=True):
        raw = entry.weight
        if not untie:
            raw.copy_(out)
        root.release(entry)
        detach(entry, keep)
        if untie:
            own = nn.Parameter(out.to(raw.dtype), requires_grad=raw.requires_grad)
            for module, name in entry.sites:
                setattr(module, name, own)  # recurrent layers list theirs again
