"""What is kept of a finished round."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from srn_kernels.core.plan import Plan


class RoundRecord:
    """What is remembered of one eager round: enough to compute its W_hat again, bit for bit."""

    def __init__(self, plan: Plan, layers: Sequence[Any]) -> None:
        self.plan = plan
        self.layers = layers  # told of a backward: their attribute ``backward_seen``
        self.round_state: Tensor | None = None
        self.stats: Tensor | None = None
        self.graphed = torch.is_grad_enabled()  # a backward may come
        self.backward_seen = False
        self.iterated = False  # of shards: whether u and v moved,
        self.written: list[int] = []  # and the versions of their weights
        self.versions: list[int] = []  # of the weights
        self.earlier: list[weakref.ref[RoundRecord]] = []
        self.root: object = None  # what was called
        self.checkpointed = False  # whether a layer used it without gradients, within its forward,
        self.repeated = False  # and whether a backward has asked for it again,
        self.moved = False  # and u and v have moved then
        self.kept: list[RoundRecord] = []  # as ``earlier``, where no graph holds them

    def waiting(self) -> list[RoundRecord]:
        """Earlier rounds of these layers whose graphs live and have seen no backward."""
        alive = [*self.kept, *(ref() for ref in self.earlier)]
        return [r for r in alive if r is not None and not r.backward_seen]
