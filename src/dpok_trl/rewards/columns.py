"""Texts that come with the prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def column(metadata: Sequence[Any] | None, name: str, count: int, setting: str) -> list[str | None]:
    """
    One column of the metadata: a text for each picture, or `None`.

    Args:
        count (`int`): of the pictures.
        setting (`str`): the argument by which the user named the column, for messages.

    Raises:
        `ValueError`: If there is no such column, or something else than a text in it.
    """
    rows = [{}] * count if metadata is None else metadata
    if len(rows) != count:
        raise ValueError(f"images and metadata must be equally many; got {count} and {len(rows)}.")
    texts = []
    for position, row in enumerate(rows):
        if not isinstance(row, Mapping) or name not in row:
            found = f"only {', '.join(map(repr, row))}" if isinstance(row, Mapping) and row else "none at all"
            raise ValueError(
                f"the metadata of image {position} has no column {name!r}, {found}. Give it with the prompts, or name another with {setting}."
            )
        text = row[name]
        if not (text is None or isinstance(text, str)):
            raise ValueError(
                f"{name!r} of image {position} must be a text or None; got {text!r} of type {type(text).__name__}."
            )
        texts.append(text)
    return texts
