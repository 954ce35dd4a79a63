"""The time that normalising takes inside a training step, summed where it is spent.

A step is timed with clocks around what normalising adds to it: in the forward the hooks that begin
and end a round (torch: the parametrization's own call), in the backward each autograd node between
W_hat and the Parameter. Two things are not in the sum: what the caches lose to it, and what calling
a layer takes longer before that (here a guard around its forward, in torch a property). The
difference to the plain step has both, and all of the step's noise.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple
from unittest import mock

from torch import Tensor, nn
from torch.nn.utils import parametrize

from benchmarks.cases.steps import Step
from benchmarks.measure.timing import Interval, Key, Samples, interval, no_garbage_collection
from srn_kernels.model import root

WARM_UPS = 2
STEPS = 20  # fewer have no interval


class Spent:
    """A sum of seconds."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._started: dict[int, float] = {}

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return timed

    def watch(self, nodes: Iterable[Any]) -> None:
        """Times every backward of these autograd nodes."""
        for node in nodes:
            key = id(node)
            node.register_prehook(lambda grads, key=key: self._start(key))
            node.register_hook(lambda inputs, outputs, key=key: self._stop(key))

    def _start(self, key: int) -> None:
        self._started[key] = time.perf_counter()

    def _stop(self, key: int) -> None:
        self.seconds += time.perf_counter() - self._started.pop(key)


def nodes_above_parameters(outputs: Iterable[Tensor]) -> list[Any]:
    """The autograd nodes from tensors down to Parameters, without those that add up the Parameters'
    gradients, which the plain model has too."""
    found: dict[Any, None] = {}
    todo = [t.grad_fn for t in outputs if t.grad_fn is not None]
    while todo:
        node = todo.pop()
        if node not in found and not hasattr(node, "variable"):
            found[node] = None
            todo += [inner for inner, _ in node.next_functions if inner is not None]
    return list(found)


@contextlib.contextmanager
def clocks(provider: str) -> Iterator[Spent]:
    """Clocks around what a provider of :data:`benchmarks.cases.steps.STEP_PROVIDERS` adds."""
    spent = Spent()
    if provider == "module":
        begin = spent.around(root.begin)

        def begin_watched(*args: Any, **kwargs: Any) -> Any:
            lease = begin(*args, **kwargs)
            spent.watch(nodes_above_parameters(w for s in lease.held for w in s.outs))
            return lease

        patches = [(root, "begin", begin_watched), (root, "end", spent.around(root.end))]
    elif provider == "torch_sn":
        call = spent.around(parametrize.ParametrizationList.forward)

        def call_watched(parametrizations: nn.Module) -> Tensor:
            weight = call(parametrizations)
            spent.watch(nodes_above_parameters([weight]))
            return weight

        patches = [(parametrize.ParametrizationList, "forward", call_watched)]
    else:
        raise ValueError(f"provider {provider!r} adds nothing to a step that clocks could see")
    with contextlib.ExitStack() as stack:
        for owner, name, function in patches:
            stack.enter_context(mock.patch.object(owner, name, function))
        yield spent


class Costs(NamedTuple):
    """What normalising takes of a step: summed, as a share, and as a difference, in seconds."""

    summed: Interval
    share: Interval  # percent of the step
    difference: Interval


def measure(
    plain: Step,
    plain_key: Key,
    candidates: Mapping[Key, tuple[Step, str]],
    steps: int = STEPS,
    *,
    seed: int = 0,
    advance: Callable[[], object] = lambda: None,
) -> tuple[Samples[Key], dict[Key, Costs]]:
    """Seconds of every step, and the costs of each candidate: (its step, its provider).

    Every repeat runs the plain step, and each candidate's with and without clocks, in a new order.
    """
    generator = random.Random(seed)
    times: Samples[Key] = Samples({plain_key: []} | {key: [] for key in candidates})
    sums: dict[Key, list[float]] = {key: [] for key in candidates}
    shares: dict[Key, list[float]] = {key: [] for key in candidates}
    turns = [(plain_key, False)]
    turns += [(key, with_clocks) for key in candidates for with_clocks in (False, True)]

    def timed(step: Step) -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    def clocked(key: Key) -> None:
        step, provider = candidates[key]
        with clocks(provider) as spent:
            seconds = timed(step)
        sums[key].append(spent.seconds)
        shares[key].append(100 * spent.seconds / seconds)

    with no_garbage_collection():
        for repeat in range(-WARM_UPS, steps):
            for key, with_clocks in generator.sample(turns, len(turns)):
                if with_clocks:
                    clocked(key)
                else:
                    times[key].append(timed(plain if key == plain_key else candidates[key][0]))
            if repeat < 0:
                for kept in (*times.values(), *sums.values(), *shares.values()):
                    kept.clear()
            else:
                advance()
    costs = {}
    for key in candidates:
        pairs = zip(times[key], times[plain_key], strict=True)
        difference = interval([a - b for a, b in pairs])
        costs[key] = Costs(interval(sums[key]), interval(shares[key]), difference)
    return times, costs
