"""Tensors to pictures, and pictures to captioned grids that can be looked at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import matplotlib
import torch
from PIL import Image, ImageDraw, ImageFont


SMALLEST_CELL = 128  # pixels; smaller pictures are enlarged by a whole factor, which keeps their pixels square
LARGEST_CELL = 384  # pixels; sixteen pictures of 1024 pixels would make a file of 20 MB
FONT_SIZE = 13
TITLE_SIZE = 16
GAP = 10
PAIR_GAP = 4  # between the two pictures of a pair
PAIR_COLUMNS = 8
BACKGROUND = (255, 255, 255)
INK = (28, 30, 33)
PALE_INK = (98, 103, 110)


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """8-bit pictures of a batch. A video becomes a strip of its first, middle and last frame.

    Args:
        images (`torch.Tensor` of shape `(B, 3, H, W)`, or `(B, F, 3, H, W)` for videos): In [0, 1] (values outside are clipped), or uint8.

    Raises:
        `ValueError`: For another shape, or where a value is not finite: it would turn black without a word.
    """
    if images.ndim == 5:
        last = images.shape[1] - 1
        images = torch.cat([images[:, frame] for frame in sorted({0, last // 2, last})], dim=-1)
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"pictures need a tensor of shape (B, 3, H, W), got {tuple(images.shape)}")
    images = images.detach().cpu()
    if images.dtype != torch.uint8:
        if not bool(images.isfinite().all()):
            raise ValueError(f"{int((~images.isfinite()).sum())} of {images.numel()} pixel values are not finite")
        # rounded, not truncated, as diffusers does when it hands out PIL images
        images = (images.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).numpy()]


def fit_cell(image: Image.Image) -> Image.Image:
    """`image` with its longer side between `SMALLEST_CELL` and `LARGEST_CELL`: enlarged by a whole factor, or scaled down."""
    longest = max(image.size)
    if longest > LARGEST_CELL:
        size = [max(1, round(side * LARGEST_CELL / longest)) for side in image.size]
        return image.resize(size, Image.Resampling.LANCZOS)
    factor = math.ceil(SMALLEST_CELL / longest)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def picture_grid(
    pictures: Sequence[Image.Image], captions: Sequence[tuple[str, str]], columns: int, title: str = ""
) -> Image.Image:
    """Pictures in rows, each with its caption below, under one title.

    Args:
        pictures (`Sequence[PIL.Image.Image]`): Of one size.
        captions (`Sequence[tuple[str, str]]`): For each a headline and a text. The text is wrapped to two lines; what does not fit is cut.
        columns (`int`): Pictures in a row.
        title (`str`, *optional*): Over the whole.
    """
    if not pictures or len(pictures) != len(captions):
        raise ValueError(
            f"a grid needs one caption for each picture: {len(pictures)} pictures, {len(captions)} captions"
        )
    cells = [fit_cell(picture.convert("RGB")) for picture in pictures]
    columns = min(columns, len(cells))
    rows = math.ceil(len(cells) / columns)
    width, height = max(cell.width for cell in cells), max(cell.height for cell in cells)
    lines = [[shorten(head, width, font(FONT_SIZE)), *wrap(text, width, font(FONT_SIZE))] for head, text in captions]
    line_height = FONT_SIZE + 4
    caption_height = max(len(caption) for caption in lines) * line_height
    top = GAP + (TITLE_SIZE + GAP if title else 0)
    full_width = GAP + columns * (width + GAP)
    grid = Image.new("RGB", (full_width, top + rows * (height + caption_height + GAP)), BACKGROUND)
    pen = ImageDraw.Draw(grid)
    if title:
        pen.text((GAP, GAP - 2), shorten(title, full_width - 2 * GAP, font(TITLE_SIZE)), INK, font(TITLE_SIZE))
    for index, (cell, caption) in enumerate(zip(cells, lines, strict=True)):
        row, column = divmod(index, columns)
        x, y = GAP + column * (width + GAP), top + row * (height + caption_height + GAP)
        grid.paste(cell, (x, y))
        for number, line in enumerate(caption):
            ink = INK if number == 0 else PALE_INK
            pen.text((x, y + height + 2 + number * line_height), line, ink, font(FONT_SIZE))
    return grid


def pair_grid(
    rows: tuple[Sequence[Image.Image], Sequence[Image.Image]],
    labels: tuple[str, str],
    captions: Sequence[tuple[str, str]],
    title: str = "",
    columns: int = PAIR_COLUMNS,
) -> Image.Image:
    """Two pictures over each other in every column, and what belongs to both below them.

    Args:
        rows (`tuple` of two `Sequence[PIL.Image.Image]`): The upper and the lower pictures, equally many, of one size.
        labels (`tuple[str, str]`): Of the upper and of the lower ones; at the left.
        captions (`Sequence[tuple[str, str]]`): For each pair a headline and a text, which is wrapped to two lines.
        title (`str`, *optional*): Over the whole.
        columns (`int`): Pairs side by side at most, before the next block.
    """
    if not rows[0] or not len(rows[0]) == len(rows[1]) == len(captions):
        raise ValueError(
            f"pairs need as many upper as lower pictures and captions: {len(rows[0])}, {len(rows[1])} and {len(captions)}"
        )
    upper, lower = ([fit_cell(picture.convert("RGB")) for picture in row] for row in rows)
    blocks = math.ceil(len(captions) / columns)
    columns = math.ceil(len(captions) / blocks)  # twelve pairs as six and six, not as eight and four
    width, height = (max(getattr(cell, side) for cell in [*upper, *lower]) for side in ("width", "height"))
    lines = [[shorten(head, width, font(FONT_SIZE)), *wrap(text, width, font(FONT_SIZE))] for head, text in captions]
    lines = [[line for line in caption if line] for caption in lines]
    line_height = FONT_SIZE + 4
    block_height = 2 * (height + PAIR_GAP) + max(map(len, lines)) * line_height + 2 * GAP
    left = GAP + math.ceil(max(font(FONT_SIZE).getlength(label) for label in labels)) + GAP
    top = GAP + (TITLE_SIZE + GAP if title else 0)
    grid = Image.new("RGB", (left + columns * (width + GAP), top + blocks * block_height - GAP), BACKGROUND)
    pen = ImageDraw.Draw(grid)
    if title:
        pen.text((GAP, GAP - 2), shorten(title, grid.width - 2 * GAP, font(TITLE_SIZE)), INK, font(TITLE_SIZE))
    for index, caption in enumerate(lines):
        block, column = divmod(index, columns)
        x, y = left + column * (width + GAP), top + block * block_height
        for cells, label in ((upper, labels[0]), (lower, labels[1])):
            grid.paste(cells[index], (x, y))
            if column == 0:
                pen.text((GAP, y + (height - FONT_SIZE) // 2), label, PALE_INK, font(FONT_SIZE))
            y += height + PAIR_GAP
        for number, line in enumerate(caption):
            ink = INK if number == 0 else PALE_INK
            pen.text((x, y + number * line_height), line, ink, font(FONT_SIZE))
    return grid


def stacked(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures below each other, on the paper of the grids."""
    size = (max(picture.width for picture in pictures), sum(picture.height for picture in pictures))
    whole, y = Image.new("RGB", size, BACKGROUND), 0
    for picture in pictures:
        whole.paste(picture, (0, y))
        y += picture.height
    return whole


def shorten(text: str, width: float, typeface: ImageFont.FreeTypeFont) -> str:
    """`text` on one line, cut to `width` pixels with an ellipsis where it is longer."""
    text = " ".join(text.split())
    if typeface.getlength(text) <= width:
        return text
    while text and typeface.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def wrap(text: str, width: float, typeface: ImageFont.FreeTypeFont) -> list[str]:
    """`text` on at most two lines of `width` pixels, broken between words; the second is cut where more is left."""
    words = text.split()
    first = 0
    while first < len(words) and typeface.getlength(" ".join(words[: first + 1])) <= width:
        first += 1
    first = max(first, 1)  # a word that is wider than the line is cut, not dropped
    lines = [" ".join(words[:first]), " ".join(words[first:])]
    return [shorten(line, width, typeface) for line in lines if line]


@lru_cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """The typeface of matplotlib's curves: it comes with matplotlib, and is the same on every machine."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)
