"""What a run writes down while it goes: `metrics.jsonl`, `config.yaml`, `samples/` and `samples.parquet`, with or without a tracker."""

from __future__ import annotations

import json
import math
import numbers
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from dpok_trl.results.pictures import picture_grid, to_pil
from dpok_trl.results.samples import Samples, epoch_files, write_samples


METRICS_FILE = "metrics.jsonl"
CONFIG_FILE = "config.yaml"
SECRET = re.compile(r"(?i)(api_?key|token|secret|password)s?$")  # names of settings whose values nobody else may see


class RunLog:
    """The files of one run. In several processes, only the main one may make it.

    Args:
        folder (`str` or `Path`): The run's folder; made if missing. A torn last line of an interrupted run is cut off, so that new lines do
            not run into it.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / METRICS_FILE
        self.arguments: dict[str, Any] = {}  # of the script, which stand in `config.yaml` before the settings
        if self.path.exists():
            content = self.path.read_bytes()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                os.truncate(self.path, whole)

    def log(self, metrics: Mapping[str, float | int], step: int) -> None:
        """Appends one line, `{"step": step, **metrics}`, which is on disk for other readers when this returns.

        A value that is not finite is written as what it is, `NaN`, `Infinity` or `-Infinity`: Python's `json` reads these tokens back,
        though the JSON standard does not know them. It is never written as 0 or left out.

        Raises:
            `TypeError`: For a value that is not a number.
            `ValueError`: For a `"step"` in `metrics` other than `step`.
        """
        if metrics.get("step", step) != step:
            raise ValueError(f"metrics say step {metrics['step']}, but they are logged for step {step}")
        line: dict[str, float | int] = {"step": step}
        for name, value in metrics.items():
            if not isinstance(value, numbers.Real):
                raise TypeError(f"the metric {name} must be a number, got {value!r} of type {type(value).__name__}")
            line[name] = int(value) if isinstance(value, numbers.Integral) else float(value)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def keep_epochs(self, epochs: int, step: int) -> None:
        """Keeps the lines of the first `epochs` epochs, which ended at `step`: a resumed run is about to write the later ones again. All or
        nothing, whenever it is interrupted. By epoch and not by step, for an epoch's sampling is logged at the step at which the one before
        ended; a line without an epoch (from a user's hook, which is called there) is kept if it is from before that step. Samples of the
        later epochs go too."""
        for epoch, path in epoch_files(self.folder):
            if epoch >= epochs:
                path.unlink()
        if not self.path.exists():
            return
        kept = [
            json.dumps(line) + "\n"
            for line in read_metrics(self.folder)
            if (line["epoch"] < epochs if "epoch" in line else line["step"] < step)
        ]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, self.path)

    def log_samples(self, samples: Samples) -> Image.Image:
        """Writes `samples/epoch-0007.png`, a grid with reward and prompt of each picture, and `samples.parquet/epoch-0007.parquet`. Returns the grid."""
        title = f"epoch {samples.epoch}"
        heads = [format_reward(reward) for reward in samples.rewards]
        if len(set(samples.prompts)) == 1:  # the prompt stands once, over the grid
            title = f"{samples.prompts[0]}  ·  {title}"
            captions = [(head, "") for head in heads]
        else:
            captions = list(zip(heads, samples.prompts, strict=True))
        columns = 4 if len(samples) <= 8 else 8
        grid = picture_grid(samples.pictures, captions, columns, title)
        folder = self.folder / "samples"
        folder.mkdir(exist_ok=True)
        grid.save(folder / f"epoch-{samples.epoch:04d}.png")
        write_samples(self.folder, samples)
        return grid

    def write_config(self, settings: Mapping[str, Any]) -> None:
        """Writes `config.yaml`, which `TrlParser` reads by `--config`. Secrets are left out, and objects that no file can hold (a picture in `sample_call_kwargs`); a
        comment names the latter.

        Args:
            settings (`Mapping[str, Any]`): Of the config, nested as its fields are.
        """
        kept, left_out = _writable(without_secrets({**self.arguments, **settings}))
        content = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=120)
        if left_out:
            content = (
                f"# Not in this file, which cannot hold them: {', '.join(left_out)}. Give them in Python.\n{content}"
            )
        temporary = self.folder / f"{CONFIG_FILE}.tmp"
        temporary.write_text(content, encoding="utf-8")
        os.replace(temporary, self.folder / CONFIG_FILE)

    def log_images(self, values: Mapping[str, Any], step: int | None = None) -> None:
        """Writes PNGs to `samples/hook/`: what DDPO's image hooks call on a tracker, for a run without one.

        Args:
            values (`Mapping[str, Any]`): A name and images, as accelerate's trackers take them: tensors `(3, H, W)` or `(B, 3, H, W)`, arrays of these shapes or
                `(H, W, 3)` or `(B, H, W, 3)`, in [0, 1] or uint8; `PIL.Image.Image`; or a list of any of them.
            step (`int`, *optional*): Goes into the file names.

        Raises:
            `TypeError`: For anything else.
        """
        folder = self.folder / "samples" / "hook"
        folder.mkdir(parents=True, exist_ok=True)
        prefix = "" if step is None else f"step-{step:06d}-"
        for index, (name, value) in enumerate(values.items()):
            pictures = _hook_pictures(name, value)
            slug = re.sub(r"[^\w.-]+", "-", name).strip("-.")[:80]  # names are prompts, with any character in them
            for number, picture in enumerate(pictures):
                suffix = f"-{number:02d}" if len(pictures) > 1 else ""
                picture.save(folder / f"{prefix}{index:02d}-{slug}{suffix}.png")


def _hook_pictures(name: str, value: Any) -> list[Image.Image]:
    """What a hook logs under one name, as [`RunLog.log_images`] takes it."""
    if isinstance(value, (list, tuple)):
        return [picture for one in value for picture in _hook_pictures(name, one)]
    if isinstance(value, Image.Image):
        return [value.convert("RGB")]
    images = value
    if isinstance(value, np.ndarray) and (value.dtype == np.uint8 or np.issubdtype(value.dtype, np.floating)):
        images = torch.from_numpy(np.ascontiguousarray(value))
        if images.ndim in (3, 4) and images.shape[-1] == 3:  # arrays have their channels last, as pictures do
            images = images.movedim(-1, -3)
    is_tensor = isinstance(images, torch.Tensor) and (images.is_floating_point() or images.dtype == torch.uint8)
    if is_tensor and images.ndim in (3, 4) and images.shape[-3] == 3:
        return to_pil(images if images.ndim == 4 else images[None])
    shape = (
        f" of shape {tuple(value.shape)} and {value.dtype}" if isinstance(value, (np.ndarray, torch.Tensor)) else ""
    )
    raise TypeError(
        f"log_images got a {type(value).__name__}{shape} for {name!r}. It takes tensors (3, H, W) or (B, 3, H, W), arrays of these shapes or (H, W, 3) or (B, H, W, 3), "
        "of floats in [0, 1] or uint8, PIL pictures, and lists of these."
    )


def _writable(settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What YAML can hold, and the names of the rest."""
    kept: dict[str, Any] = {}
    left_out = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            kept[name], others = _writable(value)
            left_out += [f"{name}.{other}" for other in others]
            continue
        try:
            yaml.safe_dump(value)
            kept[name] = value
        except yaml.representer.RepresenterError:
            left_out.append(str(name))
    return kept, left_out


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`, in order. A last line without its end (the run was killed while writing it) is left out.

    Raises:
        `FileNotFoundError`: If the folder holds no `metrics.jsonl`.
        `ValueError`: If any other line is not a JSON object with a `"step"`; with its number.
    """
    path = Path(folder) / METRICS_FILE
    lines = path.read_text(encoding="utf-8").split("\n")
    metrics = []
    for number, text in enumerate(lines[:-1], start=1):  # what follows the last line end is empty, or torn
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error}): {text[:80]!r}") from error
        if not isinstance(line, dict) or "step" not in line:
            raise ValueError(f'{path}, line {number} is not an object with a "step": {text[:80]!r}')
        metrics.append(line)
    return metrics


def without_secrets(settings: Any) -> Any:
    """A copy without the entries, at any depth, whose names end in "api_key", "token", "secret" or "password"."""
    if not isinstance(settings, Mapping):
        return settings
    return {name: without_secrets(value) for name, value in settings.items() if not SECRET.search(str(name))}


def format_reward(value: float) -> str:
    """A reward in three significant digits, so that 0.004 and 23 both say something; NaN says so."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:.2f}" if 0.1 <= abs(value) < 1000 or value == 0 else f"{value:.3g}"
