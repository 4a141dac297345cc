"""How the figures of the experiments look."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, geometric_mean

import numpy as np
from intervals import Values, interval
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure


INK, FAINT, GRID = "#1c1e21", "#62676e", "#e4e7eb"
# Hues that differ in lightness too (Okabe and Ito, https://jfly.uni-koeln.de/color/).
COLORS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#7f7f7f", "#b8a400", "#1c1e21")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", "*")
STYLE = {
    "font.size": 8.5,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "svg.hashsalt": "dpok-trl",  # the same figure is the same file
    "svg.fonttype": "none",
}


def figure(columns: int, rows: int = 1, width: float = 2.9, height: float = 2.5) -> tuple[Figure, list[Axes]]:
    """Axes row by row; sizes are of one of them, in inches."""
    whole = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return whole, list(whole.subplots(rows, columns, squeeze=False).flat)


def legend_below(whole: Figure, axes: Axes, columns: int) -> None:
    """Of these axes, for all."""
    whole.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns, fontsize=7.5)


def save(plot: Callable[[], Figure], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context(STYLE):
        whole = plot()
        whole.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150, facecolor="white")


def point(axes: Axes, x: Values, y: Values, index: int, label: str | None = None) -> None:
    """Runs, faint, and their mean with its interval upwards and downwards (on a logarithmic axis the mean of x is the geometric one)."""
    style = {"color": COLORS[index % len(COLORS)], "marker": MARKERS[index % len(MARKERS)], "linestyle": "none"}
    axes.plot([x[key] for key in x], [y[key] for key in x], markersize=2.5, alpha=0.35, markeredgewidth=0, **style)
    found = interval(y)
    error = None if np.isnan(found.low) else [[found.mean - found.low], [found.high - found.mean]]
    middle = fmean(x.values()) if axes.get_xscale() == "linear" else geometric_mean(x.values())
    axes.errorbar(middle, found.mean, yerr=error, markersize=5, elinewidth=0.9, label=label, **style)


def curve(
    axes: Axes,
    runs: Sequence[Sequence[tuple[float, float]]],
    index: int,
    label: str | None = None,
) -> None:
    """Each run faint, and their mean; runs have the same x."""
    color = COLORS[index % len(COLORS)]
    for run in runs:
        axes.plot(*zip(*run, strict=True), color=color, linewidth=0.6, alpha=0.3)
    mean = [(points[0][0], fmean(y for _, y in points)) for points in zip(*runs, strict=True)]
    axes.plot(*zip(*mean, strict=True), color=color, linewidth=1.8, label=label)
