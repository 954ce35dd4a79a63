"""What normalisation does to each layer, in the log of a transformers Trainer."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from srn_kernels.tools.report.history import History, flat


class TrainerHistory(TrainerCallback):
    """``Trainer(..., callbacks=[TrainerHistory(to=writer)])``.

    At every log of the Trainer the numbers of :class:`srn_kernels.History` join the last entry of
    ``state.log_history``, under "srn/<layer>/<quantity>", and go ``to`` where History writes.
    (Callbacks that report, transformers' own, have their turn before those of users.) ValueError,
    at the start of training, where the model has no normalised layer.
    """

    def __init__(self, to: Any = None) -> None:
        self.to = to
        self.history: History | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.history = History(kwargs["model"], self.to)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.history is not None and state.is_world_process_zero and state.log_history:
            state.log_history[-1].update(flat(self.history(state.global_step)))
