"""What is kept of a finished round, and what its backward looks at first."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from srn_kernels.core.plan import Plan


class Round:
    """What is remembered of one eager round: enough to compute its W_hat again, bit for bit."""

    def __init__(self, plan: Plan, layers: Sequence[Any]) -> None:
        self.plan = plan
        self.layers = layers  # told of a backward: their attribute ``backward_seen``
        self.round_state: Tensor | None = None
        self.stats: Tensor | None = None
        self._places: dict[int, int] | None = None
        self.graphed = torch.is_grad_enabled()  # a backward may come
        self.backward_seen = False
        self.iterated = False  # of shards: whether u and v moved,
        self.written: list[tuple[Any, int]] = []  # and the versions of their weights
        self.versions: Sequence[int] = ()
        self.earlier: list[weakref.ref[Round]] = []
        self.root: object = None  # what was called
        self.checkpointed = False  # whether a layer used it without gradients, within its forward,
        self.repeated = False  # and whether a backward has asked for it again,
        self.moved = False  # and u and v have moved then
        self.kept: list[Round] = []  # as ``earlier``, where no graph holds them

    def fill(self, round_state: Tensor, stats: Tensor, versions: Sequence[int] = ()) -> None:
        """Takes the numbers of the round when they are made, and the versions of its weights."""
        self.round_state, self.stats, self.versions = round_state, stats, versions

    def place_of(self, layer: Any) -> int:
        """Where a layer stands in this round; ``layer``: as in :attr:`layers`."""
        if self._places is None:
            self._places = {id(known): i for i, known in enumerate(self.layers)}
        return self._places[id(layer)]

    def waiting(self) -> list[Round]:
        """Earlier rounds of these layers whose graphs live and have seen no backward."""
        alive = [*self.kept, *(ref() for ref in self.earlier)]
        return [r for r in alive if r is not None and not r.backward_seen]


def versions_of(weights: Sequence[Tensor]) -> list[int]:
    """What :func:`begin_backward` compares; -1 for inference tensors, which have no version."""
    try:
        return [w._version for w in weights]
    except RuntimeError:
        return [-1 if w.is_inference() else w._version for w in weights]


def begin_backward(
    plan: Plan,
    record: Round | None,
    weights: Sequence[Tensor],
    versions: Sequence[int],
    grads: Sequence[Tensor | None],
) -> None:
    """Tells a round's layers of a backward, and makes sure that its weights are still the same.

    A node keeps its tensors itself, so autograd does not check them. RuntimeError names the layer.
    """
    if record is not None:
        record.backward_seen = True
        for layer in record.layers:
            layer.backward_seen = True
    now = versions_of(weights)
    if now == versions:
        return
    for i in range(len(weights)):
        if grads[i] is not None and now[i] != versions[i]:
            raise RuntimeError(
                f"the weight of layer {plan.names[i]!r} was changed in place between its "
                "normalisation and this backward (an optimiser step?); run the forward again "
                "before the second backward"
            )
