"""Training with a progress bar."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from srn_lab.training.config import GanConfig
from srn_lab.training.gan import GanTrainer, StepRecord, train_gan


def train_with_bar(config: GanConfig, console: Console, **keywords: Any) -> GanTrainer:
    """:func:`srn_lab.training.gan.train_gan`, showing steps, losses and the time left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss D {task.fields[loss_d]:.3f}  G {task.fields[loss_g]:+.3f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        name = f"training {config.label}"
        task = progress.add_task(name, total=config.steps, loss_d=0.0, loss_g=0.0)

        def advance(record: StepRecord) -> None:
            progress.update(task, completed=record.step, loss_d=record.loss_d, loss_g=record.loss_g)

        hear: Callable[[StepRecord], None] = advance
        return train_gan(config, on_step=hear, **keywords)
