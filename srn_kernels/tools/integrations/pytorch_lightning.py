"""What normalisation does to each layer, in the loggers of a Lightning Trainer."""

from __future__ import annotations

from typing import Any

from srn_kernels.core.arguments import check_count
from srn_kernels.tools.report.history import History, flat

try:
    import lightning.pytorch as lightning
except ImportError:
    import pytorch_lightning as lightning  # the package's older name


class LightningHistory(lightning.Callback):
    """``Trainer(callbacks=[LightningHistory(every=50)])``.

    Every ``every`` optimiser steps the numbers of :class:`srn_kernels.History` go to all loggers of
    the Trainer, under "srn/<layer>/<quantity>". ``history`` keeps them, from the start of fit.
    ValueError, at the start of fit, where the LightningModule has no normalised layer.
    """

    def __init__(self, every: int = 50) -> None:
        self.every = check_count(every, "every", 1)
        self.history: History | None = None
        self._last = 0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.history, self._last = History(pl_module), 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *batch: Any) -> None:
        step = trainer.global_step
        # With gradients accumulated, several batches end at one step, the first of them at none.
        if self.history is None or step in (0, self._last) or step % self.every:
            return
        self._last = step
        values = flat(self.history(step))
        for logger in trainer.loggers:
            logger.log_metrics(values, step)
