"""A pytest plugin: keeps what the running and the first failing test asked of a backend.

    pytest -p benchmarks.gpu.recorder --record-backend cuda --record-to FOLDER

Written before every call, so that it outlives a crash: each worker's last call in last_*.json,
the last calls of failing tests in failing_*.json. reduce.py replays them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmarks.gpu.layers import LayerCase, of_layers, write_cases
from srn_kernels import backends

_recorder: Recorder | None = None


class Recorder:
    """Stands in front of a backend's two verbs."""

    def __init__(self, backend: ModuleType, folder: Path) -> None:
        self.folder, self.worker = folder, os.environ.get("PYTEST_XDIST_WORKER", "main")
        self.last: list[LayerCase] = []
        folder.mkdir(parents=True, exist_ok=True)
        forward, backward = backend.normalize, backend.normalize_backward

        # The lists are those of srn_kernels/core/ops.py; the last may be left out.
        def normalize(
            weights, us, vs, outs, state, stats, offsets, ranks, iterations, dims, eps, *scalings
        ):
            layers = zip(weights, outs, vs, dims, iterations, ranks, eps, strict=True)
            self.keep((*x, *y) for x, y in zip(layers, of_layers(*scalings), strict=False))
            lists = (weights, us, vs, outs, state, stats, offsets, ranks, iterations, dims, eps)
            forward(*lists, *scalings)

        def normalize_backward(
            grads, weights, state, stats, results, rows, offsets, dims, *scalings
        ):
            layers = ((w, g, None, dim) for w, g, dim in zip(weights, grads, dims, strict=True))
            usual = (1, None, 1e-12)
            self.keep((*x, *usual, *y) for x, y in zip(layers, of_layers(*scalings), strict=False))
            backward(grads, weights, state, stats, results, rows, offsets, dims, *scalings)

        backend.normalize, backend.normalize_backward = normalize, normalize_backward

    def keep(self, layers: Iterable[tuple[Any, ...]]) -> None:
        self.last = []
        # Arguments that make no layers are the backend's to refuse.
        with contextlib.suppress(ValueError, TypeError, IndexError, AttributeError):
            self.last = [LayerCase.of(*layer) for layer in layers]
        if self.last:
            write_cases(self.folder / f"last_{self.worker}.json", self.last)

    def failed(self, test: str) -> None:
        if self.last:
            write_cases(self.folder / f"failing_{self.worker}.json", self.last, test)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-backend", help="whose calls are kept")
    parser.addoption("--record-to", type=Path, help="folder of the kept calls")


def pytest_sessionstart(session: pytest.Session) -> None:
    global _recorder
    name, folder = (session.config.getoption(f"--record-{x}") for x in ("backend", "to"))
    if name and folder:
        _recorder = Recorder(backends.load(name), folder)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any):
    outcome = yield
    if _recorder is not None and outcome.get_result().failed:
        _recorder.failed(item.nodeid)
