"""What a run looks like: one HTML page that needs nothing but itself, made from the files in the run's folder."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from dpok_trl import __version__
from dpok_trl.core.gaussian import Reduction
from dpok_trl.results.curves import DARK, LIGHT, draw_curves, draw_panels
from dpok_trl.results.evaluation_files import best_of_rows, notes, score_change, score_rows
from dpok_trl.results.pictures import to_pil
from dpok_trl.results.provenance import machine, versions
from dpok_trl.results.runlog import METRICS_FILE, format_reward, read_metrics
from dpok_trl.results.samples import png, read_samples, sampled_epochs, smaller


if TYPE_CHECKING:  # it imports diffusers, which the page of a folder has no need of
    from dpok_trl.results.evaluation import Comparison, Evaluation


REPORT_FILE = "report.html"
CONTENT_FILE = "report.json"
LARGEST_PICTURE = 256  # pixels on the page; a page of 32 pictures of 1024 pixels would weigh 60 MB
SMALL_PICTURE = 128  # pixels; up to here a picture is shown with square pixels instead of being blurred
SAMPLES_SHOWN = 8  # of an epoch


def write_report(
    run_folder: str | Path,
    title: str | None = None,
    *,
    evaluation: Evaluation | None = None,
    summary: str | None = None,
    command: str | None = None,
    config: Mapping[str, Any] | None = None,
    facts: Mapping[str, str] | None = None,
    reduction: Reduction | None = None,
    device: str | torch.device | None = None,
) -> Path:
    """Writes `report.html`, and `curves.png` and the files of the evaluation beside it.

    The page is one file: pictures are in it, it loads nothing, runs no script, and follows the reader's light or dark setting. Curves and samples come
    from `metrics.jsonl` and `samples.parquet`; all else is kept in `report.json`, so that [`render_report`] can make the page again from the folder
    alone. What is not given stays as it was there.

    Args:
        run_folder (`str` or `Path`): Where the files go.
        title (`str`, *optional*): By default the name of the folder.
        evaluation ([`Evaluation`], *optional*): Gives the scores and the pictures before and after.
        summary (`str`, *optional*): A sentence or two under the title.
        command (`str`, *optional*): What to type for the same run.
        config (`Mapping[str, Any]`, *optional*): Every setting.
        facts (`Mapping[str, str]`, *optional*): Further rows about the run, such as its wall time.
        reduction (`"mean"` or `"sum"`, *optional*): Of the KL in `metrics.jsonl`, for its unit. By default `"mean"`.
        device (`str` or `torch.device`, *optional*): Where the run took place; versions and machine are told with it.

    Returns:
        `Path`: The page.
    """
    describe_run(
        run_folder,
        title=title,
        evaluation=evaluation,
        summary=summary,
        command=command,
        config=config,
        facts=facts,
        reduction=reduction,
        device=device,
    )
    folder = Path(run_folder)
    if evaluation is not None:
        evaluation.save(folder)
    if (folder / METRICS_FILE).exists():
        (folder / "curves.png").write_bytes(draw_curves(read_metrics(folder), reduction or "mean"))
    return render_report(folder)


def describe_run(
    run_folder: str | Path,
    *,
    evaluation: Evaluation | None = None,
    device: str | torch.device | None = None,
    **said: Any,
) -> None:
    """Keeps in `report.json` what no other file of the run says; see [`write_report`] for what it takes. Makes no page."""
    folder = Path(run_folder)
    content = _read_content(folder)
    content.update({name: value for name, value in said.items() if value is not None and name != "config"})
    if said.get("config") is not None:
        content["config"] = {name: str(value) for name, value in said["config"].items()}
    if device is not None:
        found = versions()
        content["environment"] = {
            "Versions": ", ".join(f"{name} {version}" for name, version in found.items()),
            "Machine": f"{machine(torch.device(device))}; {os.cpu_count()} cores",
        }
    if evaluation is not None:
        content["tiles"] = _tiles(evaluation)
        content["sets"] = [_set_values(name, comparison) for name, comparison in evaluation.sets.items()]
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{CONTENT_FILE}.tmp"
    temporary.write_text(json.dumps(content, default=str), encoding="utf-8")
    os.replace(temporary, folder / CONTENT_FILE)


def render_report(run_folder: str | Path, page: str | Path | None = None) -> Path:
    """Makes the page from what the folder holds. No model is loaded.

    Args:
        run_folder (`str` or `Path`)
        page (`str` or `Path`, *optional*): Default: `report.html` in the folder.

    Returns:
        `Path`: The page.

    Raises:
        `FileNotFoundError`: If the folder is not there, or holds no run.
        `ValueError`: If `metrics.jsonl` is damaged; see [`read_metrics`].
    """
    folder = Path(run_folder)
    has_metrics = (folder / METRICS_FILE).exists()
    if not has_metrics and not (folder / CONTENT_FILE).exists():
        what = f"it holds neither {METRICS_FILE} nor {CONTENT_FILE}" if folder.is_dir() else "there is no such folder"
        raise FileNotFoundError(f"{folder} is no run: {what}. Give the output_dir of a run.")
    content = _read_content(folder)
    metrics = read_metrics(folder) if has_metrics else []
    values = {
        "title": content.get("title") or folder.resolve().name,
        "summary": content.get("summary"),
        "command": content.get("command"),
        "config": list(content.get("config", {}).items()),
        "facts": [
            *content.get("facts", {}).items(),
            *_progress(metrics).items(),
            *content.get("environment", {}).items(),
        ],
        "tiles": content.get("tiles", []),
        "sets": content.get("sets", []),
        "samples": _samples(folder),
        "panels": [
            Markup(panel) for panel in draw_panels(metrics, content.get("reduction", "mean"))
        ],  # drawn here, not text of others
        "version": __version__,
        "light": LIGHT,
        "dark": DARK,
    }
    templates = Environment(
        loader=PackageLoader("dpok_trl.results"),
        autoescape=True,  # prompts and paths may hold anything
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    page = folder / REPORT_FILE if page is None else Path(page)
    temporary = page.with_name(f"{page.name}.tmp")  # a reader, or a run that is killed here, never has half a page
    temporary.write_text(templates.get_template("report.html.j2").render(values), encoding="utf-8")
    os.replace(temporary, page)
    return page


def _read_content(folder: Path) -> dict[str, Any]:
    path = folder / CONTENT_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _progress(metrics: list[dict[str, Any]]) -> dict[str, str]:
    """How far the run has come, and in which time."""
    if not metrics:
        return {}
    epochs = {line["epoch"] for line in metrics if "epoch" in line}
    begin = min(epochs, default=0)
    done = max(epochs, default=-1) + 1
    here = f" (epochs {begin} to {done - 1} are in this folder, the first of the run is 0)" if begin else ""
    said = [
        f"{done} epoch{'s' if done != 1 else ''}{here}",
        f"{max(line['step'] for line in metrics):,} optimizer steps",
    ]
    images = [line["images"] for line in metrics if "images" in line]
    rows = {"Training": ", ".join([*said, *([f"{max(images):,} images"] if images else [])])}
    seconds = sum(value for line in metrics for name, value in line.items() if name.startswith("time/"))
    name = "Time in all phases of these epochs" if begin else "Time in all phases"
    return {**rows, name: f"{seconds:,.0f} s"} if seconds else rows


def _samples(folder: Path) -> list[dict[str, Any]]:
    """Pictures of the first and of the last sampled epoch."""
    epochs = sampled_epochs(folder)
    shown = []
    for epoch in sorted({*epochs[:1], *epochs[-1:]}):
        rows = read_samples(folder, epoch)[:SAMPLES_SHOWN]
        pictures = [
            {
                "source": _picture_uri(row["image"]),
                "small": max(row["image"].size) <= SMALL_PICTURE,
                "prompt": row["prompt"],
                "reward": format_reward(row["reward"]),
            }
            for row in rows
        ]
        shown.append({"epoch": epoch, "pictures": pictures})
    return shown


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
    note = "Above the pretrained model, below the tuned one, from the same seed. "
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
    }


def _picture_uri(picture: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(png(smaller(picture, LARGEST_PICTURE))).decode()
