"""How different the images of one prompt are from each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dpok_trl.rewards.info import RewardInfo
from dpok_trl.rewards.pictures import refuse_videos
from dpok_trl.rewards.weights import in_turn


Features = Callable[[Sequence[Image.Image]], Tensor]

THUMBNAIL = 8  # pixels on a side


def thumbnails(images: Sequence[Image.Image]) -> Tensor:
    """`(B, 192)`: the picture's mean colours on a grid of 8 x 8, scaled so that black and white are at distance 1 and nothing is further."""
    refuse_videos("diversity", images)
    small = [image.convert("RGB").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX) for image in images]
    colours = torch.from_numpy(np.stack([np.asarray(image) for image in small])).float().flatten(1) / 255
    return colours / colours.shape[1] ** 0.5


class PairwiseDiversity:
    """
    Each image's mean Euclidean distance to the other images of its prompt in the batch. An image that is alone gets no reward (`None`).

    It is for a small weight beside another reward, where the images of a prompt have become all alike (`reward_std` falls). Alone it pays for noise.

    Args:
        features (`Callable` or `str` or `Path`, *optional*): What is compared. Default: a thumbnail of 8 x 8 colours. That is cheap and knows layout and
            colour **only**: the same cat moved to the left is far, another animal of the same colours is near. A Hub id or folder of a CLIP model
            (`"openai/clip-vit-large-patch14"`) compares what the pictures show, by unit vectors, in [0, 2]; a function takes a list of PIL pictures and
            returns a tensor `(B, D)`.
        device (`str` or `torch.device`, *optional*): Of the CLIP model. `None` is not decided: `.to(device)`, which there is with a CLIP model only, decides, or
            the first call, for the CPU.
        dtype (`torch.dtype`): Of the CLIP model.
        batch_size (`int`): Pictures in one pass of the CLIP model.
    """

    info = RewardInfo(
        name="diversity",
        summary="mean distance to the other images of the prompt, by thumbnails of 8 x 8 colours (or a CLIP model of yours)",
        input="images of one prompt",
        range="[0, 1], 0 if all are equal",
        weights="none",
        licence="Apache-2.0 (this package)",
        needs="groups: sample_num_images_per_prompt of at least 2",
        overlooks="Pays for noise and for ignoring the prompt, and by default knows layout and colour only.",
    )
    image_type = "pil"
    wants_groups = True

    def __init__(
        self,
        features: Features | str | Path | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 16,
    ):
        if batch_size < 1:
            raise ValueError(f"diversity: `batch_size` must be at least 1; got {batch_size}.")
        self.clip_name = str(features) if isinstance(features, (str, Path)) else None
        if features is not None and self.clip_name is None and not callable(features):
            raise TypeError(
                f"features must be a function of pictures, or the Hub id or folder of a CLIP model; got {features!r}."
            )
        self._features = self._clip_features if self.clip_name is not None else features or thumbnails
        self._clip = None
        self.device = None if device is None else torch.device(device)
        if self.clip_name is not None:
            self.to = self._to  # only then: what has `to` is taken for something with a network
        self.dtype = dtype
        self.batch_size = batch_size

    def _to(self, device: str | torch.device) -> PairwiseDiversity:
        """Where the CLIP model runs from now on."""
        with in_turn:
            self.device = torch.device(device)
            if self._clip is not None:
                self._clip.to(self.device)
        return self

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor | list[None]:
        """
        Args:
            images (`Sequence[PIL.Image.Image]` of length `B`): All of one prompt.
            prompts (`Sequence[str]` of length `B`): That prompt.

        Returns:
            `torch.Tensor` of shape `(B,)`, or `[None]` for a single image.

        Raises:
            `ValueError`: For several prompts, or features that are not one vector per picture.
        """
        if len(set(prompts)) > 1:
            raise ValueError(
                f"diversity compares the images of one prompt; got {len(set(prompts))} prompts in one call."
            )
        if len(images) == 1:
            return [None]
        with torch.no_grad():
            vectors = self._features(images).float().cpu()
        if vectors.ndim != 2 or len(vectors) != len(images):
            raise ValueError(
                f"diversity: the features must be of shape (B, D), one vector for each of the {len(images)} pictures; got {tuple(vectors.shape)}."
            )
        # Not by way of scalar products: they would put equal pictures a little apart.
        distances = torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist")
        return distances.sum(dim=1) / (len(images) - 1)

    def _clip_features(self, images: Sequence[Image.Image]) -> Tensor:
        from dpok_trl.rewards.clip import load_clip

        refuse_videos("diversity", images)

        with in_turn:
            if self.device is None:
                self.device = torch.device("cpu")
            if self._clip is None:
                self._clip = load_clip(self.clip_name, self.clip_name, device=self.device, dtype=self.dtype)
            self._clip.to(self.device)  # another reward that shares it may have moved it
            starts = range(0, len(images), self.batch_size)
            return torch.cat([self._clip.embed_images(images[start : start + self.batch_size]) for start in starts])
