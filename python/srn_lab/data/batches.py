"""Endless shuffled batches whose place in the data can be saved and restored."""

from __future__ import annotations

import torch
from torch import Tensor

from srn_lab.data.images import Images


class Batches:
    """``next()`` gives (images, labels); reshuffled every epoch, an incomplete last batch dropped.

    The order depends on ``generator`` alone, which others may draw from in between.
    """

    def __init__(self, data: Images, batch_size: int, generator: torch.Generator) -> None:
        if not 1 <= batch_size <= len(data):
            raise ValueError(f"batch_size must be in 1..{len(data)}, got {batch_size}")
        self.data, self.batch_size, self.generator = data, batch_size, generator
        self.order = torch.empty(0, dtype=torch.int64)
        self.position = 0

    def next_index(self) -> Tensor:
        """The place in the data of the next batch."""
        if self.position + self.batch_size > len(self.order):
            self.order = torch.randperm(len(self.data), generator=self.generator)
            self.position = 0
        index = self.order[self.position : self.position + self.batch_size]
        self.position += self.batch_size
        return index

    def __next__(self) -> tuple[Tensor, Tensor]:
        return self.data.take(self.next_index())

    def state_dict(self) -> dict:
        return {"order": self.order, "position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.order, self.position = state["order"], state["position"]
