"""The result store and the runner: nothing that was finished is lost."""

import dataclasses
import json
import warnings
from pathlib import Path

import pytest
from srn_lab.experiments import runner
from srn_lab.experiments.examples import IdentityUnit, LinearUnit
from srn_lab.experiments.presets import PRESETS
from srn_lab.experiments.runner import Workplace, missing, run_units
from srn_lab.experiments.store import Store, row_of
from srn_lab.experiments.units import FeatureUnit, Place, key
from srn_lab.files import SaveError, write_atomically, write_json
from srn_lab.measures.features import FeatureError
from srn_lab.methods import Method
from srn_lab.training.classifier import train_classifier
from srn_lab.training.engine import NonFiniteLossError
from srn_lab.training.gan import train_gan


@dataclasses.dataclass(frozen=True)
class Given(IdentityUnit):
    """A unit that gives what it is told, or raises it."""

    outcome: object = 1.5

    def describe(self):
        return {"seed": self.seed}

    def run(self, place):
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return {"value": self.outcome}


def workplace(folder):
    return Workplace(folder, folder / "rows.jsonl")


def test_a_rerun_does_only_what_is_missing(tmp_path):
    place = workplace(tmp_path)
    units = [Given(seed) for seed in range(3)]
    assert run_units(missing(units[:2], place), place) == []
    before = place.store.read_bytes()
    assert missing(units, place) == [units[2]]
    run_units(missing(units, place), place)
    assert place.store.read_bytes().startswith(before)
    assert missing(units, place) == []
    row = Store(place.store).rows()[key(units[0])]
    assert row.result == {"value": 1.5}
    assert row.environment["packages"]["torch"]
    assert {"commit", "cpu", "dirty"} <= row.environment.keys()


def test_units_that_raise_are_reported_and_tried_again(tmp_path):
    place = workplace(tmp_path)
    bad, good = Given(0, outcome=OSError("no such thing")), Given(1)
    failures = run_units([bad, good], place)
    assert [(f.unit, f.reason) for f in failures] == [(bad, "OSError: no such thing")]
    assert missing([bad, good], place) == [bad]
    assert "no such thing" in (place.folder(bad) / "error.txt").read_text()


def test_a_loss_that_is_not_finite_is_a_result(tmp_path):
    place = workplace(tmp_path)
    unit = Given(0, outcome=NonFiniteLossError("D's loss is nan at step 5"))
    assert run_units([unit], place) == []
    assert missing([unit], place) == []
    assert Store(place.store).rows()[key(unit)].failed == "D's loss is nan at step 5"


def test_two_jobs_give_the_rows_of_one(tmp_path):
    units = [LinearUnit(0, pairs=50), IdentityUnit(0), LinearUnit(1, pairs=50)]
    alone, together = workplace(tmp_path / "one"), workplace(tmp_path / "two")
    assert run_units(units, alone) == run_units(units, together, jobs=2) == []
    rows = [Store(place.store).rows() for place in (alone, together)]
    assert {k: r.result for k, r in rows[0].items()} == {k: r.result for k, r in rows[1].items()}


def test_keys_depend_on_the_configuration_and_on_what_is_measured_alone():
    preset = PRESETS["smoke"]
    unit = preset.gan_unit("first", Method("srn", 0.5), 0)
    same = dataclasses.replace(unit, slot="elsewhere", cost=7.0)
    assert key(unit) == key(same)
    moved = dataclasses.replace(unit.config.data, root="/elsewhere")
    assert key(unit) == key(
        dataclasses.replace(unit, config=dataclasses.replace(unit.config, data=moved))
    )
    other_measures = dataclasses.replace(unit.measures, pairs=51)
    assert key(unit) != key(dataclasses.replace(unit, measures=other_measures))
    assert key(unit) != key(preset.gan_unit("first", Method("srn", 0.5), 1))
    assert key(unit) != key(preset.gan_unit("first", Method("srn", 0.7), 0))


def test_feature_networks_come_first_and_once(tmp_path):
    preset, place = PRESETS["smoke"], workplace(tmp_path)
    gans = [preset.gan_unit("first", Method("sn"), seed) for seed in range(2)]
    todo = missing([*gans, *gans], place)
    assert [type(unit) for unit in todo] == [FeatureUnit, type(gans[0]), type(gans[1])]


def test_a_torn_last_line_is_left_out_and_overwritten(tmp_path):
    store = Store(tmp_path / "rows.jsonl")
    rows = [row_of(Given(seed), {"value": seed}) for seed in range(3)]
    store.append(rows[:2])
    whole = store.path.read_bytes()
    store.path.write_bytes(whole[:-20])
    with pytest.warns(UserWarning, match="torn last line"):
        assert list(store.rows()) == [rows[0].key]
    store.append(rows[2:])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(store.rows()) == [rows[0].key, rows[2].key]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    store = Store(tmp_path / "rows.jsonl")
    store.append([row_of(Given(0), {})])
    text = store.path.read_text()
    store.path.write_text(text + "{broken\n" + text)
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2 is no row"):
        store.rows()


def test_a_full_disk_keeps_the_rows_before(tmp_path, monkeypatch):
    store = Store(tmp_path / "rows.jsonl")
    rows = [row_of(Given(seed), {"value": seed}) for seed in range(2)]
    store.append(rows[:1])
    before = store.path.read_bytes()

    class Full:
        """A file that takes half of what is written, as on a disk that fills up."""

        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, data):
            self.file.write(data[: len(data) // 2])
            raise OSError(28, "No space left on device")

    opened = Path.open

    def fills_up(path, mode="r", *arguments, **keywords):
        file = opened(path, mode, *arguments, **keywords)
        return Full(file) if mode == "ab" else file

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", fills_up)
        with pytest.raises(SaveError, match=r"No space left on device; the rows before are kept"):
            store.append(rows[1:])
    assert store.path.read_bytes() == before


def test_a_device_that_is_full_gives_one_clear_error():
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    with pytest.raises(SaveError, match=r"could not add to /dev/full: .*No space left"):
        Store(Path("/dev/full")).append([row_of(Given(0), {})])


def test_a_failed_write_leaves_the_file_before(tmp_path, monkeypatch):
    path = write_atomically(tmp_path / "page", "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(SaveError, match=r"could not write .*page: No space left on device"):
            write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["page"]
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"x": float("nan")})
    assert json.loads(write_json(path, {"x": 1}).read_text()) == {"x": 1}


def test_the_runner_removes_states_but_no_pictures(tmp_path):
    place, unit = workplace(tmp_path), Given(0)
    state, picture = place.folder(unit) / "state", place.folder(unit) / "samples.png"
    state.mkdir(parents=True)
    picture.write_bytes(b"png")
    run_units([unit], place)
    assert picture.exists()
    assert not state.exists()
    assert runner.missing([unit], place) == []


@pytest.mark.parametrize("kind", ["gan", "classifier"])
def test_a_unit_interrupted_half_way_ends_with_the_same_result(kind, tmp_path, monkeypatch):
    preset = PRESETS["smoke"]
    if kind == "gan":
        unit = preset.gan_unit("first", Method("srn", 0.5), 0)
        unit.features.run(Place(tmp_path / "f", tmp_path / "features"))
    else:
        longer = dataclasses.replace(preset, classifier={**preset.classifier, "epochs": 3})
        unit = longer.classifier_unit("first", Method("srn", 0.5), 0)
    whole = unit.run(Place(tmp_path / "whole", tmp_path / "features"))
    for train in (train_gan, train_classifier):
        monkeypatch.setitem(train.__kwdefaults__, "save_every_s", 0.0)

    def stop(share):
        if share > 0.5:
            raise KeyboardInterrupt

    folder = tmp_path / "halved"
    with pytest.raises(KeyboardInterrupt):
        unit.run(Place(folder, tmp_path / "features", stop))
    assert list((folder / "state").iterdir())
    assert unit.run(Place(folder, tmp_path / "features")) == whole


def test_missing_features_show_before_training(tmp_path, monkeypatch):
    unit = PRESETS["smoke"].gan_unit("first", Method("sn"), 0)
    weights = str(tmp_path / "none.pth")
    measures = dataclasses.replace(unit.measures, features=None, inception_weights=weights)
    monkeypatch.setattr("srn_lab.experiments.units.train_gan", None)
    with pytest.raises(FeatureError, match=r"none\.pth does not exist"):
        dataclasses.replace(unit, measures=measures).run(Place(tmp_path, tmp_path))
