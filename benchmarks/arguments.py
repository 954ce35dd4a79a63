"""Arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

Names = list[str] | None
Workloads = Annotated[Names, typer.Option("--workload", help="Name, gpt2_xl/8 or 64x512x256.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Default: torch's own.")]
Save = Annotated[bool, typer.Option("--save", help="Append the rows to the store.")]
Folder = Annotated[Path, typer.Option("--store", help="Folder of the stored rows.")]


def use_threads(threads: int | None) -> None:
    if threads:
        torch.set_num_threads(threads)
