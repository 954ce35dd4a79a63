"""Taking over models that use torch's spectral norm in both its forms, or code of their own."""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from srn_kernels.core.arguments import check_count
from srn_kernels.model import foreign, root, wrap
from srn_kernels.model.attach import attach
from srn_kernels.model.foreign import Found
from srn_kernels.model.formats import Origin
from srn_kernels.model.select import check_backend, label_of
from srn_kernels.model.settings import Options, Settings, takes_options
from srn_kernels.model.weight import FORM, NormalizedWeight, check_weight
from srn_kernels.tools import known

if TYPE_CHECKING:
    from typing_extensions import Unpack

_log = logging.getLogger("srn_kernels")


class _Taken(NamedTuple):
    """One distinct Parameter and every form that holds it."""

    entry: NormalizedWeight
    weight: Tensor
    items: list[tuple[Found, Origin]]
    pair: tuple[Tensor | None, Tensor | None]


@takes_options(without=("preserve", "dim", "rule"), n_power_iterations=None, eps=None)
def convert_spectral_norm(
    model: wrap.M,
    rank_ratio: float = 1.0,
    *,
    groups: int = 1,
    **options: Unpack[Options],
) -> wrap.M:
    """Takes over every spectral norm in a model that is known and fuses them into one round.

    It takes torch.nn.utils.spectral_norm, torch.nn.utils.parametrizations.spectral_norm, copies of
    torch's hook with a soft bound (``coeff``, which becomes sigma_max) or a stable rank (the public
    ``stable_rank`` hook), layer classes like BigGAN's and mimicry's (which become the torch layers
    they derive from) and wrapper modules like Self-Attention GAN's (whose place the wrapped layer
    takes); their old checkpoints load into the converted model. Copies are taken where they compute
    what they seem to, on a small matrix. Raw Parameters keep their identity (optimisers go on
    working), and u and v their exact values: no power iteration is made but what code that iterates
    in evaluation would make next. At rank_ratio=1 the next evaluation output is unchanged to
    rounding. Layers of srn_kernels join the round as they are.

    What looks like spectral norm and is not taken stays, is in :func:`srn_kernels.skipped` with the
    reason, and warns (UserWarning). The ``srn_kernels`` logger gets one line, of level INFO.

    Args:
        model: modified in place and returned.
        rank_ratio: for all layers taken; at 1, stable_rank hooks keep the ratio they have.
        groups: see :func:`srn_kernels.apply_stable_rank_norm`.
        options: see :class:`srn_kernels.Options`; n_power_iterations, eps and sigma_max that are
            not given stay what each layer has.

    Raises:
        ValueError, TypeError, RuntimeError: nothing to take over, a wrong argument, or another
            setting for layers that this library normalises already; the model is as it was.

    Example:
        >>> D = nn.Sequential(nn.utils.spectral_norm(nn.Linear(8, 8)), nn.ReLU()).eval()
        >>> x = torch.randn(4, 8)
        >>> before = D(x)
        >>> D = srn.convert_spectral_norm(D)
        >>> torch.allclose(D(x), before, atol=1e-6), srn.is_normalized(D[0])
        (True, True)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    groups = check_count(groups, "groups", 1)
    options = {k: v for k, v in options.items() if v is not None}
    checked = Settings(rank_ratio=rank_ratio, **options)
    asked = dict(options)
    if checked.rank_ratio != 1:
        asked["rank_ratio"] = checked.rank_ratio
    taken, left_out = look(model, asked)
    present = root.entries_of(model)
    if not taken:
        _refuse(model, present, asked, left_out)
    if foreign.is_wrapper(model):
        raise ValueError(
            "model: is itself a wrapper, whose place its layer would have to take; convert the "
            "model that holds it, or model.module"
        )
    with wrap.changing(model):
        for item in taken:
            _take(item)
        _unwrap(model, taken)
        wrap.fuse(model, groups=groups)
        labels = {item.entry.label for item in taken}
        left_out += [(e.label, "normalised already; joined as it is") for e in present]
        wrap.note_skipped(model, left_out, labels)
    counts = Counter(item.items[0][0].form for item in taken)
    kinds = ", ".join(f"{n} from a {form}" for form, n in counts.items())
    _log.info(
        "convert_spectral_norm: %d layers of %s taken over (%s), %d joined, %d left as they are",
        len(taken),
        type(model).__name__,
        kinds or "none",
        len(present),
        len(left_out) - len(present),
    )
    wrap.warn_of_others(model, "convert_spectral_norm")
    return model


def look(model: nn.Module, asked: dict[str, Any]) -> tuple[list[_Taken], list[tuple[str, str]]]:
    """What can be taken, checked, and what is left and why. The model is not touched."""
    taken: dict[int, _Taken] = {}
    left_out: list[tuple[str, str]] = []
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for key, child in parent._modules.items():
            places.setdefault(id(child), []).append((parent, key))
    for prefix, module in model.named_modules():
        for found in foreign.find(module):
            label = label_of(prefix, found.name)
            if found.form == "unknown":
                left_out.append((label, found.reason))
                continue
            weight = known.raw_weight(found)
            check_weight(found.module, weight, label)
            own = known.own_settings(found, weight)
            if reason := known.difference(found, weight, own):
                left_out.append((label, reason))
                continue
            settings = Settings(**{**vars(own), **asked})
            check_backend(settings, weight, label)
            if settings.gain and hasattr(found.module, found.name + "_gain"):
                raise ValueError(f"{label}: the module has an attribute {found.name + '_gain'!r}")
            record = known.origin(found, own, tuple(places.get(id(found.holder), ())))
            if id(weight) in taken:
                taken[id(weight)].items.append((found, record))
                continue
            entry = NormalizedWeight(found.module, found.name, label, settings)
            pair = known.current_pair(found, weight)
            taken[id(weight)] = _Taken(entry, weight, [(found, record)], pair)
    return list(taken.values()), left_out


def _refuse(
    model: nn.Module,
    present: list[NormalizedWeight],
    asked: dict[str, Any],
    left_out: list[tuple[str, str]],
) -> None:
    """Raises where a call that takes nothing over would do less than was asked for."""
    if not present:
        kinds = Counter(type(m).__name__ for m in model.modules())
        listed = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common(6))
        reasons = "".join(f"; {name}: {reason}" for name, reason in left_out[:8])
        raise ValueError(
            f"model: {type(model).__name__} ({listed}) uses neither form of torch's spectral norm "
            f"nor another that is known{reasons}; for a plain model use "
            "srn_kernels.apply_stable_rank_norm(model)"
        )
    for entry in present:
        for key, value in asked.items():
            if getattr(entry.settings, key) != value:
                how = "remove_stable_rank_norm and apply_stable_rank_norm"
                if key == "rank_ratio":
                    how = "set_rank_ratio(model, value)"
                raise ValueError(
                    f"{key}: {entry.label!r} is normalised already, with "
                    f"{key}={getattr(entry.settings, key)!r} and not {value!r}; to change that use "
                    f"{how}"
                )


def _take(item: _Taken) -> None:
    entry, weight = item.entry, item.weight
    for found, _ in item.items:
        known.strip(found, weight)
        if not any(m is found.module and n == found.name for m, n in entry.sites):
            entry.add_site(found.module, found.name)
    pair = known.vector_pair(weight) if item.pair[0] is None else item.pair
    attach(entry, known.as_state(pair, weight))
    for found, record in item.items:
        found.module.__dict__.setdefault(FORM, {})[found.name] = record


def _unwrap(model: nn.Module, taken: list[_Taken]) -> None:
    """Puts wrapped layers in the place of their wrappers."""
    wrappers = {id(f.holder): f for t in taken for f, _ in t.items if f.form == "wrapper"}
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if id(child) in wrappers and child is wrappers[id(child)].holder:
                parent._modules[key] = child._modules["module"]
