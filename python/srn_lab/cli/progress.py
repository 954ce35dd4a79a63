"""Training with a progress bar."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from srn_lab.normalisation import label
from srn_lab.train import Gan, History, StepRecord, TrainConfig, train


def train_with_bar(config: TrainConfig, console: Console) -> tuple[Gan, History]:
    """:func:`srn_lab.train.train`, showing steps, losses and the time left on ``console``."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss D {task.fields[loss_d]:.3f}  G {task.fields[loss_g]:+.3f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        name = f"training {label(config.norm, config.rank_ratio)}"
        task = progress.add_task(name, total=config.steps, loss_d=0.0, loss_g=0.0)

        def advance(record: StepRecord) -> None:
            progress.update(task, advance=1, loss_d=record.loss_d, loss_g=record.loss_g)

        return train(config, advance)
