"""How large a picture is as a JPEG file: the rewards of DDPO's own experiments, and the best first test of a set-up."""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from dpok_trl.rewards.info import RewardInfo
from dpok_trl.rewards.weights import check_pictures


class JpegIncompressibility:
    """
    Kilobytes (1000 bytes) of the picture as a JPEG file: it grows with detail.

    Args:
        quality (`int`): of the encoder, 1 to 95. DDPO's is 95.
    """

    info = RewardInfo(
        name="jpeg-incompressibility",
        summary="kilobytes of the picture as JPEG: rewards detail; no download, for a first test",
        input="image",
        range="above 0, grows with the picture's size",
        weights="none",
        licence="none",
        needs="nothing more",
        overlooks="Does not look at the prompt, and ends in noise.",
    )
    image_type = "pil"
    overlaps = True
    sign = 1

    def __init__(self, quality: int = 95):
        if not 1 <= quality <= 95:
            raise ValueError(f"{self.info.name}: `quality` must be between 1 and 95; got {quality}.")
        self.quality = quality

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """`torch.Tensor` of shape `(B,)`, float32, on the CPU. The prompts are not looked at."""
        images, _ = check_pictures(self.info.name, images, prompts)
        return torch.tensor([self.sign * self._bytes(image) / 1000 for image in images])

    def _bytes(self, image: Image.Image) -> int:
        file = io.BytesIO()
        image.convert("RGB").save(file, format="JPEG", quality=self.quality)
        return file.tell()


class JpegCompressibility(JpegIncompressibility):
    """Minus [`JpegIncompressibility`]: it grows as detail goes. (Some trainers divide it by 500.)"""

    info = RewardInfo(
        name="jpeg-compressibility",
        summary="minus the kilobytes of the picture as JPEG: rewards plainness; no download, for a first test",
        input="image",
        range="below 0, falls with the picture's size",
        weights="none",
        licence="none",
        needs="nothing more",
        overlooks="Does not look at the prompt, and ends in textureless, even pictures.",
    )
    sign = -1
