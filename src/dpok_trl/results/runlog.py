"""What a run writes down while it goes: `metrics.jsonl` and `samples/`, with or without a tracker."""

from __future__ import annotations

import json
import logging
import math
import numbers
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dpok_trl.results.pictures import picture_grid, to_pil


logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
GRID_SIZE = 16  # pictures in a sample grid


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
        ended; a line without an epoch (from a user's hook, which is called there) is kept if it is from before that step."""
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

    def sample_grid(
        self, images: torch.Tensor, prompts: Sequence[str], rewards: Sequence[float] | torch.Tensor, epoch: int
    ) -> Image.Image:
        """Writes `samples/epoch-0007.png`: the first sixteen images with reward and prompt. Returns it.

        Args:
            images (`torch.Tensor` of shape `(B, 3, H, W)`): In [0, 1].
            prompts (`Sequence[str]` of length `B`): Where all are the same, the prompt stands once, over the grid.
            rewards (`Sequence[float]` or `torch.Tensor` of length `B`)
            epoch (`int`): Counted from 0.
        """
        if not len(images) == len(prompts) == len(rewards):
            raise ValueError(
                f"images, prompts and rewards must be equally many, got {len(images)}, {len(prompts)} and {len(rewards)}"
            )
        values = [format_reward(float(reward)) for reward in rewards[:GRID_SIZE]]
        title = f"epoch {epoch}"
        if len(set(prompts)) == 1:
            title = f"{prompts[0]}  ·  {title}"
            captions = [(value, "") for value in values]
        else:
            captions = [(value, prompt) for value, prompt in zip(values, prompts[:GRID_SIZE], strict=True)]
        columns = 4 if len(values) <= 8 else 8
        grid = picture_grid(to_pil(images[:GRID_SIZE]), captions, columns, title)
        folder = self.folder / "samples"
        folder.mkdir(exist_ok=True)
        grid.save(folder / f"epoch-{epoch:04d}.png")
        return grid

    def log_images(self, values: Mapping[str, torch.Tensor], step: int | None = None) -> None:
        """Writes PNGs to `samples/hook/`: what DDPO's image hooks call on a tracker, for a run without one.

        Args:
            values (`Mapping[str, torch.Tensor]`): A name and an image `(3, H, W)` or images `(B, 3, H, W)`, in [0, 1] or uint8.
            step (`int`, *optional*): Goes into the file names.
        """
        folder = self.folder / "samples" / "hook"
        folder.mkdir(parents=True, exist_ok=True)
        prefix = "" if step is None else f"step-{step:06d}-"
        for index, (name, value) in enumerate(values.items()):
            pictures = to_pil(value if value.ndim == 4 else value[None])
            slug = re.sub(r"[^\w.-]+", "-", name).strip("-.")[:80]  # names are prompts, with any character in them
            for number, picture in enumerate(pictures):
                suffix = f"-{number:02d}" if len(pictures) > 1 else ""
                picture.save(folder / f"{prefix}{index:02d}-{slug}{suffix}.png")


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


def format_reward(value: float) -> str:
    """A reward in three significant digits, so that 0.004 and 23 both say something; NaN says so."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:.2f}" if 0.1 <= abs(value) < 1000 or value == 0 else f"{value:.3g}"


_warned: set[str] = set()


def log_images_to(
    trackers: Sequence[Any], key: str, images: Sequence[Image.Image], captions: Sequence[str], step: int
) -> None:
    """Logs pictures to accelerate's trackers, each of which wants another form. Call it on the main process.

    Args:
        trackers (`Sequence[accelerate.tracking.GeneralTracker]`): `accelerator.trackers`. TensorBoard gets an array (it has no captions),
            W&B and trackio lists of their own image types; for any other tracker a warning says, once, that it gets no pictures.
        key (`str`): Such as `"samples"`.
        images (`Sequence[PIL.Image.Image]`): Of one size.
        captions (`Sequence[str]`): One for each.
        step (`int`)
    """
    if len(images) != len(captions):
        raise ValueError(f"{len(images)} images and {len(captions)} captions are not one for one")
    for tracker in trackers:
        if tracker.name == "tensorboard":
            array = np.stack([np.asarray(image.convert("RGB")) for image in images])
            tracker.log_images({key: array}, step=step, dataformats="NHWC")
        elif tracker.name in ("wandb", "trackio"):
            make = _image_type(tracker.name)
            pairs = zip(images, captions, strict=True)
            tracker.log({key: [make(image, caption=caption) for image, caption in pairs]}, step=step)
        elif tracker.name not in _warned:
            _warned.add(tracker.name)
            logger.warning(
                "no pictures are sent to the tracker %s: only tensorboard, wandb and trackio get them. They are in the run's "
                "samples folder.",
                tracker.name,
            )


def _image_type(name: str) -> Any:
    if name == "wandb":
        import wandb

        return wandb.Image
    import trackio

    return trackio.Image
