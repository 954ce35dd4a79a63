"""A row of the benchmarks' store, to be varied by tests."""

from __future__ import annotations

from benchmarks.cases import workloads
from benchmarks.measure import store


def make_row(**values) -> store.Row:
    first = {
        "commit": "aaaa",
        "dirty": False,
        "date": "2026-01-01T00:00:00+00:00",
        "srn_kernels": "0",
        "torch": "2",
        "python": "3",
        "cpu": "abacus",
        "cores": 2,
        "threads": 2,
        "instruction_set": "beads",
        "load": 0.0,
        "workload": workloads.CORE[0],
        "provider": "module",
        "rank_ratio": 1.0,
        "mode": "forward_backward",
        "metric": "time_ms",
        "p20": 1.0,
        "p50": 2.0,
        "p80": 3.0,
        "repeats": 5,
        "bytes": 8,
    }
    return store.Row(**{**first, **values})
