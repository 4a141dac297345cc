"""Prompts as they are written on a command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpok_trl.prompts.datasets import HUB_PROMPTS, load_prompts, shipped_lists


Prompt = tuple[str, dict[str, Any]]
SUFFIXES = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet")


def read_prompts(items: Sequence[str]) -> list[Prompt]:
    """(prompt, metadata) pairs.

    Args:
        items (`Sequence[str]`): Each a prompt, a file of prompts, the name of a list of [`load_prompts`], or the id of a dataset of the Hub (`owner/name`).

    Raises:
        `FileNotFoundError`: For what can only be a file, and is none.
        `ValueError` or `TypeError`: For a file or a list without prompts in it.
    """
    return [pair for item in items for pair in _read(item)]


def _read(item: str) -> list[Prompt]:
    path = Path(item).expanduser()
    if path.is_file() or _is_name(item):
        rows = load_prompts(path if path.is_file() else item)
        return [(row["prompt"], {name: value for name, value in row.items() if name != "prompt"}) for row in rows]
    if path.suffix in SUFFIXES and not any(map(str.isspace, item)):
        raise FileNotFoundError(f"there is no file {item}.")
    return [(item, {})]


def _is_name(item: str) -> bool:
    """A prompt has blanks in it, or no slash."""
    hub_id = item.count("/") == 1 and not item.startswith((".", "~", "/")) and not item.endswith(SUFFIXES)
    return item in shipped_lists() or item in HUB_PROMPTS or (hub_id and not any(map(str.isspace, item)))
