"""The look of all pictures.

Colours are Okabe and Ito's, distinguishable with every common colour-vision deficiency.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#595959"
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}
_DPI = 150


@contextmanager
def figure(
    target: Path | io.BytesIO, rows: int, columns: int, size: tuple[float, float], **keywords
) -> Iterator[tuple[Figure, np.ndarray]]:
    """A figure in this style, saved as PNG into ``target`` when the block ends."""
    if isinstance(target, Path):
        target.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        drawn, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, **keywords)
        try:
            yield drawn, axes
            drawn.savefig(target, dpi=_DPI, format="png")
        finally:
            plt.close(drawn)


def cycle() -> Iterator[str]:
    """Colours without end."""
    while True:
        yield from COLOURS
