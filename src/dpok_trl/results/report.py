"""What a run looks like: one HTML page that needs nothing but itself, and its pictures as files."""

from __future__ import annotations

import base64
import importlib.metadata
import io
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from dpok_trl import __version__
from dpok_trl.core.gaussian import Reduction
from dpok_trl.results.curves import DARK, LIGHT, draw_curves
from dpok_trl.results.evaluation import Comparison
from dpok_trl.results.pictures import picture_grid, to_pil
from dpok_trl.results.runlog import METRICS_FILE, format_reward, read_metrics


REPORT_FILE = "report.html"
PAIRS = 16  # before/after pairs on the page
COLUMNS = 8
LARGEST_PICTURE = 256  # pixels on the page; a page of 32 pictures of 1024 pixels would weigh 60 MB
SMALL_PICTURE = 128  # pixels; up to here a picture is shown with square pixels instead of being blurred


def write_report(
    run_folder: str | Path,
    title: str,
    *,
    comparison: Comparison | None = None,
    summary: str = "",
    command: str | None = None,
    config: Mapping[str, Any] | None = None,
    facts: Mapping[str, str] | None = None,
    reduction: Reduction = "mean",
    device: str | torch.device = "cpu",
) -> Path:
    """Writes `report.html`, and `before-after.png` and `curves.png` beside it.

    The page is one file: pictures are in it, it loads nothing, runs no script, and follows the reader's light or dark setting.

    Args:
        run_folder (`str` or `Path`): Where the files go; the curves are drawn from the `metrics.jsonl` in it, if there is one.
        title (`str`)
        comparison ([`Comparison`], *optional*): Gives the scores and the pictures before and after.
        summary (`str`, *optional*): A sentence or two under the title.
        command (`str`, *optional*): What to type for the same run.
        config (`Mapping[str, Any]`, *optional*): Every setting.
        facts (`Mapping[str, str]`, *optional*): Further rows about the run, such as its wall time; versions and machine are added.
        reduction (`"mean"` or `"sum"`): Of the KL in `metrics.jsonl`, for its unit.
        device (`str` or `torch.device`): Where the run took place.

    Returns:
        `Path`: The page.
    """
    folder = Path(run_folder)
    values: dict[str, Any] = {
        "title": title,
        "summary": summary,
        "command": command,
        "config": [(name, str(value)) for name, value in (config or {}).items()],
        "facts": [*(facts or {}).items(), *environment(torch.device(device)).items()],
        "version": __version__,
        "light": LIGHT,
        "dark": DARK,
        "tiles": [],
        "rows": [],
        "pairs": [],
        "curves_light": None,
    }
    if comparison is not None:
        values.update(_comparison_values(comparison))
        _before_after(comparison).save(folder / "before-after.png")
    if (folder / METRICS_FILE).exists():
        metrics = read_metrics(folder)
        curves = draw_curves(metrics, reduction, LIGHT)
        (folder / "curves.png").write_bytes(curves)
        values["curves_light"] = _data_uri(curves)
        values["curves_dark"] = _data_uri(draw_curves(metrics, reduction, DARK))
        values["curves_alt"] = _in_words(metrics)
    templates = Environment(
        loader=PackageLoader("dpok_trl.results"),
        autoescape=True,  # prompts and paths may hold anything
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    page = folder / REPORT_FILE
    page.write_text(templates.get_template("report.html.j2").render(values), encoding="utf-8")
    return page


def environment(device: torch.device) -> dict[str, str]:
    """Versions and machine, as rows for the page."""
    names = ("torch", "diffusers", "transformers", "accelerate", "peft")
    if device.type == "cuda":
        what = torch.cuda.get_device_name(device)
    else:
        threads = torch.get_num_threads()
        what = f"{device.type.upper()}, {threads} thread{'s' if threads > 1 else ''}"
    return {
        "Versions": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names),
        "Machine": f"{what}; {os.cpu_count()} cores, {platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }


def _comparison_values(comparison: Comparison) -> dict[str, Any]:
    names = list(comparison.tuned_scores)
    tiles = [
        (f"{format_reward(comparison.base(name).mean)} → {format_reward(comparison.tuned(name).mean)}", name)
        for name in names
    ]
    tiles.append((f"{comparison.kl.mean:.3g} nats", "path KL to pretrained"))
    shown = _shown(comparison)
    befores = to_pil(comparison.base_images[shown])
    afters = to_pil(comparison.tuned_images[shown])
    pairs = [
        {
            "before": _picture_uri(before),
            "after": _picture_uri(after),
            "small": max(before.size) <= SMALL_PICTURE,
            "prompt": comparison.prompts[index],
            "seed": comparison.seeds[index],
            "score": _score_change(comparison, names[0], index) if names else "",
        }
        for index, before, after in zip(shown, befores, afters, strict=True)
    ]
    several = len(set(comparison.prompts)) > 1
    note = "Each column is one seed. "
    if len(pairs) < len(comparison):
        note += f"{len(pairs)} of the {len(comparison)} pairs, evenly spaced, not selected. "
    if not several:
        note += f"Prompt: “{comparison.prompts[0]}”. "
    if names:
        note += f"Below each pair: {names[0]}."
    return {
        "tiles": tiles,
        "rows": comparison.rows(),
        "pairs": pairs,
        "pairs_note": note,
        "several_prompts": several,
        "columns": min(COLUMNS, len(pairs)),
    }


def _shown(comparison: Comparison) -> list[int]:
    """Rows of the pairs on the page: evenly spaced, so that every prompt is there and nobody has chosen."""
    number = len(comparison)
    if number > COLUMNS:
        number = min(PAIRS, number // COLUMNS * COLUMNS)  # whole rows
    return [index * len(comparison) // number for index in range(number)]


def _score_change(comparison: Comparison, name: str, index: int) -> str:
    before, after = comparison.base_scores[name][index], comparison.tuned_scores[name][index]
    return f"{format_reward(before.item())} → {format_reward(after.item())}"


def _before_after(comparison: Comparison) -> Image.Image:
    """Rows of pretrained pictures, each over the row of the tuned ones from the same seeds."""
    shown = _shown(comparison)
    name = next(iter(comparison.tuned_scores), None)
    pictures, captions = [], []
    for start in range(0, len(shown), COLUMNS):
        rows = shown[start : start + COLUMNS]
        for what, images, scores in (
            ("pretrained", comparison.base_images, comparison.base_scores),
            ("tuned", comparison.tuned_images, comparison.tuned_scores),
        ):
            pictures += to_pil(images[rows])
            captions += [(f"{what}  {format_reward(scores[name][row].item())}" if name else what, "") for row in rows]
    prompts = list(dict.fromkeys(comparison.prompts))
    title = prompts[0] if len(prompts) == 1 else f"{len(prompts)} prompts"
    return picture_grid(pictures, captions, min(COLUMNS, len(shown)), f"{title}  ·  same seeds, {name or 'no score'}")


def _in_words(metrics: list[dict[str, Any]]) -> str:
    """The curves for those who cannot see them."""
    rewards = [line["reward"] for line in metrics if "reward" in line]
    if not rewards:
        return "Training curves"
    return f"Training curves. The mean reward goes from {rewards[0]:.3g} in the first of {len(rewards)} epochs to {rewards[-1]:.3g} in the last."


def _picture_uri(picture: Image.Image) -> str:
    picture = picture.copy()
    picture.thumbnail((LARGEST_PICTURE, LARGEST_PICTURE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return _data_uri(buffer.getvalue())


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
