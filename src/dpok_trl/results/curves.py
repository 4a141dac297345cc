"""The curves of a run, drawn from its `metrics.jsonl`."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # never pyplot: no backend is chosen, no window can open, no figure stays alive
from matplotlib.ticker import MaxNLocator

from dpok_trl.core.gaussian import Reduction


DOTS_PER_INCH = 170
PANEL = (3.5, 2.5)  # inches
MARGINS = {"left": 0.235, "right": 0.97, "bottom": 0.185, "top": 0.82}  # of a panel that stands alone
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

# Stand-ins that become CSS variables in an SVG: one drawing follows the reader's theme.
VARIABLES = {
    "#000001": "var(--paper)",
    "#000002": "var(--ink)",
    "#000003": "var(--faint)",
    "#000004": "var(--line)",
    "#000005": "var(--series-1)",
    "#000006": "var(--series-2)",
    "#000007": "var(--series-3)",
}
_PAPER, _INK, _FAINT, _GRID, *_SERIES = VARIABLES
OF_THE_PAGE = Theme(_PAPER, _INK, _FAINT, _GRID, (_SERIES[0], _SERIES[1], _SERIES[2]))

Lines = Sequence[dict[str, Any]]
Series = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Panel:
    """One diagram.

    Args:
        title (`str`)
        draw (`Callable[[Axes, Theme], None]`): Draws it, labels included.
        values (`np.ndarray`): The main series, to be told in words.
    """

    title: str
    draw: Callable[[Axes, Theme], None]
    values: np.ndarray

    def in_words(self) -> str:
        """The diagram for those who cannot see it."""
        finite = self.values[np.isfinite(self.values)]
        if not len(finite):
            return f"{self.title}: no value is finite."
        if len(finite) == 1:
            return f"{self.title}: {finite[0]:.3g}."
        return f"{self.title}: from {finite[0]:.3g} to {finite[-1]:.3g}, between {finite.min():.3g} and {finite.max():.3g}."


def column(metrics: Lines, x: str, y: str) -> Series:
    """`x` and `y` of the lines that hold both."""
    pairs = [(line[x], line[y]) for line in metrics if x in line and y in line]
    points = np.array(pairs, dtype=float).reshape(-1, 2)
    return points[:, 0], points[:, 1]


def standard_errors(metrics: Lines) -> Series:
    """Epochs, and the standard error of each one's mean reward: `reward_std` over the root of the images that count."""
    epochs, errors = [], []
    before = None  # images of all epochs so far; not known where a run was resumed in another folder
    for line in metrics:
        if "reward" in line and "reward_std" in line and "images" in line:
            known = before if before is not None else (0 if line["epoch"] == 0 else np.nan)
            counted = line["images"] - known - line.get("images_left_out", 0)
            before = line["images"]
            epochs.append(line["epoch"])
            errors.append(line["reward_std"] / np.sqrt(counted) if counted > 0 else np.nan)
    return np.array(epochs, dtype=float), np.array(errors, dtype=float)


# --- which panels there are -------------------------------------------------------------------------------------------


def panels_of(metrics: Lines, reduction: Reduction = "mean") -> list[Panel]:
    """A panel for everything that the lines hold, in the order of their importance. A single evaluation is no curve: it has its table.

    Args:
        metrics (`Sequence[dict]`): Lines of `metrics.jsonl`.
        reduction (`"mean"` or `"sum"`): That of the logged KL; it says which unit the KL has.
    """
    panels = []
    rewards = column(metrics, "epoch", "reward")[1]
    if len(rewards):
        panels.append(Panel("Reward while training", partial(_reward, metrics), rewards))
    panels += _evaluations(metrics)
    path = column(metrics, "epoch", "kl_path")[1]
    evaluated = _evaluated_kl(metrics)
    if len(path) or any(len(epochs) > 1 for epochs, _ in evaluated.values()):
        values = path if len(path) else next(iter(evaluated.values()))[1]
        panels.append(Panel("Path KL to the pretrained model", partial(_path_kl, metrics), values))
    nats = "nats per denoising step" if reduction == "sum" else "nats per step and dimension"
    of_updates = [
        ("kl", "KL to the reference", nats, 1.0),
        ("policy/clip_fraction", "Clipped transitions", "% of an optimizer step", 100.0),
        ("policy/mask_fraction", "Masked transitions", "% of an optimizer step", 100.0),
        ("policy/ratio_deviation_max", "Largest change of a ratio", "max |ratio − 1|", 1.0),
        ("sft/mse", "Squared error", "mean over dimensions", 1.0),
        ("kl_o", "Distance from the pretrained output", "squared, mean over dimensions", 1.0),
        ("grad_norm", "Gradient norm before clipping", "L2 norm", 1.0),
    ]
    for name, title, unit, scale in of_updates:
        values = column(metrics, "step", name)[1] * scale
        if len(values):
            panels.append(Panel(title, partial(_per_step, metrics, name, title, unit, scale), values))
    explained = column(metrics, "epoch", "value/explained_variance")[1]
    if len(explained):
        panels.append(Panel("Value function", partial(_explained_variance, metrics), explained))
    seconds = column(metrics, "epoch", "time/rollout")[1]
    if len(seconds):
        panels.append(Panel("Time per epoch", partial(_time, metrics), seconds))
    return panels


def _evaluations(metrics: Lines) -> list[Panel]:
    """One for each set of prompts and reward of the evaluations."""
    names = dict.fromkeys(name for line in metrics for name in line if name.startswith("eval/"))
    panels = []
    for name in names:
        what, _, part = name.rpartition("/")
        if part == "tuned":
            of_set, _, reward = what.removeprefix("eval/").partition("/")
            title = f"{reward} on {of_set}"
            values = column(metrics, "epoch", name)[1]
            if len(values) > 1:
                panels.append(Panel(title, partial(_base_and_tuned, metrics, what, title), values))
    return panels


def _evaluated_kl(metrics: Lines) -> dict[str, Series]:
    names = dict.fromkeys(name for line in metrics for name in line if re.fullmatch(r"eval/.+/kl", name))
    return {name.split("/")[1]: column(metrics, "epoch", name) for name in names}


# --- one panel --------------------------------------------------------------------------------------------------------


def _label(axes: Axes, title: str, x: str, y: str, note: str = "") -> None:
    """Between title and diagram is room for a legend or a note."""
    # with a place of its own: looking for one would take a quarter of the drawing time
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", pad=18, y=1.0)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if note:
        axes.annotate(note, (1, 1), (0, 5), "axes fraction", "offset points", ha="right", fontsize=7.5, color=axes.xaxis.label.get_color())  # fmt: skip


def _legend(axes: Axes) -> None:
    axes.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(-0.02, 0.98), borderaxespad=0, fontsize=7.5,
                handlelength=1.2, columnspacing=1.0)  # fmt: skip


def _reward(metrics: Lines, axes: Axes, theme: Theme) -> None:
    epochs, means = column(metrics, "epoch", "reward")
    axes.plot(epochs, means, color=theme.series[0], linewidth=1.8, marker="o", markersize=2.5)
    of_errors, errors = standard_errors(metrics)
    note = ""
    if np.array_equal(of_errors, epochs):
        axes.fill_between(epochs, means - errors, means + errors, color=theme.series[0], alpha=0.2, linewidth=0)
        note = "band: ± 1 standard error"
    marked = _mark_over_optimisation(metrics, axes, theme)
    _label(axes, "Reward while training", "epoch", "mean of the images", "" if marked else note)


def _base_and_tuned(metrics: Lines, what: str, title: str, axes: Axes, theme: Theme) -> None:
    axes.plot(*column(metrics, "epoch", f"{what}/base"), color=theme.faint, linewidth=1.4, linestyle="--", label="pretrained")  # fmt: skip
    axes.plot(*column(metrics, "epoch", f"{what}/tuned"), color=theme.series[0], linewidth=1.8, marker="o", markersize=2.5, label="tuned")  # fmt: skip
    _label(axes, title, "epoch", "mean over prompts")
    _mark_over_optimisation(metrics, axes, theme)
    _legend(axes)


def _mark_over_optimisation(metrics: Lines, axes: Axes, theme: Theme) -> bool:
    """Whether there was any."""
    epochs, found = column(metrics, "epoch", "eval/over_optimisation")
    for index, epoch in enumerate(epochs[found == 1]):
        label = "over-optimisation" if index == 0 else None
        axes.axvline(epoch, color=theme.series[1], linewidth=1.2, linestyle=":", label=label)
    marked = bool((found == 1).any())
    if marked:
        _legend(axes)
    return marked


def _path_kl(metrics: Lines, axes: Axes, theme: Theme) -> None:
    title = "Path KL to the pretrained model"
    path = column(metrics, "epoch", "kl_path")
    if len(path[0]):
        axes.plot(*path, color=theme.series[0], linewidth=1.8, label="while training")
    styles = [(color, marker) for marker in "osD" for color in theme.series[1:]]
    for (name, found), (color, marker) in zip(_evaluated_kl(metrics).items(), styles, strict=False):
        axes.plot(*found, color=color, linewidth=1.2, marker=marker, markersize=3, label=name)
    axes.set_ylim(bottom=0)
    _label(axes, title, "epoch", "nats")
    _legend(axes)


def _per_step(metrics: Lines, name: str, title: str, unit: str, scale: float, axes: Axes, theme: Theme) -> None:
    """Every optimizer step, pale, and the mean of each epoch over it."""
    steps, values = column(metrics, "step", name)
    values = values * scale
    color, note = theme.series[0], ""
    epochs = column([line for line in metrics if name in line], "step", "epoch")[1]
    if len(epochs) == len(steps) and len(np.unique(epochs)) < len(epochs):
        axes.plot(steps, values, color=color, alpha=0.35, linewidth=1)
        unique = np.unique(epochs)
        centres = [steps[epochs == epoch].mean() for epoch in unique]
        axes.plot(centres, [values[epochs == epoch].mean() for epoch in unique], color=color, linewidth=1.8)
        note = "bold: mean of an epoch"
    else:
        axes.plot(steps, values, color=color, linewidth=1.8)
    if np.isfinite(values).any() and np.nanmin(values) >= 0:
        axes.set_ylim(bottom=0)
    _label(axes, title, "optimizer step", unit, note)


def _explained_variance(metrics: Lines, axes: Axes, theme: Theme) -> None:
    axes.plot(*column(metrics, "epoch", "value/explained_variance"), color=theme.series[0], linewidth=1.8)
    axes.axhline(0, color=theme.faint, linewidth=1)
    _label(axes, "Value function", "epoch", "explained variance", "0: no better than the mean")


def _time(metrics: Lines, axes: Axes, theme: Theme) -> None:
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
    _label(axes, "Time per epoch", "epoch", "seconds")
    _legend(axes)


# --- pictures ---------------------------------------------------------------------------------------------------------


def draw_curves(metrics: Lines, reduction: Reduction = "mean", theme: Theme = LIGHT) -> bytes:
    """One figure with all panels.

    Args:
        metrics (`Sequence[dict]`): Lines of `metrics.jsonl`.
        reduction (`"mean"` or `"sum"`): That of the logged KL; it says which unit the KL has.
        theme ([`Theme`]): Light or dark.

    Returns:
        `bytes`: A PNG.

    Raises:
        `ValueError`: If no line holds a metric that is drawn.
    """
    panels = panels_of(metrics, reduction)
    if not panels:
        raise ValueError(f"none of the {len(metrics)} lines holds a metric that is drawn, such as reward or kl")
    with rc_context(_style(theme)):
        columns = min(COLUMNS, len(panels))
        rows = -(-len(panels) // columns)
        figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        for index, panel in enumerate(panels):
            _draw_panel(figure.add_subplot(rows, columns, index + 1), panel, theme)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    return buffer.getvalue()


def draw_panels(metrics: Lines, reduction: Reduction = "mean") -> list[str]:
    """Each panel as an `<svg>` element for a page, in the colours of the page's CSS variables (`--ink`, `--series-1` ...). Empty where nothing is drawn.

    Args:
        metrics (`Sequence[dict]`): Lines of `metrics.jsonl`.
        reduction (`"mean"` or `"sum"`): That of the logged KL.
    """
    return [_as_svg(panel, f"panel-{number}") for number, panel in enumerate(panels_of(metrics, reduction))]


def _as_svg(panel: Panel, salt: str) -> str:
    # ids of different panels must differ: they stand in one page
    style = {**_style(OF_THE_PAGE), "svg.fonttype": "none", "svg.hashsalt": salt, "svg.id": salt}
    with rc_context(style):
        figure = Figure(figsize=PANEL)
        figure.subplots_adjust(**MARGINS)
        _draw_panel(figure.add_subplot(), panel, OF_THE_PAGE)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'\bid="((?:figure|axes|text|patch|line2d|matplotlib\.axis|xtick|ytick|legend|FillBetween)[^"]*)"', "", text)  # fmt: skip
    text = re.sub(
        r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL
    )  # it would hold for the whole page
    text = text.replace("font-family: 'DejaVu Sans'", "font-family: inherit")
    for stand_in, variable in VARIABLES.items():
        text = text.replace(stand_in, variable)
    # drawn in points of the figure; on the page as wide as its cell
    text = re.sub(r'<svg (.*?)width="[^"]*" height="[^"]*"', r"<svg \1", text, count=1, flags=re.DOTALL)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(panel.in_words())}" ', 1)


def _draw_panel(axes: Axes, panel: Panel, theme: Theme) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    panel.draw(axes, theme)


def _style(theme: Theme) -> dict[str, Any]:
    return {
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
