"""What the measuring commands of a GPU machine share: where, for whom, and where rows go."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

import srn_kernels as srn
from benchmarks.gpu import rows
from benchmarks.gpu.candidates import live_kernels
from benchmarks.measure.suite import label

Fail = Callable[[str], None]
Part = Callable[[torch.device, rows.Row, Fail], Iterator[rows.Row]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda", help="cpu: a rehearsal, times mean nothing")
    parser.add_argument("--backend", nargs="+", help="of the live backends with kernels")
    parser.add_argument("--out", type=Path, help="append the rows to this file")
    parser.add_argument("--commit", help="of a tree that came without its repository")


def device_of(chosen: argparse.Namespace) -> torch.device:
    device = torch.device(chosen.device)
    if device.type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return device


def backends_of(chosen: argparse.Namespace) -> list[str]:
    """The backends to look at; SystemExit if one that was asked for, or every one, is not live."""
    live = live_kernels(device_of(chosen))
    missing = set(chosen.backend or ()) - set(live)
    if missing or not live:
        raise SystemExit(f"not live: {sorted(missing) or 'any'}; {srn.available_backends()}")
    return [name for name in live if not chosen.backend or name in chosen.backend]


def run_parts(chosen: argparse.Namespace, parts: Iterable[Part]) -> int:
    """Prints and keeps every row as it comes; 1 if a part called ``fail``."""
    device = device_of(chosen)
    base = rows.environment(device, chosen.commit)
    failures: list[str] = []

    def fail(text: str) -> None:
        failures.append(text)
        print(f"FAILED {text}", flush=True)

    for part in parts:
        for row in part(device, base, fail):
            print(
                f"{row.workload} {row.mode}: {label((row.provider, row.rank_ratio))} "
                f"{row.metric} {row.p50:.4g} ({row.p20:.4g} to {row.p80:.4g})",
                flush=True,
            )
            if chosen.out:
                with chosen.out.open("a") as file:
                    file.write(json.dumps(asdict(row)) + "\n")
    return 1 if failures else 0
