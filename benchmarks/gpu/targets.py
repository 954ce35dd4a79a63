"""What the measurements of gpu-check are held against, and its summary for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol


class Ended(Protocol):
    """A stage's outcome."""

    stage: str
    state: str
    seconds: float
    tests: dict[str, int]
    advisory: bool


@dataclass(frozen=True)
class Target:
    """A bound on one measured number, on an H100 or H200."""

    workload: str
    mode: str
    metric: str
    bound: float
    at_most: bool


TARGETS = (
    Target("vit_b16", "forward", "device_over_copy_x", 1.25, True),
    Target("biggan_128_D_ch96", "forward", "device_over_copy_x", 1.25, True),
    Target("sngan_cifar_resnet_D", "forward", "step_speedup_over_torch_sn_x", 8.0, False),
    Target("real_esrgan_unet_D", "forward", "step_speedup_over_torch_sn_x", 8.0, False),
)


def target_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict]:
    """Of each target: the medians of every way to call our kernels."""
    found = []
    for target in TARGETS:
        values = {
            f"{r['provider']}@{r['rank_ratio']:g}": r["p50"]
            for r in rows
            if r["kind"] == "gpu"
            and (r["workload"], r["mode"], r["metric"])
            == (target.workload, target.mode, target.metric)
            and r["provider"].partition("_")[0] in ("functional", "module", "graph")
        }
        met = {
            k: v <= target.bound if target.at_most else v >= target.bound for k, v in values.items()
        }
        found.append({"kind": "target", **asdict(target), "values": values, "met": met})
    return found


def summary(
    ended: Sequence[Ended], waiting: Sequence[str], targets: Sequence[Mapping[str, Any]], place: str
) -> str:
    lines = [f"# gpu-check\n\n{place}\n", "| stage | state | s | tests |", "|---|---|---|---|"]
    for o in ended:
        tests = ", ".join(f"{n} {name.lower()}" for name, n in sorted(o.tests.items()))
        state = f"{o.state} (advisory)" if o.advisory else o.state
        lines.append(f"| {o.stage} | {state} | {o.seconds:.0f} | {tests} |")
    lines += [f"| {name} | waits | | |" for name in waiting]
    for t in targets:
        sign = "at most" if t["at_most"] else "at least"
        values = ", ".join(f"{k} {v:.2f}" for k, v in t["values"].items()) or "not measured"
        what = f"{t['workload']} {t['mode']} {t['metric']} {sign} {t['bound']}"
        lines.append(f"\n{what}: {values}")
    return "\n".join(lines) + "\n"
