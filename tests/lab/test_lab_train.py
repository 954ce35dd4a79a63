"""The trainers: repeatability, exact resume, what stops them and what is kept then."""

import copy
import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from srn_lab.data import DataSpec, load
from srn_lab.files import SaveError
from srn_lab.measures.spectra import evaluating
from srn_lab.methods import Method, Norm
from srn_lab.training.config import GanConfig, gan_config, to_dict
from srn_lab.training.engine import (
    CheckpointError,
    NonFiniteLossError,
    RunFolderError,
    accelerator,
)
from srn_lab.training.gan import GanTrainer, build, train_gan
from srn_lab.training.runs import load_run, save_run

import srn_kernels as srn

DIGITS = DataSpec("digits", 8)
TINY = GanConfig(
    data=DIGITS,
    method=Method("srn", 0.5),
    steps=6,
    n_dis=2,
    batch_size=8,
    width_d=8,
    width_g=4,
    latent=4,
    spectra_every=2,
)
ALL_NORMS = pytest.mark.parametrize("norm", list(Norm), ids=lambda norm: norm.value)


def tiny(norm="srn", **changes):
    steps = 0 if Norm(norm) is Norm.RANDOM else changes.pop("steps", TINY.steps)
    method = Method(norm, 0.5 if norm == "srn" else 1.0)
    return dataclasses.replace(TINY, method=method, steps=steps, **changes)


def assert_same(first, second):
    for name in ("generator", "discriminator"):
        states = [getattr(t.evaluated, name).state_dict() for t in (first, second)]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0]), name
    assert first.history.state_dict() == second.history.state_dict()


@ALL_NORMS
def test_training_twice_is_bit_identical(norm):
    torch.manual_seed(1)
    first = train_gan(tiny(norm.value))
    torch.manual_seed(2)
    torch.rand(7)
    assert_same(first, train_gan(tiny(norm.value)))


class Interrupted(Exception):
    """Stands for a kill between two steps."""


def interrupt_at(step):
    def hear(record):
        if record.step == step:
            raise Interrupted

    return hear


@pytest.mark.parametrize(
    "config",
    [
        tiny("srn"),
        tiny("torch-sn"),
        tiny("wgan-gp"),
        tiny("sn", conditional=True, ema=0.9),
        tiny("torch-sn", convert_at=2),
        tiny("torch-sn", convert_at=5),
    ],
    ids=["srn", "torch-sn", "wgan-gp", "conditional-ema", "converted-before", "converted-after"],
)
def test_an_interrupted_run_ends_with_the_same_bits(config, tmp_path):
    whole = train_gan(config)
    # Interrupted at step 5, after the state of step 4: step 5 is done again.
    with pytest.raises(Interrupted):
        train_gan(config, tmp_path, save_every=2, on_step=interrupt_at(5))
    torch.manual_seed(99)
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["00000004"]
    assert_same(whole, train_gan(config, tmp_path, save_every=2))


def test_a_killed_process_goes_on_to_the_same_bits(tmp_path):
    config = dataclasses.replace(TINY, steps=120, spectra_every=120)
    command = [sys.executable, "-m", "srn_lab", "train", "--out", str(tmp_path)]
    options = {
        "data": "digits",
        "resolution": 8,
        "steps": 120,
        "n-dis": 2,
        "batch-size": 8,
        "width": 4,
        "latent": 4,
        "spectra-every": 120,
        "learning-rate": 2e-4,
        "save-every": 5,
    }
    command += [f"--{name}={value}" for name, value in options.items()]
    config = dataclasses.replace(config, width_d=4)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    states = tmp_path / "state"
    deadline = time.monotonic() + 240
    while not (states.exists() and any(p.name.isdigit() for p in states.iterdir())):
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "checkpoint.pt").exists()
    assert_same(train_gan(config), train_gan(config, tmp_path, save_every=5))


def test_learning_rate_decays_linearly_to_zero():
    trainer = GanTrainer(
        tiny("sn", steps=4), load(DIGITS), accelerator(None, "no", track=False, cpu=True)
    )
    rates = []
    for _ in range(4):
        trainer.step()
        rates += [o.param_groups[0]["lr"] for o in (trainer.optimizer_d, trainer.optimizer_g)]
    assert rates == pytest.approx([r * 2e-4 for r in (1, 1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25)])


def trainer_of(config):
    return GanTrainer(config, load(config.data), accelerator(None, "no", track=False, cpu=True))


@pytest.mark.parametrize("norm", ["none", "sn", "srn"])
def test_generator_step_moves_the_generator_and_nothing_of_the_discriminator(norm):
    trainer = trainer_of(tiny(norm))
    gan = trainer.gan
    trainer.step_d()
    before_d = copy.deepcopy(gan.discriminator.state_dict())
    before_g = copy.deepcopy(dict(gan.generator.named_parameters()))
    trainer.step_g()
    after_d = gan.discriminator.state_dict()
    assert all(torch.equal(before_d[key], after_d[key]) for key in before_d)
    assert all(p.requires_grad for p in gan.discriminator.parameters())
    moved = {name for name, p in gan.generator.named_parameters() if not p.equal(before_g[name])}
    # A bias before batch normalisation has no effect, hence no certain gradient.
    assert moved >= {name for name in before_g if name.endswith("weight")}


@pytest.mark.parametrize("norm", ["sn", "srn", "torch-sn"])
def test_a_step_of_d_is_one_power_iteration(norm):
    trainer = trainer_of(tiny(norm))
    model = trainer.gan.discriminator
    expected = copy.deepcopy(dict(model.named_buffers()))
    trainer.step_d()
    twin = build(tiny(norm), load(DIGITS)).discriminator
    assert expected.keys() == dict(twin.named_buffers()).keys() != set()
    twin(torch.rand(4, 1, 8, 8))
    moved = dict(model.named_buffers())
    assert all(torch.equal(moved[key], value) for key, value in twin.named_buffers())


def test_the_averaged_generator_follows_by_its_decay():
    config = tiny("sn", steps=3, ema=0.8)
    trainer = trainer_of(config)
    name, parameter = next(iter(trainer.gan.generator.named_parameters()))
    expected = None
    for _ in range(3):
        trainer.step()
        now = parameter.detach().clone()
        expected = now if expected is None else 0.8 * expected + 0.2 * now
    averaged = dict(trainer.evaluated.generator.named_parameters())[name]
    torch.testing.assert_close(averaged, expected)


def test_converting_keeps_the_outputs_and_the_optimiser():
    trainer = trainer_of(tiny("torch-sn", convert_at=3))
    for _ in range(3):
        trainer.step()
    model, x = trainer.gan.discriminator, torch.rand(4, 1, 8, 8)
    parameters = set(model.parameters())
    with evaluating(model):
        before = model(x)
    trainer.step()
    assert set(model.parameters()) == parameters
    assert srn.report(model)
    twin = trainer_of(tiny("torch-sn"))
    for _ in range(3):
        twin.step()
    with evaluating(twin.gan.discriminator):
        torch.testing.assert_close(twin.gan.discriminator(x), before)
    # One step later the two still agree to rounding: Adam's state was kept.
    twin.step()
    with evaluating(model), evaluating(twin.gan.discriminator):
        torch.testing.assert_close(twin.gan.discriminator(x), model(x), rtol=1e-3, atol=1e-4)


def test_orthogonality_is_pulled_towards_the_identity():
    def error(weight):
        trainer = trainer_of(tiny("ortho", ortho_weight=weight, learning_rate=1e-2, steps=40))
        for _ in range(20):
            trainer.step()
        kernel = trainer.gan.discriminator.blocks[2].conv1.weight.detach().flatten(1)
        return (kernel @ kernel.t() - torch.eye(8)).norm().item()

    assert error(1.0) < 0.5 * error(0.0)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_state(tmp_path, monkeypatch):
    whole = train_gan(TINY)
    loss = type(TINY.loss)
    original, calls = loss.discriminator, []

    def broken(self, real, fake):
        calls.append(None)
        found = original(self, real, fake)
        return found * float("nan") if len(calls) > 2 * 4 else found

    monkeypatch.setattr(loss, "discriminator", broken)
    with pytest.raises(NonFiniteLossError, match=r"SRN-50: D's loss is nan at step 5"):
        train_gan(TINY, tmp_path, save_every=4)
    monkeypatch.setattr(loss, "discriminator", original)
    assert_same(whole, train_gan(TINY, tmp_path))


def test_a_folder_of_another_run_is_refused_and_left_alone(tmp_path):
    with pytest.raises(Interrupted):
        train_gan(TINY, tmp_path, save_every=2, on_step=interrupt_at(3))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(RunFolderError, match="seed is 0 there, 1 here"):
        train_gan(dataclasses.replace(TINY, seed=1), tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_state_of_another_network_is_refused_by_its_path(tmp_path):
    with pytest.raises(Interrupted):
        train_gan(TINY, tmp_path / "a", save_every=2, on_step=interrupt_at(3))
    with pytest.raises(Interrupted):
        other = dataclasses.replace(TINY, width_d=4)
        train_gan(other, tmp_path / "b", save_every=2, on_step=interrupt_at(3))
    (tmp_path / "a" / "state").rename(tmp_path / "gone")
    (tmp_path / "b" / "state").rename(tmp_path / "a" / "state")
    with pytest.raises(CheckpointError, match=r"00000002 does not fit this run's networks"):
        train_gan(TINY, tmp_path / "a")


def test_a_full_disk_keeps_the_state_before(tmp_path):
    whole = train_gan(TINY)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limited = []

    def fill(record):
        if record.step == 3:
            # Files may grow to 1 KiB from here: the kernel refuses the rest, as on a full disk.
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
            limited.append(True)

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(SaveError, match=r"could not save step 4 .*; step 2 is kept"):
            train_gan(TINY, tmp_path, save_every=2, on_step=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert limited
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["00000002"]
    assert_same(whole, train_gan(TINY, tmp_path))


@ALL_NORMS
def test_checkpoint_restores_the_same_networks(norm, tmp_path):
    changes = {"convert_at": 3} if norm is Norm.TORCH_SN else {}
    trainer = train_gan(tiny(norm.value, **changes))
    gan = trainer.evaluated
    loaded = load_run(save_run(tmp_path, gan, trainer.history)["checkpoint"])
    assert loaded.config == gan.config
    images, _ = gan.sample(5, torch.Generator().manual_seed(0))
    again, _ = loaded.sample(5, torch.Generator().manual_seed(0))
    torch.testing.assert_close(again, images, rtol=0, atol=0)
    with evaluating(gan.discriminator), evaluating(loaded.discriminator):
        expected = gan.discriminator(images)
        torch.testing.assert_close(loaded.discriminator(images), expected, rtol=0, atol=0)


def test_samples_and_logs_are_written_over_time(tmp_path):
    seen = {}
    train_gan(
        tiny("sn", steps=4),
        tmp_path,
        track=True,
        samples_every=2,
        on_samples=lambda step, images: seen.update({step: images}),
    )
    assert sorted(seen) == [2, 4]
    assert seen[2].shape == (64, 1, 8, 8)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for file in (tmp_path / "logs").rglob("events*"):
        events = EventAccumulator(str(file)).Reload()
        found |= {tag: len(events.Scalars(tag)) for tag in events.Tags()["scalars"]}
    assert found["loss/D"] == found["loss/G"] == 4
    assert found["sigma/dense"] == found["stable_rank/blocks.1.conv1"] == 2


def test_two_processes_on_gloo_keep_equal_weights(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(
        "import hashlib, sys\n"
        "from pathlib import Path\n"
        "from srn_lab.data import DataSpec\n"
        "from srn_lab.methods import Method\n"
        "from srn_lab.training.config import GanConfig\n"
        "from srn_lab.training.gan import train_gan\n"
        "config = GanConfig(data=DataSpec('digits', 8), method=Method('srn', 0.5), steps=3,\n"
        "                   n_dis=2, batch_size=8, width_d=8, width_g=4, latent=4)\n"
        "trainer = train_gan(config, Path(sys.argv[1]), cpu=True, save_every=2)\n"
        "digest = hashlib.sha256()\n"
        "for key, value in sorted(trainer.gan.discriminator.state_dict().items()):\n"
        "    digest.update(value.numpy().tobytes())\n"
        "for parameter in trainer.gan.generator.parameters():\n"
        "    digest.update(parameter.detach().numpy().tobytes())\n"
        "engine = trainer.engine\n"
        "loss = trainer.history.steps[-1]['loss_d']\n"
        "path = Path(sys.argv[1]) / f'rank{engine.process_index}'\n"
        "path.write_text(f'{engine.num_processes} {digest.hexdigest()} {loss}')\n"
    )
    # What accelerate's own launcher starts where there are GPUs; on CPUs it wants MPI.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, str(script), str(tmp_path / "run")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    ranks = [(tmp_path / "run" / f"rank{rank}").read_text().split() for rank in range(2)]
    assert ranks[0] == ranks[1]
    assert ranks[0][0] == "2"
    assert [p.name for p in (tmp_path / "run" / "state").iterdir()] == ["00000002"]


def test_training_runs_on_the_configured_threads_and_restores_the_number():
    seen = []
    train_gan(
        tiny("none", steps=1, threads=2), on_step=lambda r: seen.append(torch.get_num_threads())
    )
    assert seen == [2]
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"learning_rate": -1.0}, "learning_rate must be above 0, got -1"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\), got 1"),
        ({"loss": "logistic"}, "loss must be one of hinge.* got 'logistic'"),
        ({"convert_at": 3}, "convert_at needs method torch-sn, got srn"),
        ({"mixed_precision": "fp8"}, "mixed_precision must be no, fp16, bf16, got fp8"),
        ({"data": DataSpec("digits", 12)}, "resolution must be one of .* got 12"),
    ],
)
def test_bad_configuration_names_the_field_and_value(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_configurations_survive_json():
    config = tiny("sn", conditional=True)
    assert gan_config(json.loads(json.dumps(to_dict(config)))) == config
