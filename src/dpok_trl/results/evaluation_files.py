"""What an evaluation looks like: tables, JSON, and pictures of both models side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from dpok_trl.results.estimates import Estimate
from dpok_trl.results.pictures import pair_grid, stacked, to_pil
from dpok_trl.results.runlog import format_reward


if TYPE_CHECKING:  # it imports this module
    from dpok_trl.results.drawing import ModelSamples
    from dpok_trl.results.evaluation import Comparison, Evaluation


SHOWN_N = (2, 4, 16, 64)  # of the best of n: more columns do not fit on the page
TABLE_FILE, JSON_FILE, GRID_FILE = "evaluation.md", "evaluation.json", "grid.png"
SAMPLES_FOLDER, SAMPLES = "samples", 4  # pictures of each set that are kept one by one too: a gallery shows no grids

FOOTNOTE = (
    "Mean over prompts, or over the images of a single prompt, ± standard error; differences are paired by seed and noise. The path KL is KL(tuned ‖ pretrained) of whole denoising paths in nats, "
    "summed over stochastic steps. Diversity is the mean distance between two images of a prompt."
)


# --- tables -----------------------------------------------------------------------------------------------------------


def tables(evaluation: Evaluation) -> str:
    """All tables and notes of an evaluation, as Markdown that is aligned as text too."""
    parts = []
    for name, comparison in evaluation.sets.items():
        parts.append(aligned(score_rows(name, comparison)))
        best = best_of_rows(comparison)
        if best:
            parts.append(aligned(best))
        parts += notes(comparison)
    return "\n\n".join([*parts, FOOTNOTE])


def score_rows(name: str, comparison: Comparison) -> list[list[str]]:
    """The cells of the table of one set, header first."""
    prompts = len(comparison) // comparison.images_per_prompt
    header = f"{name}: {prompts} prompt{'s' if prompts > 1 else ''} × {comparison.images_per_prompt}, same seeds"
    rows = [[header, "pretrained", "tuned", "difference", "n"]]
    for reward in comparison.rewards:
        title = f"{reward} (held out)" if reward in comparison.held_out else reward
        for category in (None, *comparison.category_names):
            difference = comparison.difference(reward, category)
            found = (comparison.base_reward(reward, category), comparison.tuned_reward(reward, category))
            label = title if category is None else f"– {category}"
            rows.append([label, *map(str, found), signed(difference), str(difference.images)])
    rows.append(["path KL (nats)", "0", str(comparison.kl), "", str(comparison.kl.images)])
    if comparison.has_diversity:
        base, tuned, difference = comparison.diversity()
        rows.append(["diversity", str(base), str(tuned), signed(difference), str(difference.images)])
    return rows


def best_of_rows(comparison: Comparison) -> list[list[str]]:
    """The free baseline: the pretrained model's best of n images, by each reward. Empty with one image per prompt, or without rewards."""
    largest = max(map(comparison.largest_n, comparison.rewards), default=0)
    numbers = [n for n in SHOWN_N if n <= largest]
    if not numbers:
        return []
    rows = [["pretrained, best of n", "tuned is equal to", *(f"n = {n}" for n in numbers)]]
    for reward in comparison.rewards:
        cells = [str(comparison.best_of(reward, n)) if n <= comparison.largest_n(reward) else "–" for n in numbers]
        rows.append([reward, str(comparison.equivalent_n(reward)), *cells])
    return rows


def notes(comparison: Comparison) -> list[str]:
    """What the numbers of a table leave out."""
    said = []
    for reward in comparison.rewards:
        base, tuned = comparison.base.failed[reward], comparison.tuned.failed[reward]
        if base or tuned:
            said.append(
                f"{reward} is not finite for {base} of the {len(comparison)} pretrained and {tuned} of the tuned images: these pairs are left out of its numbers."
            )
    if comparison.images_per_prompt < 2:
        said.append("One image per prompt: there is no diversity and no best of n to tell.")
    elif not comparison.has_diversity:
        said.append("Videos: there is no diversity to tell.")
    return said


def signed(difference: Estimate) -> str:
    text = str(difference)
    return text if text.startswith(("-", "–")) else f"+{text}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns stand below each other as plain text too: the first to the left, numbers to the right."""
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for first, *others in (rows[0], rule, *rows[1:]):
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("| " + " | ".join([first.ljust(widths[0]), *cells]) + " |")
    return "\n".join(lines)


def about_list(evaluation: Evaluation) -> str:
    """What was evaluated, on what and with what, as a list in Markdown."""
    about, call = evaluation.about, dict(evaluation.call)
    model = about.get("model", "a policy")
    where = [f"{name} {about[name]}" for name in ("epoch", "step") if name in about]
    rows = [["model", ", ".join([model, *([about["checkpoint"]] if "checkpoint" in about else []), *where])]]
    if "base" in about:
        rows.append(["compared with", about["base"]])
    seeds = [f"{name} {min(one.seeds)}–{max(one.seeds)}" for name, one in evaluation.sets.items()]
    rows.append(["seeds", ", ".join(seeds)])
    rows += [[name, str(value)] for name, value in call.items()]
    if "date" in about:
        rows.append(["date", about["date"]])
    if "versions" in about:
        rows.append(["versions", ", ".join(f"{name} {version}" for name, version in about["versions"].items())])
    return "\n".join(f"* {name}: {value}" for name, value in rows)


# --- JSON -------------------------------------------------------------------------------------------------------------


def as_dict(evaluation: Evaluation) -> dict[str, Any]:
    """Everything but the pictures. What is not finite is `None`: JSON has no NaN, and 0 it is not."""
    sets = {name: _set_as_dict(name, comparison) for name, comparison in evaluation.sets.items()}
    return {"about": evaluation.about, "call": evaluation.call, "sets": sets}


def _set_as_dict(name: str, comparison: Comparison) -> dict[str, Any]:
    rewards = {}
    for reward in comparison.rewards:
        rewards[reward] = {
            "held_out": reward in comparison.held_out,
            **_parts(comparison, reward, None),
            "categories": {category: _parts(comparison, reward, category) for category in comparison.category_names},
            "best_of": {
                str(n): _estimate(comparison.best_of(reward, n)) for n in SHOWN_N if n <= comparison.largest_n(reward)
            },
            "equivalent_n": comparison.equivalent_n(reward).to_dict(),
            "nonfinite": {"base": comparison.base.failed[reward], "tuned": comparison.tuned.failed[reward]},
            "base_values": _values(comparison.base.scores[reward]),
            "tuned_values": _values(comparison.tuned.scores[reward]),
        }
    diversity = None
    if comparison.has_diversity:
        diversity = dict(zip(("base", "tuned", "difference"), map(_estimate, comparison.diversity()), strict=True))
    return {
        "images": len(comparison),
        "images_per_prompt": comparison.images_per_prompt,
        "prompts": comparison.prompts,
        "seeds": comparison.seeds,
        "categories": comparison.categories,
        "rewards": rewards,
        "path_kl": {**_estimate(comparison.kl), "values": _values(comparison.tuned.path_kl)},
        "diversity": diversity,
        "samples": {_sample_file(name, row): row for row in sample_rows(comparison)},
    }


def _parts(comparison: Comparison, name: str, category: str | None) -> dict[str, Any]:
    return {
        "base": _estimate(comparison.base_reward(name, category)),
        "tuned": _estimate(comparison.tuned_reward(name, category)),
        "difference": _estimate(comparison.difference(name, category)),
    }


def _estimate(estimate: Estimate) -> dict[str, Any]:
    return {
        "mean": _finite(estimate.mean),
        "standard_error": _finite(estimate.standard_error),
        "images": estimate.images,
        "prompts": estimate.prompts,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _values(values: torch.Tensor) -> list[float | None]:
    return [_finite(value) for value in values.tolist()]


# --- pictures and files -----------------------------------------------------------------------------------------------


def set_grid(name: str, comparison: Comparison) -> Image.Image:
    """The pairs of one set: pretrained over tuned, from the same seed."""
    reward = comparison.rewards[0] if comparison.rewards else None
    prompts = [comparison.prompts[row] for row in comparison.shown]
    one = len(set(comparison.prompts)) == 1
    captions = [
        (score_change(comparison, reward, row) if reward else "", "" if one else prompt)
        for row, prompt in zip(comparison.shown, prompts, strict=True)
    ]
    what = [f"{name}: {prompts[0] if one else f'{len(set(comparison.prompts))} prompts'}", "same seeds"]
    return pair_grid(
        (to_pil(comparison.base.pictures), to_pil(comparison.tuned.pictures)),
        ("pretrained", "tuned"),
        captions,
        "  ·  ".join([*what, *([reward] if reward else [])]),
    )


def score_change(comparison: Comparison, reward: str, row: int) -> str:
    def one(drawn: ModelSamples) -> str:
        value = drawn.scores[reward][row].item()
        return "–" if math.isnan(value) else format_reward(value)

    return f"{one(comparison.base)} → {one(comparison.tuned)}"


def evaluation_grid(evaluation: Evaluation) -> Image.Image:
    """All sets, one below the other."""
    return stacked([set_grid(name, comparison) for name, comparison in evaluation.sets.items()])


def sample_rows(comparison: Comparison) -> list[int]:
    """The rows whose tuned pictures are files of their own: of those that are shown, of different prompts where there are several."""
    first = {comparison.prompts[row]: row for row in reversed(comparison.shown)}.values()
    return sorted([*reversed(first), *(row for row in comparison.shown if row not in first)][:SAMPLES])


def _sample_file(name: str, row: int) -> str:
    return f"{SAMPLES_FOLDER}/{name}-{row:04d}.png"


def refuse_other_evaluation(folder: Path) -> None:
    """Raises `FileExistsError` for a folder that an evaluation is in already, or something in its place."""
    there = [name for name in (TABLE_FILE, JSON_FILE, GRID_FILE, SAMPLES_FOLDER) if (folder / name).exists()]
    if there:
        raise FileExistsError(
            f"{folder} holds another evaluation ({', '.join(there)}). Give a new folder with --output, or remove that one."
        )
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file. Give a folder with --output.")


def save(evaluation: Evaluation, folder: str | Path) -> Path:
    """Writes `evaluation.md`, `evaluation.json`, `grid.png`, and some pictures of the tuned model as `samples/*.png`. Returns the folder.

    Raises:
        `RuntimeError`: On a process that has no pictures.
    """
    if any(comparison.tuned.pictures is None for comparison in evaluation.sets.values()):
        raise RuntimeError(
            "the pictures of an evaluation are on the main process only: save it there (`if trainer.accelerator.is_main_process:`)."
        )
    folder = Path(folder)
    (folder / SAMPLES_FOLDER).mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(["# Tuned against pretrained", about_list(evaluation), tables(evaluation)])
    (folder / TABLE_FILE).write_text(f"{text}\n", encoding="utf-8")
    content = json.dumps(as_dict(evaluation), indent=1, default=str, allow_nan=False)
    (folder / JSON_FILE).write_text(content, encoding="utf-8")
    evaluation_grid(evaluation).save(folder / GRID_FILE)
    for name, comparison in evaluation.sets.items():
        rows = sample_rows(comparison)
        for row, picture in zip(comparison.shown, to_pil(comparison.tuned.pictures), strict=True):
            if row in rows:
                picture.save(folder / _sample_file(name, row))
    return folder
