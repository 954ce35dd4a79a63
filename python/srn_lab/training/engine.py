"""What every training run shares: accelerate, checkpoints, the thread count, the stop on NaN."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import ProjectConfiguration
from safetensors import SafetensorError
from torch import nn

from srn_lab.files import SaveError, write_json
from srn_lab.training.config import differences


class RunFolderError(ValueError):
    """A folder that holds another run."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or is another network's."""


class NonFiniteLossError(FloatingPointError):
    """A loss became NaN or infinite."""


def accelerator(
    folder: Path | None, mixed_precision: str, *, track: bool, cpu: bool
) -> Accelerator:
    """The device, processes and precision of this launch; TensorBoard under ``folder``/logs."""
    project = ProjectConfiguration(str(folder), str(folder / "logs")) if track else None
    return Accelerator(
        cpu=cpu or not torch.accelerator.is_available(),
        mixed_precision=mixed_precision,
        log_with="tensorboard" if track else None,
        project_config=project,
    )


def processes() -> int:
    """How many processes the launch has."""
    return _state().num_processes


def _state() -> PartialState:
    # Without an accelerator it has to be said, or accelerate sees a launch of one process.
    return PartialState(cpu=not torch.accelerator.is_available())


def is_main() -> bool:
    """Whether this process is the one of a launch that writes."""
    return _state().is_main_process


def wait_for_everyone() -> None:
    """Go on when all processes of a launch are here."""
    _state().wait_for_everyone()


def leave_together() -> None:
    """End the launch's communication once all processes are here; each goes on by itself."""
    wait_for_everyone()
    _state().destroy_process_group()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """``count`` torch threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Global random state from ``seed`` inside, left alone outside."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def check_finite(what: str, values: dict[str, float], when: str) -> None:
    """Raise NonFiniteLossError naming the loss, the step and a remedy."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise NonFiniteLossError(
                f"{what}: {name} is {value} at {when}; checkpoints before it are kept. A smaller "
                "learning rate, or sn or srn in place of no normalisation, is what helps"
            )


def set_trainable(module: nn.Module, trainable: bool) -> None:
    """Let gradients reach the parameters of ``module``, or not."""
    for parameter in module.parameters():
        parameter.requires_grad_(trainable)


class Checkpoints:
    """Complete states of a run in ``folder``/state, the newest of which a later start takes up.

    A state is written under another name and renamed when complete, so the one before it stays
    good until then. ``folder``/config.json says whose they are.
    """

    def __init__(self, folder: Path, config: dict, engine: Accelerator) -> None:
        self.folder, self.engine = folder, engine
        self.states = folder / "state"
        if engine.is_main_process:
            self._claim(config)
        engine.wait_for_everyone()

    def _claim(self, config: dict) -> None:
        path = self.folder / "config.json"
        if path.exists():
            try:
                found = json.loads(path.read_text())
            except json.JSONDecodeError as error:
                raise RunFolderError(f"{path} is no configuration: {error}") from error
            if different := differences(config, found):
                raise RunFolderError(
                    f"{self.folder} holds a run of another configuration "
                    f"({'; '.join(different)}); choose another folder or remove it"
                )
        else:
            write_json(path, config)
        for leftover in self.states.glob(".partial-*"):
            shutil.rmtree(leftover)

    def newest(self) -> int | None:
        """The step of the newest complete state."""
        steps = [int(path.name) for path in self.states.glob("[0-9]*") if path.name.isdigit()]
        return max(steps, default=None)

    def save(self, step: int) -> None:
        """Keep everything registered with the accelerator; on success older states go."""
        target, partial = self.states / f"{step:08d}", self.states / f".partial-{step:08d}"
        try:
            if self.engine.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            self.engine.wait_for_everyone()
            self.engine.save_state(str(partial))
            self.engine.wait_for_everyone()
            if self.engine.is_main_process:
                os.replace(partial, target)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            kept = self.newest()
            raise SaveError(
                f"could not save step {step} under {self.states}: {error}; "
                + ("nothing was saved before" if kept is None else f"step {kept} is kept")
            ) from error
        if self.engine.is_main_process:
            for path in self.states.glob("[0-9]*"):
                if path != target:
                    shutil.rmtree(path)

    def load(self, step: int) -> None:
        """Take up the state of ``step``."""
        path = self.states / f"{step:08d}"
        try:
            self.engine.load_state(str(path))
        except (RuntimeError, KeyError, ValueError, OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path} does not fit this run's networks: {error}; remove {self.folder} to begin "
                "again"
            ) from error

    def clear(self) -> None:
        """Remove all states, once the run's result is written."""
        if self.engine.is_main_process:
            shutil.rmtree(self.states, ignore_errors=True)
