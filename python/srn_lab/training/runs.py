"""The result of a finished GAN run on disk: both networks, the configuration, the history."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import torch

import srn_kernels as srn
from srn_lab.data import load
from srn_lab.files import write_atomically, write_json
from srn_lab.machine import environment
from srn_lab.training.config import gan_config, to_dict
from srn_lab.training.engine import CheckpointError
from srn_lab.training.gan import Gan, History, build


def save_run(folder: Path, gan: Gan, history: History) -> dict[str, Path]:
    """Write ``checkpoint.pt`` and ``history.json`` into ``folder``; return their paths."""
    content = io.BytesIO()
    config = to_dict(gan.config)
    torch.save(
        {
            "config": config,
            "generator": gan.generator.state_dict(),
            "discriminator": gan.discriminator.state_dict(),
        },
        content,
    )
    document = {"environment": environment(), "config": config, "history": history.state_dict()}
    return {
        "checkpoint": write_atomically(folder / "checkpoint.pt", content.getvalue()),
        "history": write_json(folder / "history.json", document),
    }


def load_run(checkpoint: Path) -> Gan:
    """The networks of a checkpoint, normalised as they were trained, u and v included."""
    try:
        state = torch.load(checkpoint, weights_only=True, map_location="cpu")
        config = gan_config(state["config"])
        gan = build(config, load(config.data))
        if config.convert_at is not None:
            srn.convert_spectral_norm(gan.discriminator)
        gan.generator.load_state_dict(state["generator"])
        gan.discriminator.load_state_dict(state["discriminator"])
    except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint} is not a srn_lab checkpoint: {error}") from error
    return gan
