"""Looks at a model as convert or apply would, checks its output, and times a training round."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_leaves

from srn_kernels.model import root
from srn_kernels.model.foreign import Found
from srn_kernels.model.select import select
from srn_kernels.model.settings import Settings
from srn_kernels.model.wrap import apply_stable_rank_norm, export, skipped
from srn_kernels.tools.convert import convert_spectral_norm, look
from srn_kernels.tools.doctor.factory import DoctorError, Inputs, drawn, make
from srn_kernels.tools.paired import Spread, paired_ms, ratios

CONVERT, APPLY, NOTHING = "convert", "apply", "nothing"


@dataclass(frozen=True)
class Taken:
    """A parameter that would be normalised by this library."""

    name: str
    shape: tuple[int, int]  # of the matrix: rows, columns
    form: str  # what it is taken over from; "" for a plain layer


@dataclass(frozen=True)
class Timing:
    """A training round, forward and backward of the whole model, in ms; all paired."""

    ms: dict[str, Spread]  # by contestant
    ratio: dict[str, Spread]  # of each to that of this library


@dataclass(frozen=True)
class Difference:
    """How far apart two models' evaluation outputs are."""

    largest: float  # absolute difference
    scale: float  # the largest absolute output
    bound: float  # what rounding explains

    @property
    def stays(self) -> bool:
        return self.largest <= self.bound


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`examine` found."""

    how: str  # CONVERT, APPLY, or NOTHING
    taken: list[Taken]
    left: list[tuple[str, str]]  # (name, reason)
    normalised: list[str] = field(default_factory=list)  # by this library already
    output: Difference | str = ""  # or why it was not compared
    timing: Timing | str = ""  # or why there is none


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Every module's flag is restored afterwards."""
    flags = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag


def outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """The floating-point tensors that an evaluation returns, however they are nested."""
    with mode(model, False), torch.no_grad():
        return _floating(model(*inputs.args, **inputs.kwargs))


def _floating(out: Any) -> list[Tensor]:
    leaves = tree_leaves(out)
    held = [leaf for leaf in leaves if not isinstance(leaf, Tensor) and hasattr(leaf, "__dict__")]
    leaves += [x for leaf in held for x in vars(leaf).values()]  # of dataclasses and the like
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]


def compare(one: nn.Module, other: nn.Module, inputs: Inputs) -> Difference:
    """The evaluation outputs of two models on the same inputs.

    Raises ValueError where they cannot be compared: nothing to compare, or an evaluation that does
    not repeat itself.
    """
    first, second = outputs(one, inputs), outputs(other, inputs)
    if not any(x.numel() for x in first):
        raise ValueError("the model returns no floating-point tensor")
    if [x.shape for x in first] != [x.shape for x in second]:
        raise ValueError("the outputs have other shapes")
    scale = max(float(x.abs().max()) for x in first if x.numel())
    # Each layer rounds sigma and a quotient anew; a thousand of them pile up at worst.
    bound = 1000 * max(torch.finfo(x.dtype).eps for x in first) * scale
    found = Difference(_apart(first, second), scale, bound)
    # Of code that iterates in evaluation: is it apart from itself as well?
    if not found.stays and not _apart(first, outputs(one, inputs)) <= bound:
        raise ValueError("two evaluations of the same model differ already")
    return found


def _apart(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest absolute difference; nan where one has a nan."""
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a.numel()]
    return float(torch.stack([(a - b).abs().max().double().cpu() for a, b in pairs]).max())


def training_round(model: nn.Module, inputs: Inputs) -> Callable[[], None]:
    """Forward and backward in training, of the mean of all outputs."""

    def step() -> None:
        model.zero_grad()
        out = _floating(model(*inputs.args, **inputs.kwargs))
        if not (out := [x for x in out if x.requires_grad]):
            raise ValueError("nothing that the model returns has a gradient")
        sum((x.mean() for x in out[1:]), out[0].mean()).backward()
        if out[0].is_cuda:
            torch.cuda.synchronize()

    return step


def timed(models: Mapping[str, nn.Module], inputs: Inputs, ours: str, seconds: float) -> Timing:
    """Times a training round of each, as often as ``seconds`` allow, three times at least."""
    steps = {name: training_round(model.train(), inputs) for name, model in models.items()}
    for step in steps.values():
        step()
    start = time.perf_counter()
    for step in steps.values():
        step()
    once = time.perf_counter() - start
    repeats = int(min(max(seconds / once, 3), 200))
    sample = paired_ms(steps, repeats=repeats, warmups=1)
    return Timing(
        {name: Spread.of(values) for name, values in sample.items()},
        {n: Spread.of(ratios(values, sample[ours])) for n, values in sample.items() if n != ours},
    )


def examine(
    factory: Callable[[], Any],
    *,
    input_shape: tuple[int, ...] | None = None,
    rank_ratio: float = 1.0,
    device: str = "cpu",
    seconds: float = 10.0,
) -> Diagnosis:
    """What this library would do with the model of a factory, and what that would save.

    The factory's models are new ones each time, so that nothing of the user's is changed. The first
    is what the others are made equal to.

    Raises DoctorError where the factory does not give a model, and ValueError for a wrong argument.
    """
    model, inputs = make(factory)
    place = torch.device(device)

    def twin() -> nn.Module:
        other, _ = make(factory)
        try:
            other.load_state_dict(model.state_dict())
        except RuntimeError as error:
            raise DoctorError(f"the function makes another model each time: {error}") from error
        return other.to(place)

    taken, left, how = _what(model, rank_ratio)
    normalised = [entry.label for entry in root.entries_of(model)]
    if how == NOTHING:
        why = "nothing would change"
        return Diagnosis(how, taken, left, normalised, why, why)
    remedy = ""
    if inputs is None and input_shape is None:
        why = "no inputs: let the function return (model, inputs), or give --input-shape"
        return Diagnosis(how, taken, left, normalised, why, why)
    if inputs is None:
        inputs = drawn(model, input_shape)
        remedy = " (for other inputs let the function return (model, inputs))"
    inputs = inputs.to(place)
    before, after = twin(), twin()
    if how == CONVERT:
        convert_spectral_norm(after, rank_ratio)
    else:
        apply_stable_rank_norm(after, rank_ratio)
    left = skipped(after)

    def rounds() -> Timing:
        peers = {"before": before, "srn_kernels": after}
        if how == APPLY:
            peers = {"before": before, "torch": _torchs(twin(), taken), "srn_kernels": after}
        return timed(peers, inputs, "srn_kernels", seconds)

    return Diagnosis(
        how,
        taken,
        left,
        normalised,
        _tried(lambda: _compared(how, rank_ratio, before, after, inputs), remedy),
        _tried(rounds, remedy),
    )


def _what(model: nn.Module, rank_ratio: float) -> tuple[list[Taken], list[tuple[str, str]], str]:
    """What convert takes over; where that is nothing, what apply would normalise."""
    found, left = look(model, {})
    if found:
        taken = [
            Taken(t.entry.label, _shape(t.weight, t.entry.settings.dim), _form(t.items[0][0]))
            for t in found
        ]
        return taken, left, CONVERT
    Settings(rank_ratio=rank_ratio)  # a wrong one is an error, and no reason to take nothing
    try:
        entries, others = select(model, {"rank_ratio": rank_ratio})
    except (ValueError, TypeError) as error:  # what apply would say
        return [], [*left, (type(model).__name__, str(error))], NOTHING
    taken = [Taken(entry.label, entry.matrix_shape(), "") for entry in entries]
    return taken, others, APPLY if taken else NOTHING


def _form(found: Found) -> str:
    return f"{found.form} ({type(found.holder).__qualname__})"


def _shape(weight: Tensor, dim: int) -> tuple[int, int]:
    if weight.dim() < 2:
        return 1, weight.numel()
    return weight.shape[dim], weight.numel() // weight.shape[dim]


def _torchs(model: nn.Module, taken: list[Taken]) -> nn.Module:
    """The same layers with torch's own spectral norm, which is what people would write."""
    for item in taken:
        path, _, name = item.name.rpartition(".")
        parametrizations.spectral_norm(model.get_submodule(path), name)
    return model


def _compared(
    how: str, rank_ratio: float, before: nn.Module, after: nn.Module, inputs: Inputs
) -> Difference:
    if how == CONVERT and rank_ratio == 1:
        return compare(before, after, inputs)
    with mode(after, False):
        return compare(after, export(after), inputs)


def _tried(what: Callable[[], Any], remedy: str) -> Any:
    """A user's forward may fail for any reason; the diagnosis goes on, and says so."""
    try:
        return what()
    except Exception as error:
        said = str(error).strip().splitlines()
        return f"{type(error).__name__}: {said[0] if said else ''}{remedy}"
