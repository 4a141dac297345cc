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
from dpok_trl.results.evaluation import Comparison, Evaluation
from dpok_trl.results.evaluation_files import best_of_rows, notes, score_change, score_rows
from dpok_trl.results.pictures import PAIR_COLUMNS, to_pil
from dpok_trl.results.runlog import METRICS_FILE, format_reward, read_metrics


REPORT_FILE = "report.html"
LARGEST_PICTURE = 256  # pixels on the page; a page of 32 pictures of 1024 pixels would weigh 60 MB
SMALL_PICTURE = 128  # pixels; up to here a picture is shown with square pixels instead of being blurred


def write_report(
    run_folder: str | Path,
    title: str,
    *,
    evaluation: Evaluation | None = None,
    summary: str = "",
    command: str | None = None,
    config: Mapping[str, Any] | None = None,
    facts: Mapping[str, str] | None = None,
    reduction: Reduction = "mean",
    device: str | torch.device = "cpu",
) -> Path:
    """Writes `report.html`, and `curves.png` and the files of the evaluation beside it.

    The page is one file: pictures are in it, it loads nothing, runs no script, and follows the reader's light or dark setting.

    Args:
        run_folder (`str` or `Path`): Where the files go; the curves are drawn from the `metrics.jsonl` in it, if there is one.
        title (`str`)
        evaluation ([`Evaluation`], *optional*): Gives the scores and the pictures before and after.
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
        "sets": [],
        "curves_light": None,
    }
    if evaluation is not None:
        values["tiles"] = _tiles(evaluation)
        values["sets"] = [_set_values(name, comparison) for name, comparison in evaluation.sets.items()]
        evaluation.save(folder)
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


def _tiles(evaluation: Evaluation) -> list[tuple[str, str]]:
    """The large numbers at the top: of the first set."""
    comparison = next(iter(evaluation.sets.values()))
    tiles = []
    for name in comparison.rewards:
        before, after = comparison.base_reward(name).mean, comparison.tuned_reward(name).mean
        tiles.append((f"{format_reward(before)} → {format_reward(after)}", name))
    return [*tiles, (f"{comparison.kl.mean:.3g} nats", "path KL to pretrained")]


def _set_values(name: str, comparison: Comparison) -> dict[str, Any]:
    reward = comparison.rewards[0] if comparison.rewards else None
    befores, afters = to_pil(comparison.base.pictures), to_pil(comparison.tuned.pictures)
    pairs = [
        {
            "before": _picture_uri(before),
            "after": _picture_uri(after),
            "small": max(before.size) <= SMALL_PICTURE,
            "prompt": comparison.prompts[row],
            "seed": comparison.seeds[row],
            "score": score_change(comparison, reward, row) if reward else "",
        }
        for row, before, after in zip(comparison.shown, befores, afters, strict=True)
    ]
    several = len(set(comparison.prompts)) > 1
    note = "Each column is one seed. "
    if len(pairs) < len(comparison):
        note += f"{len(pairs)} of the {len(comparison)} pairs, evenly spaced, not selected. "
    if not several:
        note += f"Prompt: “{comparison.prompts[0]}”. "
    if reward:
        note += f"Below each pair: {reward}."
    return {
        "name": name,
        "tables": [rows for rows in (score_rows(name, comparison), best_of_rows(comparison)) if rows],
        "notes": notes(comparison),
        "pairs": pairs,
        "pairs_note": note,
        "several_prompts": several,
        "columns": min(PAIR_COLUMNS, len(pairs)),
    }


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
