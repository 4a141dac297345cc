"""Pictures as tensors and back, and from PIL pictures to what a scorer's network was trained on, in Pillow and torch alone.

The recipes are written out because they differ (order of resizing and conversion, rounding of the crop, the side that is resized),
because a scorer's numbers mean nothing under another recipe, and because an image processor that is chosen automatically gives other
pixels on machines where torchvision is installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def to_pictures(images: Sequence[Image.Image] | Tensor) -> list[Image.Image]:
    """
    Pictures as they are, and tensors of them as pictures of 8 bits, rounded as diffusers does.

    Args:
        images (`Sequence[PIL.Image.Image]` or `torch.Tensor` of shape `(B, 3, H, W)`): a tensor has values in [0, 1].

    Raises:
        `ValueError`: For anything else, videos among it.
    """
    if not isinstance(images, Tensor):
        pictures = list(images)
        refuse_videos("this reward", pictures)
        for position, picture in enumerate(pictures):
            if not isinstance(picture, Image.Image):
                raise ValueError(f"image {position} must be a PIL picture, it is a {type(picture).__name__}.")
        return pictures
    refuse_videos("this reward", images)
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be of shape (B, 3, H, W); got {tuple(images.shape)}.")
    scaled = images.detach().to("cpu", torch.float32).clamp(0, 1).permute(0, 2, 3, 1).numpy() * 255
    return [Image.fromarray(pixels) for pixels in np.round(scaled).astype(np.uint8)]


def refuse_videos(name: str, images: Sequence[Any] | Tensor) -> None:
    """Raises a `ValueError` for videos: a tensor `(B, F, 3, H, W)`, or lists of frames in place of pictures."""
    in_tensor = isinstance(images, Tensor)
    if images.ndim == 5 if in_tensor else any(isinstance(image, (list, tuple)) for image in images):
        frame = "images[:, 0]" if in_tensor else "[frames[0] for frames in images]"
        raise ValueError(
            f"{name} scores pictures and was given videos (each is a list of frames; as a tensor, (B, F, 3, H, W)): call it in a function of yours with "
            f"one frame of each, such as `{frame}`."
        )


def to_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """`torch.Tensor` of shape `(B, 3, H, W)`, values in [0, 1].

    Raises:
        `ValueError`: If the pictures differ in size.
    """
    sizes = sorted({picture.size for picture in pictures})
    if len(sizes) > 1:
        (width, height), (other_width, other_height) = sizes[:2]
        raise ValueError(
            f"pictures that are scored in one call must be of one size; there are {width} x {height} and {other_width} x {other_height}."
        )
    return torch.stack([_to_tensor(picture.convert("RGB")) for picture in pictures])


def openai_clip_pixels(images: Sequence[Image.Image], size: int) -> Tensor:
    """
    The recipe that came with OpenAI's CLIP, and that ImageReward kept: shorter side to `size` (bicubic), centre crop with a rounded
    offset, and RGB last, so that a palette picture is resized as it is.

    Returns:
        `torch.Tensor` of shape `(B, 3, size, size)`, float32, normalised.
    """
    crops = []
    for image in images:
        resized = _shorter_side_to(image, size)
        left, top = (round((side - size) / 2) for side in resized.size)
        crops.append(resized.crop((left, top, left + size, top + size)).convert("RGB"))
    return _normalised(torch.stack([_to_tensor(crop) for crop in crops]))


def clip_pixels(images: Sequence[Image.Image], size: int) -> Tensor:
    """
    The recipe of transformers' `CLIPImageProcessor` on Pillow: RGB first, shorter side to `size` (bicubic), centre crop with the offset
    rounded down. Transparency is dropped.

    Returns:
        `torch.Tensor` of shape `(B, 3, size, size)`, float32, normalised.
    """
    crops = []
    for image in images:
        resized = _shorter_side_to(image.convert("RGB"), size)
        left, top = ((side - size) // 2 for side in resized.size)
        crops.append(resized.crop((left, top, left + size, top + size)))
    return _normalised(torch.stack([_to_tensor(crop) for crop in crops]))


def hps_pixels(images: Sequence[Image.Image], size: int) -> Tensor:
    """
    The recipe of HPSv2: RGB, *longer* side to `size`, zeros around it to a square, centred. The whole picture is seen.

    It is resized as a float tensor, with antialiasing. The original calls torchvision without saying so, and torchvision's default for
    tensors changed to antialiasing in 0.17: published HPS numbers depend a little on the installation.

    Returns:
        `torch.Tensor` of shape `(B, 3, size, size)`, float32, normalised (the border is black, so not 0 after it).
    """
    squares = []
    for image in images:
        picture = _to_tensor(image.convert("RGB"))
        scale = size / max(image.size)
        if scale != 1:
            height, width = (max(1, round(side * scale)) for side in picture.shape[-2:])
            picture = functional.interpolate(picture[None], (height, width), mode="bicubic", antialias=True)[0]
        rows, columns = (size - side for side in picture.shape[-2:])
        border = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
        squares.append(functional.pad(picture, border))
    return _normalised(torch.stack(squares))


def _shorter_side_to(image: Image.Image, size: int) -> Image.Image:
    width, height = image.size
    if width <= height:
        target = (size, int(size * height / width))
    else:
        target = (int(size * width / height), size)
    return image if image.size == target else image.resize(target, Image.Resampling.BICUBIC)


def _to_tensor(image: Image.Image) -> Tensor:
    """`(3, H, W)` in [0, 1], float32."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255)


def _normalised(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std
