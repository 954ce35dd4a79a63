"""Do u and v fit the weight? One state for each normalised weight, which events alone change."""

from __future__ import annotations

import enum
from collections.abc import Sequence

from torch import Tensor, nn

from srn_kernels.core import record


def is_split(weight: Tensor) -> bool:
    """Whether a tensor is a DTensor: FSDP2's shards, tensor parallelism."""
    kind = type(weight)
    return kind is not nn.Parameter and kind is not Tensor and kind.__name__ == "DTensor"


def version_of(weight: Tensor) -> int:
    """A number that changes with every write in place that autograd sees."""
    try:
        version = weight._version
    except RuntimeError:  # inference tensors have none
        return -1
    if type(weight) is nn.Parameter:
        return version
    # foreach and fused optimisers write the local part alone
    return version + (weight._local_tensor._version if is_split(weight) else 0)


def versions_of(weights: Sequence[Tensor]) -> list[int]:
    """:func:`version_of` of each."""
    if set(map(type, weights)) == {nn.Parameter}:
        return record.versions_of(weights)
    return [version_of(w) for w in weights]


class State(enum.Enum):
    """What is known of a weight's u and v."""

    UNSET = "hold no numbers yet"
    NEW = "as wrapping formed them: the first round forms them anew, from the draw"
    FRESH = "belong to the weight"
    STALE = "belong to another weight: they converge before they serve this one"
    UNSEEN = "belong to the weight as the next eager look finds it"


class Freshness:
    """The state of one weight's u and v.

    Events: :meth:`become` (wrapped, converged, moved, loaded, copied, cast, sharded),
    :meth:`forget` (a compiled round moved them) and :attr:`backward_seen` (a backward has reached a
    round of this weight since they last moved). The question is :meth:`now`.

    NEW is formed anew at the first round, because a weight may have been initialised through
    ``.data``, or made equal over ranks, since it was wrapped, and because the same weight then
    gives the same bits; unless somebody wrote u or v meanwhile.
    """

    __slots__ = ("backward_seen", "managed", "parameter", "state", "vectors", "version")

    def __init__(self) -> None:
        self.state = State.UNSET  # UNSEEN is FRESH of no weight
        self.parameter: Tensor | None = None  # the weight that u and v belong to,
        self.version = -1  # and what version_of said of it then
        self.vectors: tuple[int, int] | None = None  # NEW: versions of u and v
        self.backward_seen = False
        self.managed = False  # FSDP2 shows now its shards, now the gathered weight

    def now(self, weight: Tensor, u: Tensor, v: Tensor) -> State:
        """The state in view of the weight, u and v as they are."""
        if self.state is not State.NEW and self.state is not State.FRESH:
            return self.state
        if self.parameter is None:
            return State.UNSEEN
        if self.state is State.NEW and self.vectors == (version_of(u), version_of(v)):
            return State.NEW  # whatever became of the weight
        return State.STALE if self.is_written(weight) else State.FRESH

    def is_written(self, weight: Tensor) -> bool:
        """Whether the weight was replaced, or written with no backward since u, v last moved."""
        known = self.parameter
        if weight is not known:
            # torch.func.functional_call puts plain tensors in the place of Parameters
            if not isinstance(weight, nn.Parameter):
                return False
            if not (self.managed or is_split(weight) != is_split(known)):
                return True
            weight = known  # the same values were only distributed, if not written before
        # A change after a backward of this weight's round is an optimiser step.
        return not self.backward_seen and version_of(weight) != self.version

    def become(
        self, state: State, weight: Tensor, u: Tensor | None = None, v: Tensor | None = None
    ) -> None:
        """Takes a state, of the weight (and, for NEW, of u and v) as they are now."""
        self.backward_seen = False
        self.vectors = (version_of(u), version_of(v)) if state is State.NEW else None
        if state is State.UNSEEN:
            self.state, self.parameter = State.FRESH, None
            return
        self.state = state
        if not isinstance(weight, nn.Parameter):
            return
        if self.managed and not is_split(weight):  # gathered: the shards are what is written
            known = self.parameter
            if known is None or not is_split(known):
                self.parameter = None
                return
            weight = known
        self.parameter, self.version = weight, version_of(weight)

    def forget(self) -> None:
        """NEW and FRESH become UNSEEN. Writes alone: a compiled round guards what it reads."""
        self.parameter = self.vectors = None

    def written(self, weight: Tensor) -> int:
        """The version of what optimisers write, also while FSDP2 shows a gathered weight."""
        known = self.parameter
        return version_of(known if self.managed and known is not None else weight)


# --- the short ways of a round, which asks and tells all its weights at once ----------------------

_FRESH = State.FRESH  # to look a member up takes longer than all the rest


def known_to_fit(
    fits: Sequence[Freshness], weights: Sequence[Tensor], versions: Sequence[int]
) -> list[bool]:
    """For each weight, of this :func:`version_of`, whether ``now() is FRESH`` for sure."""
    return [
        weight is fit.parameter
        and (fit.backward_seen or version == fit.version)
        and fit.state is _FRESH
        for fit, weight, version in zip(fits, weights, versions, strict=True)
    ]


def moved(
    fits: Sequence[Freshness],
    weights: Sequence[Tensor],
    versions: Sequence[int],
    iterations: Sequence[int],
) -> None:
    """A round of these weights, of these versions, has moved u and v: they ``become(FRESH)``."""
    for fit, weight, version, n in zip(fits, weights, versions, iterations, strict=True):
        if n > 0 or fit.parameter is None:
            if weight is fit.parameter and fit.state is _FRESH:
                fit.backward_seen, fit.version = False, version
            else:
                fit.become(_FRESH, weight)
