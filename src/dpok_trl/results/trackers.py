"""Pictures and tables for accelerate's trackers, each of which wants another form. Scalars need nothing: `accelerator.log` takes them."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from dpok_trl.results.pictures import fit_cell
from dpok_trl.results.runlog import format_reward
from dpok_trl.results.samples import Samples


logger = logging.getLogger(__name__)

TABLE_SUFFIX = "_table"  # "samples_table": no "/", which would open a group of its own beside the pictures

_warned: set[str] = set()


def log_samples_to(trackers: Sequence[Any], samples: Samples, grid: Image.Image) -> None:
    """Logs the samples of an epoch: `samples`, pictures with prompt and reward, and `samples_table`. Call it on the main process.

    W&B and SwanLab show each picture with its caption. TensorBoard has no captions and trackio one picture for each key: they get the grid, in which
    prompt and reward are written. The table holds the pictures too in W&B and trackio.

    Args:
        trackers (`Sequence[accelerate.tracking.GeneralTracker]`): `accelerator.trackers`; for one that takes no pictures a warning says so once.
        samples ([`Samples`])
        grid (`PIL.Image.Image`): Of the same samples.
    """
    singly = [
        f"{format_reward(reward)} · {prompt}" for reward, prompt in zip(samples.rewards, samples.prompts, strict=True)
    ]
    for tracker in trackers:
        if tracker.name in ("wandb", "swanlab"):
            log_images_to([tracker], "samples", samples.pictures, singly, samples.step)
        else:
            log_images_to([tracker], "samples", [grid], [f"epoch {samples.epoch}"], samples.step)
        _log_table(tracker, "samples" + TABLE_SUFFIX, samples)


def log_images_to(
    trackers: Sequence[Any], key: str, images: Sequence[Image.Image], captions: Sequence[str], step: int
) -> None:
    """Logs pictures under one key. Call it on the main process.

    Args:
        trackers (`Sequence[accelerate.tracking.GeneralTracker]`): `accelerator.trackers`. TensorBoard has no captions; for a tracker that takes no
            pictures a warning says so once.
        key (`str`): Such as `"samples"`.
        images (`Sequence[PIL.Image.Image]`): Of one size.
        captions (`Sequence[str]`): One for each.
        step (`int`)

    Raises:
        `ValueError`: If there is not one caption for each picture, or for several pictures to trackio, which keeps one for each key.
    """
    if len(images) != len(captions):
        raise ValueError(f"{len(images)} images and {len(captions)} captions are not one for one")
    for tracker in trackers:
        if tracker.name == "tensorboard":
            array = np.stack([np.asarray(image.convert("RGB")) for image in images])
            tracker.log_images({key: array}, step=step, dataformats="NHWC")
        elif tracker.name in ("wandb", "swanlab"):
            make = _image_type(tracker.name)
            pairs = zip(images, captions, strict=True)
            tracker.log({key: [make(image, caption=caption) for image, caption in pairs]}, step=step)
        elif tracker.name == "trackio":
            if len(images) != 1:  # it drops a list of pictures, with no more than a Python warning
                raise ValueError(f"trackio takes one picture for each key, and {len(images)} were given for {key}")
            tracker.log({key: _image_type(tracker.name)(images[0], caption=captions[0])}, step=step)
        elif tracker.name not in _warned:
            _warned.add(tracker.name)
            logger.warning(
                "no pictures are sent to the tracker %s: only tensorboard, wandb, trackio and swanlab get them. They are in the run's "
                "folder, in samples/ and samples.parquet.",
                tracker.name,
            )


def _log_table(tracker: Any, key: str, samples: Samples) -> None:
    names = ["epoch", "prompt", *samples.reward_columns]
    columns = [[samples.epoch] * len(samples), samples.prompts, *samples.reward_columns.values()]
    rows = [list(row) for row in zip(*columns, strict=True)]
    if tracker.name == "tensorboard":
        tracker.log({key: _markdown(names, rows)}, step=samples.step)
    elif tracker.name == "swanlab":
        import swanlab

        table = swanlab.echarts.Table()
        table.add(names, [[_in_words(cell) for cell in row] for row in rows])
        tracker.log({key: table}, step=samples.step)
    elif tracker.name == "wandb":
        import wandb

        with_images = [[*row, wandb.Image(fit_cell(image))] for row, image in zip(rows, samples.pictures, strict=True)]
        tracker.log({key: wandb.Table(columns=[*names, "image"], data=with_images)}, step=samples.step)
    elif tracker.name == "trackio":
        import pandas as pd
        import trackio

        frame = pd.DataFrame([[_in_words(cell) for cell in row] for row in rows], columns=names)
        frame["image"] = [trackio.Image(fit_cell(image)) for image in samples.pictures]
        tracker.log({key: trackio.Table(dataframe=frame)}, step=samples.step)


def _in_words(cell: Any) -> Any:
    """What a table of text shows of a cell: trackio's and SwanLab's cannot hold a NaN or nothing."""
    if cell is None:
        return "–"
    return str(cell) if isinstance(cell, float) and not math.isfinite(cell) else cell


def _markdown(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table for TensorBoard's text panel."""
    texts = [
        [format_reward(cell) if isinstance(cell, float) else str(_in_words(cell)) for cell in row] for row in rows
    ]
    cells = [list(names), ["---"] * len(names), *texts]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in cells
    )


def _image_type(name: str) -> Any:
    if name == "wandb":
        import wandb

        return wandb.Image
    if name == "swanlab":
        import swanlab

        return swanlab.Image
    import trackio

    return trackio.Image
