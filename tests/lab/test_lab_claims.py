"""Verdicts on made-up rows whose answer is known."""

import dataclasses
import math

import pytest
from scipy import stats
from srn_lab.experiments.catalogue import EXPERIMENTS, select
from srn_lab.experiments.claims import CLAIMS, verdicts
from srn_lab.experiments.presets import PRESETS
from srn_lab.experiments.results import At, Results
from srn_lab.experiments.statistics import interval
from srn_lab.experiments.store import row_of
from srn_lab.experiments.units import key
from srn_lab.experiments.verdicts import Claim, judge

CPU = PRESETS["cpu"]


def rows_of(experiment, result):
    """Rows of every unit of an experiment; ``result`` maps (slot, seed) to a result or None."""
    rows = {}
    for unit in EXPERIMENTS[experiment].units(CPU):
        found = result(unit.slot, unit.seed)
        if found is not None:
            rows[key(unit)] = row_of(unit, found)
    return rows


def results(experiment, result):
    return Results(CPU, rows_of(experiment, result), experiments=select([experiment]))


def claim(name):
    return next(c for c in CLAIMS if c.name == name)


def test_interval_is_students():
    low, high = interval([1.0, 2.0, 4.0])
    expected = stats.t.interval(0.95, 2, loc=7 / 3, scale=stats.sem([1.0, 2.0, 4.0]))
    assert (low, high) == pytest.approx(expected)
    assert interval([1.0, 2.0]) is None


def gan(p95):
    return {"elhist": {"real-fake": {"percentile_95_slope": p95}}}


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([1.0, 1.1, 0.9], "supported"),
        ([-1.0, -1.1, -0.9], "not supported"),
        ([1.0, -1.0, 0.2], "undecided"),
        ([1.0, 1.1], "undecided"),
    ],
)
def test_verdict_on_a_directed_claim(differences, verdict):
    def result(slot, seed):
        if seed >= len(differences):
            return None
        # The seeds differ much more than the methods: only pairing shows the difference.
        base = 10.0 * seed + 5
        return gan(base if slot.endswith("SRN-50") else base + differences[seed])

    found = judge(claim("srn_below_sn_elhist"), results("fig2b", result))
    assert found.verdict == verdict
    assert found.effect == pytest.approx(sum(differences) / len(differences))
    assert (found.interval is None) == (len(differences) < 3)
    document = found.to_dict()
    assert {"name", "verdict", "effect", "interval", "source"} <= document.keys()


@pytest.mark.parametrize(
    ("offsets", "verdict"),
    [
        ([1e-5, -1e-5, 2e-5], "supported"),
        ([0.1, 0.11, 0.09], "not supported"),
        ([0, 1e-2, 0], "undecided"),
    ],
)
def test_verdict_on_an_equality(offsets, verdict):
    def result(slot, seed):
        return gan(2.0 * (1 + offsets[seed]) if slot.endswith("SRN-100") else 2.0)

    assert judge(claim("srn_at_one_equals_sn"), results("fig2a", result)).verdict == verdict


def test_trend_and_collapse_by_hand():
    def result(slot, seed):
        label = slot.rsplit("/", 1)[1]
        c = 1.0 if label == "SN" else float(label.removeprefix("SRN-")) / 100
        return gan(2 * c + 0.1 * seed) | {"scores": {"fid": 1 / c}}

    found = {v.claim.name: v for v in verdicts(results("fig2a", result))}
    assert found["elhist_falls_with_c"].effect == pytest.approx(2)
    assert found["elhist_falls_with_c"].verdict == "supported"
    expected = sum(math.log((2 + 0.1 * s) / 2 / (0.2 + 0.1 * s)) for s in range(3)) / 3
    assert found["extreme_c_collapses_elhist"].effect == pytest.approx(expected)
    assert found["extreme_c_costs_quality"].effect == pytest.approx(10 - 2)


def test_conversion_has_the_spread_of_seeds_as_its_margin():
    def result(slot, seed):
        shift = 0.5 if slot.endswith("half way") else 0.0
        return {"scores": {"fid": [1.0, 3.0, 5.0][seed] + shift}}

    found = judge(claim("conversion_keeps_fid"), results("conversion", result))
    assert found.margin == pytest.approx(4.0)
    assert found.verdict == "supported"


def test_failed_units_do_not_count():
    rows = rows_of("fig2b", lambda slot, seed: gan(1.0))
    rows = {k: dataclasses.replace(r, failed="nan") if r.seed == 0 else r for k, r in rows.items()}
    found = Results(CPU, rows, experiments=select(["fig2b"]))
    assert set(found.values("gan/first/SN", At("elhist", "real-fake", "percentile_95_slope"))) == {
        1,
        2,
    }
    assert judge(claim("srn_below_sn_elhist"), found).verdict == "undecided"


def test_rows_of_other_configurations_do_not_mix_in():
    smoke = Results(PRESETS["smoke"], rows_of("fig2b", lambda slot, seed: gan(1.0)))
    assert smoke.rows == []


def test_claims_are_named_once_sourced_and_about_known_experiments():
    names = [c.name for c in CLAIMS]
    assert len(set(names)) == len(names) >= 12
    for c in CLAIMS:
        assert isinstance(c, Claim)
        assert c.experiment in EXPERIMENTS
        assert c.source
        assert c.says.endswith(".")


def test_every_claim_reads_slots_that_its_experiment_has():
    """A misspelt slot would leave a claim undecided for ever."""

    class Asked(Results):
        def values(self, slot, get):
            assert slot in self.of_experiment[self.experiments[0].name], slot
            return super().values(slot, get)

    for c in CLAIMS:
        found = Asked(CPU, {}, experiments=select([c.experiment]))
        c.numbers(found)
        if c.margin is not None:
            c.margin(found)


def test_experiments_are_chosen_by_name_and_figure():
    assert [e.name for e in select(["fig1"])] == ["fig1a", "fig1b", "fig1c"]
    assert select([]) == list(EXPERIMENTS.values())
    with pytest.raises(ValueError, match=r"experiment must be one of example_a2.* got 'fig3'"):
        select(["fig3"])


def test_presets_are_as_large_as_they_promise():
    assert CPU.gan["steps"] >= 1000
    assert CPU.seeds >= 3
    assert CPU.data["first"].resolution == 16
    cost = {key(u): u.cost for e in EXPERIMENTS.values() for u in e.units(CPU)}
    assert sum(cost.values()) / 60 / 2 < 150
    gpu = PRESETS["gpu"]
    config = gpu.gan_unit("first", select(["fig2b"])[0].make(gpu, 0)[-1].config.method, 0).config
    assert (config.width_d, config.width_g, config.latent, config.n_dis) == (128, 256, 128, 5)
    assert (config.learning_rate, config.beta1, config.beta2, config.batch_size) == (
        2e-4,
        0,
        0.9,
        64,
    )
