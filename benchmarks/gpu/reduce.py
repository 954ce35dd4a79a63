"""Reduces what a failing test asked of a backend to the smallest call that fails by itself.

    python -m benchmarks gpu reduce --backend cuda --records FOLDER --to failing_cuda.json
    python -m benchmarks gpu reduce --backend cuda --case failing_cuda.json

Calls run in a process of their own, with random values: a kernel that crashes or hangs costs that
process. First every layer alone, then halves of the call, then smaller shapes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.gpu import program
from benchmarks.gpu.layers import (
    LayerCase,
    as_json,
    check_round,
    from_json,
    read_cases,
    write_cases,
)
from benchmarks.measure.store import ROOT
from srn_kernels import backends

Call = list[LayerCase]
READY = "ready"
FIRST_LINE, LINE = 60.0, 15.0  # seconds: to import torch and touch the device; for one call


@dataclass
class Tries:
    """Tells which calls fail, and how, until the time is up."""

    backend: str
    device: str
    deadline: float

    def __call__(self, calls: Sequence[Call]) -> list[str | None]:
        """What is wrong with each, "" if nothing; None if there was no time to see."""
        found: list[str | None] = [None] * len(calls)
        at = 0
        while at < len(calls) and time.monotonic() < self.deadline:
            for text in self._run(calls[at:]):
                found[at] = text
                at += 1
        return found

    def _run(self, calls: Sequence[Call]) -> Iterator[str]:
        """A line a call from one process; the last one may be its death, or its silence."""
        command = [sys.executable, "-m", "benchmarks", "gpu", "reduce", "--backend", self.backend]
        process = subprocess.Popen(
            [*command, "--device", self.device, "--serve"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        lines: queue.Queue[str | None] = queue.Queue()

        def read() -> None:
            for line in process.stdout:
                lines.put(line.rstrip("\n"))
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        try:
            if self._next(lines, FIRST_LINE) != READY:
                yield "its process does not start"
                return
            for call in calls:
                if time.monotonic() >= self.deadline:
                    return
                try:
                    process.stdin.write(json.dumps(as_json(call)) + "\n")
                    process.stdin.flush()
                    text = self._next(lines, LINE)
                except BrokenPipeError:
                    text = None
                if text is None:
                    yield f"its process died: exit status {process.wait(10)}"
                    return
                yield text
        except queue.Empty:
            yield f"no answer within {LINE:.0f} s"
        finally:
            kill(process)

    def _next(self, lines: queue.Queue[str | None], seconds: float) -> str | None:
        return lines.get(timeout=max(0.1, min(seconds, self.deadline - time.monotonic())))


def kill(process: subprocess.Popen, seconds: float = 10.0) -> int | None:
    """Ends a process and what it started; None if it does not die in time."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def smaller(case: LayerCase) -> Iterator[LayerCase]:
    """Simpler layers to try: one iteration, aligned, each dimension halved."""
    if case.iterations != 1:
        yield replace(case, iterations=1)
    if any(case.misaligned):
        yield replace(case, misaligned=(0, 0, 0))
    for i, n in enumerate(case.shape):
        if n > 1:
            yield case.resized((*case.shape[:i], (n + 1) // 2, *case.shape[i + 1 :]))


def reduced(call: Call, tries: Callable[[Sequence[Call]], list[str | None]]) -> tuple[Call, str]:
    """The smallest call found, and what is wrong with it; "" if nothing fails."""
    (why,) = tries([call])
    if not why:
        return call, ""
    while len(call) > 1:
        singles = sorted({(c.elements, str(c)): [c] for c in call}.items())
        parts = [c for _, c in singles]
        results = list(zip(parts, tries(parts), strict=True))
        if not any(text for _, text in results):
            half = len(call) // 2
            parts = [call[:half], call[half:]] if half > 1 or len(call) > 2 else []
            results = list(zip(parts, tries(parts), strict=True))
        failing = [(part, text) for part, text in results if text]
        if not failing:
            break
        call, why = failing[0]
    while len(call) == 1:
        candidates = [[case] for case in smaller(call[0])]
        failing = [x for x in zip(candidates, tries(candidates), strict=True) if x[1]]
        if not failing:
            break
        call, why = min(failing, key=lambda x: x[0][0].elements)
    return call, why


def recorded(folder: Path) -> list[tuple[Path, Call, str]]:
    """What failing tests asked for; else what ran last, when the process died or hung."""
    for pattern in ("failing_*.json", "last_*.json"):
        if paths := sorted(folder.glob(pattern), key=lambda p: -p.stat().st_mtime):
            return [(path, *read_cases(path)) for path in paths]
    return []


def serve(backend: str, device: torch.device) -> int:
    """Answers every call on standard input with one line."""
    module = backends.load(backend)
    torch.zeros(1, device=device)
    print(READY, flush=True)
    for line in sys.stdin:
        try:
            text = check_round(from_json(json.loads(line)), module, device)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
        print(text.replace("\n", " "), flush=True)
        if "CUDA error" in text:
            return 1  # the context is lost
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", required=True)
    parser.add_argument("--records", type=Path, help="folder of the recorder plugin")
    parser.add_argument("--case", type=Path, help="a file of this program: run it again")
    parser.add_argument("--to", type=Path, help="where the smallest call goes")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)


def run(chosen: argparse.Namespace) -> int:
    if chosen.serve:
        return serve(chosen.backend, program.device_of(chosen))
    tries = Tries(chosen.backend, chosen.device, time.monotonic() + chosen.seconds)
    if chosen.case:
        (why,) = tries([read_cases(chosen.case)[0]])
        print("no time" if why is None else why or "it passes")
        return 1 if why else 0
    if not (found := recorded(chosen.records)):
        print("no call was recorded")
        return 1
    for path, call, test in found:
        call, why = reduced(call, tries)
        print(f"{path.name}, {test or 'the running test'}: {why or 'passes with random values'}")
        if why:
            write_cases(chosen.to, call, f"{test}: {why}")
            print(f"{len(call)} layers: {'; '.join(map(str, call))}\nkept in {chosen.to}")
            return 0
    return 1
