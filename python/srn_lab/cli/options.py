"""Options that several commands share, and how an error of the lab reaches the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from srn_lab.data import MissingDataError
from srn_lab.files import SaveError
from srn_lab.measures.features import FeatureError
from srn_lab.training.engine import CheckpointError, NonFiniteLossError, RunFolderError

_BAD_INPUT = (MissingDataError, RunFolderError, CheckpointError, FeatureError, ValueError)


@contextmanager
def one_clear_error() -> Iterator[None]:
    """Bad input ends with exit code 2, a failed run or save with 1, and one message."""
    try:
        yield
    except _BAD_INPUT as error:
        raise typer.BadParameter(str(error)) from error
    except (SaveError, NonFiniteLossError) as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(1) from error


def _ratio(value: float) -> float:
    if not 0 < value <= 1:
        raise typer.BadParameter(f"must be above 0 and at most 1, got {value}")
    return value


def _positive(value: float) -> float:
    if not value > 0:
        raise typer.BadParameter(f"must be above 0, got {value}")
    return value


def _multiple_of_8(value: int) -> int:
    if value < 8 or value % 8:
        raise typer.BadParameter(f"must be a positive multiple of 8, got {value}")
    return value


def _out_folder(value: Path) -> Path:
    if value.exists() and not value.is_dir():
        raise typer.BadParameter(f"{value} exists and is not a folder")
    return value


RankRatio = Annotated[
    float,
    typer.Option(
        callback=_ratio, help="c, the stable-rank bound over min(rows, columns); srn only."
    ),
]
LearningRate = Annotated[
    float, typer.Option(callback=_positive, help="Adam's, decayed linearly to 0.")
]
Steps = Annotated[int, typer.Option(min=1, help="Generator updates.")]
Width = Annotated[int, typer.Option(min=1, help="Feature maps of both networks.")]
NDis = Annotated[int, typer.Option(min=1, help="Discriminator updates per generator update.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of weights, batches, latents and pairs.")]
NumFeat = Annotated[int, typer.Option(min=1, help="Base feature maps of the U-Net.")]
Repeats = Annotated[int, typer.Option(min=1, help="Timed rounds.")]
Size = Annotated[
    int, typer.Option(callback=_multiple_of_8, help="Side of the images, a multiple of 8.")
]
Out = Annotated[Path, typer.Option(callback=_out_folder, help="Folder for the results.")]


def print_paths(files: dict[str, Path], console: Console) -> None:
    """One line a file."""
    for name, path in files.items():
        console.print(f"{name:>16}  {path}", highlight=False, soft_wrap=True)
