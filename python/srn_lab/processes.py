"""Calls side by side in processes of their own, each of which says how far it is."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any

import torch

POLL_S = 0.5
Tell = Callable[[float], None]
"""Takes the share of a call's work that is done, 0 to 1."""


class ProcessError(RuntimeError):
    """A process ended without a result."""


def side_by_side(
    function: Callable[[Any, Tell], Any],
    arguments: Sequence[Any],
    jobs: int,
    advance: Callable[[Mapping[int, float]], None],
) -> Iterator[tuple[int, Any]]:
    """``function(argument, tell)`` for each argument, ``jobs`` at once with one torch thread each.

    Yields (index, result) as they end; what a call raised is its result. ``advance`` hears twice a
    second which calls run and how far they are. With one job it runs here, without a process.
    """
    run = _here if jobs == 1 else _in_processes
    yield from run(function, arguments, jobs, advance)


def _here(function, arguments, jobs, advance):
    threads = torch.get_num_threads()
    for index, argument in enumerate(arguments):
        advance({index: 0.0})
        torch.set_num_threads(1)
        try:
            yield index, _call(function, argument, _throttled(lambda f, i=index: advance({i: f})))
        finally:
            torch.set_num_threads(threads)


def _in_processes(function, arguments, jobs, advance):
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        shares = manager.dict()
        pool = ProcessPoolExecutor(jobs, mp_context=context)
        try:
            waiting, running = list(enumerate(arguments)), {}
            while waiting or running:
                while waiting and len(running) < jobs:
                    index, argument = waiting.pop(0)
                    future = pool.submit(_in_child, function, index, argument, shares)
                    running[future] = index
                ended, _ = wait(running, timeout=POLL_S, return_when=FIRST_COMPLETED)
                known = dict(shares)
                advance({index: known.get(index, 0.0) for index in running.values()})
                for future in ended:
                    yield running.pop(future), _result(future)
        finally:
            # Whoever leaves early, by an interrupt say, leaves no process behind.
            for process in list((pool._processes or {}).values()):
                process.terminate()
            pool.shutdown(wait=False, cancel_futures=True)


def _in_child(function, index, argument, shares):
    torch.set_num_threads(1)

    def tell(share: float) -> None:
        with contextlib.suppress(OSError):  # the parent may have gone
            shares[index] = share

    return _call(function, argument, _throttled(tell))


def _call(function, argument, tell):
    try:
        return function(argument, tell)
    except Exception as error:
        return error


def _result(future: Future) -> Any:
    try:
        return future.result()
    except Exception as error:
        return ProcessError(f"the process ended: {error!r}")


def _throttled(tell: Tell) -> Tell:
    last = [0.0]

    def now_and_then(share: float) -> None:
        if time.monotonic() - last[0] > POLL_S:
            last[0] = time.monotonic()
            tell(share)

    return now_and_then
