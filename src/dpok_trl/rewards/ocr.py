"""Does the picture say the text it was asked for?"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from dpok_trl.rewards.columns import column
from dpok_trl.rewards.info import RewardInfo
from dpok_trl.rewards.protocol import to_pictures


Recognizer = Callable[[Image.Image], str]


class OCRReward:
    """
    1 - min(edit distance, length) / length, between what is read in the picture and the text that is wanted, both in lower case and without
    white space: 1 if they are equal, 0 if nothing is right. The length is that of the text wanted.

    Args:
        column (`str`, defaults to `"text"`): column of the metadata that holds the text. A sample whose text is `None` gets no reward.
        recognizer (`Callable`, *optional*): `(picture) -> text`, called for one picture at a time. Default: RapidOCR, loaded with the first call.
    """

    info = RewardInfo(
        name="ocr",
        summary="the text in the picture against the text wanted",
        input="image, column text",
        range="[0, 1]",
        weights="in the package rapidocr",
        licence="Apache-2.0",
        needs="dpok-trl[ocr]",
        overlooks="Looks at the text only, and ends in plain, large print on an empty ground.",
    )
    image_type = "pil"
    overlaps = True

    def __init__(self, column: str = "text", *, recognizer: Recognizer | None = None) -> None:
        self.column = column
        self.recognizer = recognizer
        self._lock = threading.Lock()  # nobody promises that a recognizer may be called from several threads

    def __call__(
        self, images: Sequence[Image.Image] | Tensor, prompts: Sequence[str], metadata: Sequence[Any] | None = None
    ) -> tuple[list[float | None], dict[str, list[str | None]]]:
        """
        Args:
            images (`Sequence[PIL.Image.Image]` or `torch.Tensor` of shape `(B, 3, H, W)`): a tensor, of values in [0, 1], is rounded to 8 bits.
            metadata (`Sequence[Mapping]` of length B): with the column of the texts.

        Returns:
            `tuple[list[float | None], dict]`: the rewards, and what was read, `{"read": [...]}`.

        Raises:
            `ImportError`: If RapidOCR is needed and missing.
            `ValueError`: If a text is missing or has no letter.
        """
        pictures = to_pictures(images)
        wanted = column(metadata, self.column, len(pictures), "column")
        for position, text in enumerate(wanted):
            if text is not None and not plain(text):
                raise ValueError(
                    f"{self.column!r} of image {position} is empty: use None for a picture without a text."
                )
        with self._lock:
            if self.recognizer is None:
                self.recognizer = rapidocr_recognizer()
            read = [
                None if text is None else self.recognizer(picture)
                for text, picture in zip(wanted, pictures, strict=True)
            ]
        rewards = [None if text is None else similarity(found, text) for text, found in zip(wanted, read, strict=True)]
        return rewards, {"read": read}


def plain(text: str) -> str:
    return "".join(text.lower().split())


def similarity(read: str, wanted: str) -> float:
    read, wanted = plain(read), plain(wanted)
    return 1.0 - min(edit_distance(read, wanted), len(wanted)) / len(wanted)


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's: insertions, deletions and substitutions of one letter."""
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (letter != other))
    return row[-1]


def rapidocr_recognizer() -> Recognizer:
    """RapidOCR with the models that its package brings; the lines it finds, in its order, from the top."""
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise ImportError(
            f'the reward ocr needs RapidOCR, which cannot be imported ({error}): pip install "dpok-trl[ocr]"'
        ) from error
    engine = RapidOCR(params={"Global.log_level": "error"})

    def recognize(picture: Image.Image) -> str:
        pixels = np.asarray(picture.convert("RGB"))[..., ::-1]  # RapidOCR takes arrays as OpenCV has them, BGR
        return " ".join(engine(np.ascontiguousarray(pixels)).txts or ())

    return recognize
