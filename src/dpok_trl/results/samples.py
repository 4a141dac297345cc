"""The images of a round that are looked at: one Parquet file for each epoch in the folder `samples.parquet`, and the table that a tracker gets."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


SAMPLES_FOLDER = "samples.parquet"  # a folder of Parquet files: pandas, pyarrow and datasets read it like one
SAMPLES_PER_EPOCH = 16
LARGEST_SAMPLE = 512  # pixels; sixteen pictures of 1024 pixels would be 25 MB in every epoch


@dataclass(frozen=True)
class Samples:
    """`n` pictures of an epoch and what belongs to each.

    Args:
        pictures (`list[PIL.Image.Image]` of length `n`): Of one size. They are scaled down to `LARGEST_SAMPLE` on the longer side.
        prompts (`list[str]` of length `n`)
        rewards (`list[float]` of length `n`): The total that is trained on; NaN for a picture that does not count.
        each (`dict[str, list[float | None]]`): Every reward by name; `None` where it does not apply, NaN where it failed.
        seeds (`list[int]` of length `n`)
        categories (`list[str | None]` of length `n`)
        epoch, step (`int`): The round, and the optimizer steps before its updates.

    Raises:
        `ValueError`: If they are not one for one.
    """

    pictures: list[Image.Image]
    prompts: list[str]
    rewards: list[float]
    each: dict[str, list[float | None]]
    seeds: list[int]
    categories: list[str | None]
    epoch: int
    step: int

    def __post_init__(self) -> None:
        columns = {
            "prompts": self.prompts,
            "rewards": self.rewards,
            "seeds": self.seeds,
            "categories": self.categories,
        }
        columns |= {f"rewards/{name}": values for name, values in self.each.items()}
        for name, values in columns.items():
            if len(values) != len(self.pictures):
                raise ValueError(
                    f"there are {len(self.pictures)} pictures and {len(values)} {name}: one is needed for each"
                )

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def reward_columns(self) -> dict[str, list[float | None]]:
        """`reward`, and `rewards/<name>` of each."""
        return {"reward": list(self.rewards), **{f"rewards/{name}": values for name, values in self.each.items()}}


def as_table(samples: Samples) -> pa.Table:
    """The columns `epoch`, `step`, `prompt`, `reward`, `rewards/<name>` of each, `seed`, `category` and `image`: PNG bytes in the form of `datasets.Image`.

    The schema holds the features of `datasets`, so `load_dataset` decodes the pictures without being told to.
    """
    from datasets import Features, Value
    from datasets import Image as ImageFeature

    numbers = {name: Value("float64") for name in samples.reward_columns}
    features = Features(
        {
            "epoch": Value("int64"),
            "step": Value("int64"),
            "prompt": Value("string"),
            **numbers,
            "seed": Value("int64"),
            "category": Value("string"),
            "image": ImageFeature(),
        }
    )
    images = [
        {"bytes": png(smaller(picture, LARGEST_SAMPLE)), "path": f"epoch-{samples.epoch:04d}-{number:02d}.png"}
        for number, picture in enumerate(samples.pictures)
    ]
    columns = {
        "epoch": [samples.epoch] * len(samples),
        "step": [samples.step] * len(samples),
        "prompt": samples.prompts,
        **samples.reward_columns,
        "seed": samples.seeds,
        "category": samples.categories,
        "image": images,
    }
    return pa.Table.from_pydict(columns, schema=features.arrow_schema)


def write_samples(folder: Path, samples: Samples) -> Path:
    """Writes `samples.parquet/epoch-0007.parquet` below a run's folder: whole or not at all, whenever the run is killed."""
    target = folder / SAMPLES_FOLDER / f"epoch-{samples.epoch:04d}.parquet"
    target.parent.mkdir(exist_ok=True)
    unfinished = target.with_name(f".{target.stem}.unfinished")  # no reader of the folder takes it for a part
    pq.write_table(as_table(samples), unfinished)
    os.replace(unfinished, target)
    return target


def read_samples(folder: str | Path, epoch: int) -> list[dict[str, Any]]:
    """The rows of one epoch; `image` is a `PIL.Image.Image`.

    Raises:
        `FileNotFoundError`: If there are none of that epoch.
    """
    rows = pq.read_table(Path(folder) / SAMPLES_FOLDER / f"epoch-{epoch:04d}.parquet").to_pylist()
    return [{**row, "image": Image.open(io.BytesIO(row["image"]["bytes"]))} for row in rows]


def sampled_epochs(folder: str | Path) -> list[int]:
    """The epochs of which there are samples, in order."""
    return sorted(epoch for epoch, path in epoch_files(Path(folder)) if path.suffix == ".parquet")


def epoch_files(folder: Path) -> Iterator[tuple[int, Path]]:
    """What a run has written for single epochs: sample grids and samples, each with its epoch."""
    for path in (*folder.glob("samples/epoch-*.png"), *folder.glob(f"{SAMPLES_FOLDER}/epoch-*.parquet")):
        found = re.fullmatch(r"epoch-(\d+)", path.stem)
        if found:
            yield int(found.group(1)), path


def smaller(picture: Image.Image, longest: int) -> Image.Image:
    """`picture` with its longer side at most `longest` pixels."""
    picture = picture.convert("RGB")
    picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)  # `convert` has made a copy
    return picture


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
