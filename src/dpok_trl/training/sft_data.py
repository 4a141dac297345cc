"""What the supervised trainer learns from: drawn images as latents, kept in a file, or a dataset of images."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from PIL.Image import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


DATA_FOLDER = "sft_data"


@dataclass(frozen=True)
class SupervisedData:
    """The images of one process, drawn at one time.

    Args:
        x0 (`torch.Tensor` of shape `(N, *)`): Their clean latents as the scheduler knows them, on the CPU.
        prompts (`list[str]` of length `N`)
        seeds (`list[int]` of length `N`): Of each image's generator; the row of a dataset.
        rewards (`torch.Tensor` of shape `(N,)`): float32, CPU; NaN for an image that does not count.
        epoch (`int`): When they were drawn.
        process (`int`): By which process.
    """

    x0: torch.Tensor
    prompts: list[str]
    seeds: list[int]
    rewards: torch.Tensor
    epoch: int
    process: int

    def __len__(self) -> int:
        return len(self.prompts)

    def save(self, folder: Path) -> None:
        """Writes `folder/process-<i>.safetensors`: whole or not there."""
        folder.mkdir(parents=True, exist_ok=True)
        about = {"prompts": self.prompts, "seeds": self.seeds, "epoch": self.epoch, "process": self.process}
        unfinished = folder / f"unfinished-process-{self.process}"
        save_file({"x0": self.x0, "rewards": self.rewards}, unfinished, {"format": "pt", "data": json.dumps(about)})
        os.replace(unfinished, data_file(folder, self.process))

    @staticmethod
    def load(folder: Path, process: int) -> SupervisedData:
        """Reads what [`~SupervisedData.save`] wrote, bit for bit.

        Raises:
            `ValueError`: If the file is missing, cut off or of another process.
        """
        path = data_file(folder, process)
        if not path.is_file():
            raise ValueError(
                f"{path} is missing: the images that this run was trained on are kept there, and a resumed run goes on with them. Give a checkpoint of a supervised run "
                "(DPOKSFTTrainer), or start a new run."
            )
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
                about = json.loads((file.metadata() or {}).get("data", "{}"))
        except SafetensorError as error:
            raise ValueError(
                f"{path} cannot be read ({error}). Give another checkpoint, or start a new run."
            ) from error
        if set(tensors) != {"x0", "rewards"} or set(about) != {"prompts", "seeds", "epoch", "process"}:
            raise ValueError(f"{path} holds {', '.join(sorted(tensors))} and is not the data of a supervised run.")
        if about["process"] != process:
            raise ValueError(f"{path} holds the images of process {about['process']}, and this is process {process}.")
        return SupervisedData(**tensors, **about)


def data_file(folder: Path, process: int) -> Path:
    return folder / f"process-{process}.safetensors"


def link_or_copy(source: Path, target: Path) -> None:
    """The same file under another name, which costs no space where the file system knows hard links."""
    target.parent.mkdir(exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


# ---------------------------------------------------------------- a dataset of images


def check_dataset(dataset: Any, processes: int) -> None:
    """Raises `ValueError` for a dataset without the columns "prompt" and "image", or with fewer rows than processes."""
    missing = [name for name in ("prompt", "image") if name not in dataset.column_names]
    if missing:
        raise ValueError(
            f"train_dataset has no column {' and no column '.join(missing)}; its columns are {', '.join(dataset.column_names)}. Rename one: "
            'dataset.rename_column("...", "image").'
        )
    if len(dataset) < processes:
        raise ValueError(
            f"train_dataset has {len(dataset)} rows for {processes} processes; at least one for each is needed."
        )


def column_rewards(images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> list[float]:
    """The reward that a row of a dataset has already."""
    if not all(isinstance(entry, dict) and "reward" in entry for entry in metadata):
        raise ValueError(
            'the rewards of this run are the column "reward" of train_dataset, and other images have none: give a reward_function that scores them'
        )
    return [entry["reward"] for entry in metadata]


def pixels_of(pictures: Sequence[Any], shape: tuple[int, ...], rows: Sequence[int]) -> torch.Tensor:
    """Pictures of a dataset as float32 `(B, 3, H, W)` in [0, 1].

    Args:
        shape (`tuple[int, ...]`): Of an image that the pipeline draws, `(3, H, W)`.
        rows (`Sequence[int]`): Where the pictures stand in the dataset.

    Raises:
        `ValueError`: For what is no picture, or of another size than the pipeline draws. Nothing is cropped or scaled in silence.
    """
    if len(shape) != 3:
        raise ValueError(
            "the pipeline draws videos, and train_dataset holds images. Leave train_dataset out: the videos are then drawn from the model."
        )
    _, height, width = shape
    for row, picture in zip(rows, pictures, strict=True):
        if not isinstance(picture, Image):
            raise ValueError(
                f'row {row} of the column "image" is of type {type(picture).__name__}, and must be a PIL image: cast the column to datasets.Image().'
            )
        if picture.size != (width, height):
            raise ValueError(
                f"row {row} of train_dataset is a picture of {picture.width}x{picture.height} pixels, and the pipeline draws {width}x{height}. Crop and scale the "
                'pictures first (dataset.map), or set "height" and "width" in sample_call_kwargs.'
            )
    arrays = [np.asarray(picture.convert("RGB"), dtype=np.float32) / 255 for picture in pictures]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def encode_images(pipe: DiffusionPipeline, images: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """The VAE's latents of images, scaled as the pipeline's own; the mode of their distribution.

    Args:
        images (`torch.Tensor` of shape `(B, 3, H, W)`): In [0, 1].
        drawn (`torch.Tensor` of shape `(n, *)`): The final latents of a rollout, whose shape a sample's must have.

    Raises:
        `ValueError`: For a pipeline whose latents are made in another way; draw the images from the model then.
        `FloatingPointError`: If the VAE overflows.
    """
    vae = pipe.components.get("vae")
    instead = "Leave train_dataset out, and the images are drawn from the model."
    if vae is None:
        raise ValueError(
            f"{type(pipe).__name__} has no `vae` that could encode the images of train_dataset. {instead}"
        )
    if vae.config.get("latents_mean") is not None or "scaling_factor" not in vae.config:
        raise ValueError(
            f"the latents of {type(vae).__name__} are not scaled by one factor and shift alone. {instead}"
        )
    device = pipe._execution_device
    output = vae.encode(images.to(device, vae.dtype) * 2 - 1)
    if not isinstance(output, AutoencoderKLOutput):
        raise ValueError(
            f"{type(vae).__name__} encodes to {type(output).__name__}, and AutoencoderKLOutput is needed. {instead}"
        )
    latents = (output.latent_dist.mode() - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor
    if latents.shape[1:] != drawn.shape[1:]:
        raise ValueError(
            f"an image of train_dataset is encoded to latents of shape {tuple(latents.shape[1:])}, and those of {type(pipe).__name__} have {tuple(drawn.shape[1:])}: it "
            f"packs or arranges them in a way of its own. {instead}"
        )
    if not latents.isfinite().all():
        raise FloatingPointError(
            "the VAE encodes an image of train_dataset to NaN or infinite values. Usual cause: a VAE that overflows in fp16; load the pipeline in bf16 or fp32."
        )
    return latents.to(drawn.dtype)
