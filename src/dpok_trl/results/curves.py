"""The curves of a run, drawn from its `metrics.jsonl`."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # never pyplot: no backend is chosen, no window can open, no figure stays alive
from matplotlib.ticker import MaxNLocator

from dpok_trl.core.gaussian import Reduction


DOTS_PER_INCH = 170
PANEL = (3.5, 2.5)  # inches
COLUMNS = 3


@dataclass(frozen=True)
class Theme:
    """Colours of a figure; the page's own, so that a picture has no border on it."""

    paper: str
    ink: str
    faint: str
    grid: str
    series: tuple[str, str, str]


# Blue, orange and green that differ in lightness too, for readers who do not tell hues apart.
LIGHT = Theme("#ffffff", "#1c1e21", "#62676e", "#e4e7eb", ("#2563c9", "#e08a1e", "#4aa96c"))
DARK = Theme("#16181c", "#e8eaed", "#9aa1ab", "#30343b", ("#6ea3f5", "#f0a94a", "#74cf95"))

Series = tuple[np.ndarray, np.ndarray]


def column(metrics: Sequence[dict[str, Any]], x: str, y: str) -> Series:
    """`x` and `y` of the lines that hold both."""
    pairs = [(line[x], line[y]) for line in metrics if x in line and y in line]
    points = np.array(pairs, dtype=float).reshape(-1, 2)
    return points[:, 0], points[:, 1]


def draw_curves(metrics: Sequence[dict[str, Any]], reduction: Reduction = "mean", theme: Theme = LIGHT) -> bytes:
    """One figure with a panel for everything the run has logged.

    Args:
        metrics (`Sequence[dict]`): Lines of `metrics.jsonl`.
        reduction (`"mean"` or `"sum"`): That of the logged KL; it says which unit the KL has.
        theme ([`Theme`]): Light or dark.

    Returns:
        `bytes`: A PNG.

    Raises:
        `ValueError`: If no line holds a metric that is drawn.
    """
    nats = "nats per denoising step" if reduction == "sum" else "nats per step and latent dimension"
    panels: list[Callable[[Axes], None]] = []
    if len(column(metrics, "epoch", "reward")[0]):
        panels.append(lambda axes: _reward(axes, metrics, theme))
    for name, title, unit, scale in (
        ("kl", "KL to the pretrained model", nats, 1.0),
        ("policy/ratio_deviation_max", "Largest change of a ratio", "max |ratio − 1|", 1.0),
        ("policy/clip_fraction", "Clipped transitions", "% of an optimizer step", 100.0),
        ("grad_norm", "Gradient norm before clipping", "L2 norm", 1.0),
    ):
        if len(column(metrics, "step", name)[0]):
            panels.append(lambda axes, a=(name, title, unit, scale): _per_step(axes, metrics, theme, *a))
    if len(column(metrics, "epoch", "time/rollout")[0]):
        panels.append(lambda axes: _time(axes, metrics, theme))
    if not panels:
        raise ValueError(f"none of the {len(metrics)} lines holds a metric that is drawn, such as reward or kl")

    style = {
        "font.family": "DejaVu Sans",
        "font.size": 8.5,
        "text.color": theme.ink,
        "axes.labelcolor": theme.faint,
        "axes.edgecolor": theme.grid,
        "axes.facecolor": theme.paper,
        "figure.facecolor": theme.paper,
        "xtick.color": theme.faint,
        "ytick.color": theme.faint,
        "axes.grid": True,
        "grid.color": theme.grid,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with rc_context(style):
        columns = min(COLUMNS, len(panels))
        rows = -(-len(panels) // columns)
        figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        for index, panel in enumerate(panels):
            axes = figure.add_subplot(rows, columns, index + 1)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            panel(axes)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    return buffer.getvalue()


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", pad=8)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def _reward(axes: Axes, metrics: Sequence[dict[str, Any]], theme: Theme) -> None:
    epochs, means = column(metrics, "epoch", "reward")
    color = theme.series[0]
    axes.plot(epochs, means, color=color, linewidth=1.8, marker="o", markersize=2.5)
    with_std, stds = column(metrics, "epoch", "reward_std")
    if len(with_std) == len(epochs):
        axes.fill_between(epochs, means - stds, means + stds, color=color, alpha=0.16, linewidth=0)
    _label(axes, "Reward while training", "epoch", "mean of the epoch's images\n(band: ± 1 std of the images)")


def _per_step(
    axes: Axes, metrics: Sequence[dict[str, Any]], theme: Theme, name: str, title: str, unit: str, scale: float
) -> None:
    """Every optimizer step, pale, and the mean of each epoch over it."""
    steps, values = column(metrics, "step", name)
    values = values * scale
    color = theme.series[0]
    epochs = column([line for line in metrics if name in line], "step", "epoch")[1]
    if len(epochs) == len(steps) and len(np.unique(epochs)) < len(epochs):
        axes.plot(steps, values, color=color, alpha=0.35, linewidth=1)
        unique = np.unique(epochs)
        centres = [steps[epochs == epoch].mean() for epoch in unique]
        axes.plot(centres, [values[epochs == epoch].mean() for epoch in unique], color=color, linewidth=1.8)
        unit += "\n(bold: mean of an epoch)"
    else:
        axes.plot(steps, values, color=color, linewidth=1.8)
    if np.isfinite(values).any() and np.nanmin(values) >= 0:
        axes.set_ylim(bottom=0)
    _label(axes, title, "optimizer step", unit)


def _time(axes: Axes, metrics: Sequence[dict[str, Any]], theme: Theme) -> None:
    parts = [("rollout", "sampling"), ("reward", "reward"), ("update", "updates")]
    by_epoch: dict[float, dict[str, float]] = {}
    for part, _ in parts:
        for epoch, seconds in zip(*column(metrics, "epoch", f"time/{part}"), strict=True):
            by_epoch.setdefault(epoch, {})[part] = seconds
    epochs = [epoch for epoch, seconds in by_epoch.items() if len(seconds) == len(parts)]
    bottom = np.zeros(len(epochs))
    for (part, label), color in zip(parts, theme.series, strict=True):
        seconds = np.array([by_epoch[epoch][part] for epoch in epochs])
        axes.bar(epochs, seconds, bottom=bottom, color=color, width=0.8, label=label)
        bottom += seconds
    axes.grid(axis="x", visible=False)
    axes.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(-0.02, 0.98), borderaxespad=0, fontsize=7.5,
                handlelength=0.9, columnspacing=1.0)  # fmt: skip
    _label(axes, "Time per epoch", "epoch", "seconds")
    axes.set_title("Time per epoch", loc="left", fontsize=10, fontweight="bold", pad=18)
