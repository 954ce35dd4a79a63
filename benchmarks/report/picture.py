"""The README's picture, as SVG: what normalising the weights takes, torch's way and this one.

Its colours follow the reader's light or dark scheme by themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from benchmarks.measure.store import Row
from benchmarks.report.tables import BRIEF_WORKLOADS, find, number

WIDTH, HEIGHT = 900, 348
COUNTED = "biggan_128_D_ch96"  # whose operators are drawn one by one
STYLE = """
  .back { fill: #ffffff; stroke: #d0d7de } .text { fill: #1f2328 } .faint { fill: #59636e }
  .theirs { fill: #8c959f } .ours { fill: #d55e00 }
  text { font: 14px system-ui, sans-serif } .title { font-weight: 600 } .small { font-size: 12px }
  @media (prefers-color-scheme: dark) {
    .back { fill: #161b22; stroke: #3d444d } .text { fill: #e6edf3 } .faint { fill: #9198a1 }
    .theirs { fill: #656c76 } .ours { fill: #ff8533 }
  }
"""


def _text(x: float, y: float, words: str, kind: str = "text", anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'


def _box(x: float, y: float, width: float, height: float, kind: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" class="{kind}"/>'


def _operators(rows: Sequence[Row]) -> Iterator[str]:
    """One square an operator."""
    step, columns, left = 8, 46, 28
    yield _text(left, 40, "Operators, forward and backward", "text title")
    yield _text(
        left, 60, f"to normalise the weights of a {BRIEF_WORKLOADS[COUNTED]}", "faint small"
    )
    y = 92.0
    for provider, words, kind in (
        ("torch_sn", "torch's spectral_norm, layer by layer", "theirs"),
        ("module", "srn_kernels, the whole model in one call", "ours"),
    ):
        row = find(rows, COUNTED, provider=provider, rank_ratio=1.0, metric="operators")
        if row is None:
            continue
        count = round(row.p50)
        yield _text(left, y, f"{words}: {count}")
        for i in range(count):
            at = left + step * (i % columns), y + 12 + step * (i // columns)
            yield _box(*at, step - 2, step - 2, kind)
        y += 12 + step * -(-count // columns) + 34


def _bars(rows: Sequence[Row]) -> Iterator[str]:
    """Two bars a model, torch's of full length."""
    left, full, y = 470, 260, 40
    yield _text(left, y, "Time, forward and backward of all weights", "text title")
    cores = next((r.cores for r in rows), 0)
    scale = f"each pair on its own scale; {cores} CPU cores, float32"
    yield _text(left, y + 20, scale, "faint small")
    y += 46
    for name, title in BRIEF_WORKLOADS.items():
        place = {"rank_ratio": 1.0, "mode": "forward_backward"}
        pair = [
            find(rows, name, **place, provider=p, metric="time_ms") for p in ("torch_sn", "module")
        ]
        times = find(rows, name, **place, provider="module", metric="speedup_over_torch_sn_x")
        if times is None or None in pair:
            continue
        yield _text(left, y, f"{title}: {times.p50:.1f} times faster")
        for row, kind in zip(pair, ("theirs", "ours"), strict=True):
            length = max(2.0, round(full * row.p50 / pair[0].p50, 1))
            yield _box(left, y + 8, length, 13, kind)
            yield _text(left + length + 8, y + 19, f"{number(row.p50)} ms", "faint small")
            y += 17
        y += 29


def savings(rows: Sequence[Row]) -> str:
    """The picture; empty where the store has nothing to draw."""
    drawn = [*_operators(rows), *_bars(rows)]
    if not any("<rect" in part for part in drawn):
        return ""
    words = "Normalising every weight of a model, by torch and in one call: operators and times"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{words}">'
    )
    frame = f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="8" class="back"/>'
    return "\n".join([head, f"<style>{STYLE}</style>", frame, *drawn, "</svg>"]) + "\n"
