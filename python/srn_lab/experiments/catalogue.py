"""The experiments, one declared object each, named after the paper's figures and tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from srn_lab.experiments.examples import IdentityUnit, LinearUnit
from srn_lab.experiments.presets import Preset
from srn_lab.experiments.units import Unit
from srn_lab.methods import Method, Norm

RATIOS = (0.1, 0.3, 0.5, 0.7, 0.9)
SN = Method(Norm.SN)


def srn(c: float) -> Method:
    """SRN at ratio ``c``."""
    return Method(Norm.SRN, c)


@dataclass(frozen=True)
class Experiment:
    """``make`` gives the units of one seed; ``cheap`` ones run with more seeds."""

    name: str
    title: str
    source: str
    make: Callable[[Preset, int], Iterable[Unit]]
    cheap: bool = False

    def units(self, preset: Preset, seeds: int | None = None) -> list[Unit]:
        """All units at ``preset``, seed after seed."""
        count = seeds or (preset.cheap_seeds if self.cheap else preset.seeds)
        return [unit for seed in range(count) for unit in self.make(preset, seed)]


def _gans(role: str, *methods: Method, conditional: bool = False):
    def make(preset: Preset, seed: int) -> list[Unit]:
        return [preset.gan_unit(role, m, seed, conditional=conditional) for m in methods]

    return make


def _both(*makes):
    def make(preset: Preset, seed: int) -> list[Unit]:
        return [unit for one in makes for unit in one(preset, seed)]

    return make


def _labels(role: str, *methods: Method, random_labels: bool):
    def make(preset: Preset, seed: int) -> list[Unit]:
        return [preset.classifier_unit(role, m, seed, random_labels=random_labels) for m in methods]

    return make


def _every_network(*methods: Method):
    def make(preset: Preset, seed: int) -> list[Unit]:
        return [
            preset.classifier_unit("first", method, seed, network=network)
            for network in preset.networks
            for method in methods
        ]

    return make


def _identity(preset: Preset, seed: int) -> list[Unit]:
    return [IdentityUnit(seed)]


def _linear(preset: Preset, seed: int) -> list[Unit]:
    return [LinearUnit(seed)]


def _conversion(preset: Preset, seed: int) -> list[Unit]:
    torch_sn = Method(Norm.TORCH_SN)
    return [preset.gan_unit("first", torch_sn, seed, half=half) for half in (False, True)]


_FIRST = (SN, srn(0.7), srn(0.5))
_CLASSIFIED = (Method(Norm.NONE), SN, srn(0.9), srn(0.7), srn(0.5), srn(0.3))
_PEERS = (Method(Norm.ORTHO), Method(Norm.WGAN_GP))
_METHODS = (Method(Norm.RANDOM), Method(Norm.WGAN_GP), srn(0.5), SN)
_SOME = (0.5, 0.1, 0.3, 0.7, 0.9, 1.0)
_UNCONDITIONAL = _gans("first", *_FIRST)
_CONDITIONAL = _gans("first", *_FIRST, conditional=True)
_SECOND = _gans("second", *_FIRST)
_TRUE = _labels("first", *_CLASSIFIED, random_labels=False)
_SHUFFLED = _labels("first", *_CLASSIFIED, random_labels=True)

# In the order in which their units run: an interrupted round has the most telling ones first.
_ROWS = (
    Experiment(
        "example_a2", "The identity matrix at stable rank 2", "Appendix A.2", _identity, cheap=True
    ),
    Experiment("linear", "Two linear layers at equal norms", "Section 3", _linear, cheap=True),
    Experiment("fig2a", "eLhist against c", "Figure 2 (a)", _gans("first", SN, *map(srn, _SOME))),
    Experiment("table1", "Generalisation gap on true labels", "Table 1", _TRUE, cheap=True),
    Experiment("fig1a", "The gap over epochs", "Figure 1 (a)", _TRUE, cheap=True),
    Experiment(
        "fig1b", "Shuffled labels, the first data set", "Figure 1 (b)", _SHUFFLED, cheap=True
    ),
    Experiment("fig2b", "eLhist of the methods", "Figure 2 (b)", _gans("first", *_METHODS)),
    Experiment("fig11", "D's loss over training", "Figure 11, Appendix E.3", _UNCONDITIONAL),
    Experiment(
        "table2",
        "Scores on the first data set",
        "Table 2",
        _both(_gans("first", *_FIRST, *_PEERS), _CONDITIONAL),
    ),
    Experiment("fig6", "eLhist, conditional", "Figure 6", _CONDITIONAL),
    Experiment("fig9", "Norm of the Jacobian, unconditional", "Figure 9", _UNCONDITIONAL),
    Experiment("fig10", "Norm of the Jacobian, conditional", "Figure 10", _CONDITIONAL),
    Experiment(
        "conversion", "torch's SN converted half way", "no counterpart in the paper", _conversion
    ),
    Experiment(
        "measures",
        "Three measures of sample complexity",
        "ICLR version, Section 4",
        _every_network(*_CLASSIFIED),
        cheap=True,
    ),
    Experiment("table3", "Scores on the second data set", "Table 3", _SECOND),
    Experiment(
        "table4", "Neural divergence on both data sets", "Table 4", _both(_UNCONDITIONAL, _SECOND)
    ),
    Experiment("fig7", "eLhist on the second data set", "Figure 7", _SECOND),
    Experiment(
        "fig1c",
        "Shuffled labels, the second data set",
        "Figure 1 (c)",
        _labels("second", *_CLASSIFIED, random_labels=True),
        cheap=True,
    ),
)
EXPERIMENTS: dict[str, Experiment] = {e.name: e for e in _ROWS}


def select(names: Iterable[str]) -> list[Experiment]:
    """Experiments by name, all if none is given; "fig1" is its three panels. ValueError else."""
    chosen: list[Experiment] = []
    for name in names:
        panels = {name, *(name + panel for panel in "abc")}
        found = [e for e in EXPERIMENTS.values() if e.name in panels]
        if not found:
            raise ValueError(f"experiment must be one of {', '.join(EXPERIMENTS)}, got {name!r}")
        chosen += [e for e in found if e not in chosen]
    return chosen or list(EXPERIMENTS.values())
