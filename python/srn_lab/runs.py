"""Saving and loading runs, and the facts about the machine that belong beside every number."""

from __future__ import annotations

import json
import os
import pickle
import platform
import subprocess
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from srn_lab.normalisation import Norm
from srn_lab.train import Gan, History, TrainConfig, build

_PACKAGES = ("srn_kernels", "torch", "numpy", "scipy", "scikit-learn", "matplotlib")


class CheckpointError(ValueError):
    """A file that is not a checkpoint of this package."""


def save_run(folder: Path, gan: Gan, history: History) -> dict[str, Path]:
    """Write ``checkpoint.pt`` and ``history.json`` into ``folder``; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint.pt"
    torch.save(
        {
            "config": config_dict(gan.config),
            "generator": gan.generator.state_dict(),
            "discriminator": gan.discriminator.state_dict(),
        },
        checkpoint,
    )
    document = {
        "environment": environment(),
        "config": config_dict(gan.config),
        "history": history.to_dict(),
    }
    return {"checkpoint": checkpoint, "history": write_json(folder / "history.json", document)}


def load_run(checkpoint: Path) -> Gan:
    """The networks of a checkpoint, normalised as they were trained, u and v included."""
    try:
        state = torch.load(checkpoint, weights_only=True)
        config = TrainConfig(**{**state["config"], "norm": Norm(state["config"]["norm"])})
        gan = build(config)
        gan.generator.load_state_dict(state["generator"])
        gan.discriminator.load_state_dict(state["discriminator"])
    except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint} is not a srn_lab checkpoint: {error}") from error
    return gan


def config_dict(config: TrainConfig) -> dict:
    """The configuration as plain values."""
    return {**asdict(config), "norm": config.norm.value}


def write_json(path: Path, document: dict) -> Path:
    """Write ``document`` indented; NaN and infinity are refused because JSON has neither."""
    path.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n")
    return path


def environment() -> dict:
    """Versions, machine, thread count and, in a git checkout, the commit."""
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "commit": _commit(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():
        # Installed inside somebody else's repository, git would answer with their commit.
        return None
    command = ["git", "-C", str(checkout), "rev-parse", "--verify", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
