"""Prompts to load: shipped lists, benchmarks on the Hub, and files, all with a column "prompt" and often a "category"."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class HubPrompts:
    """Where a benchmark is on the Hub, and which of its columns are ours.

    Attributes:
        repo (`str`): id of the dataset.
        split (`str`): the split that is loaded when none is asked for.
        prompt (`str`): column of the prompt: a string, or a list of strings of which the first is taken.
        category (`str`, *optional*): column of the category.
        first_line (`bool`, defaults to `False`): the column holds several captions, one in each line.
    """

    repo: str
    split: str
    prompt: str
    category: str | None = None
    first_line: bool = False


# All are data files. Repositories with a loading script are of no use: datasets 4 and later do not run those.
HUB_PROMPTS = {
    "drawbench": HubPrompts("sayakpaul/drawbench", "train", "Prompts", "Category"),
    "parti-prompts": HubPrompts("nateraw/parti-prompts", "train", "Prompt", "Category"),
    "coco": HubPrompts("phiyodr/coco2017", "validation", "captions"),
    "cub": HubPrompts("weiywang/CUB_200_2011_CAP", "train", "text", first_line=True),
}

# file name -> builder of the datasets library
_BUILDERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}


def shipped_lists() -> list[str]:
    """Names of the lists that come with the package."""
    folder = resources.files("dpok_trl.prompts") / "lists"
    return sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))


def load_prompts(
    name_or_path: str | Path,
    *,
    split: str | None = None,
    category: str | Sequence[str] | None = None,
    limit: int | None = None,
    prompt_column: str | None = None,
    category_column: str | None = None,
) -> Dataset:
    """
    Prompts by name, from the Hub or from a file, ready to be a trainer's `prompt_function`.

    Args:
        name_or_path (`str` or `Path`): one of
            - a shipped list: `"dpok"`, `"dpok-unseen"`, `"dpok-test"`, `"animals"`, `"animals-activities"`, `"demo"`,
              `"demo-unseen"`;
            - a benchmark on the Hub: `"drawbench"`, `"parti-prompts"`, `"coco"`, `"cub"`;
            - any dataset of the Hub by its id, `"owner/name"`;
            - a file (csv, tsv, json, jsonl, parquet, or txt with one prompt per line), or a folder of such files.
        split (`str`, *optional*): split to load, in the notation of `datasets`, such as `"train"` or `"validation[:100]"`.
            `None`: the usual one of a benchmark, the only one of anything else.
        category (`str` or `Sequence[str]`, *optional*): keep the prompts of these categories alone.
        limit (`int`, *optional*): keep at most this many, the first ones (of those categories).
        prompt_column (`str`, *optional*): column of the prompts, if it is not `"prompt"` (of a txt file: the lines). If it
            holds lists of captions, the first of each row is taken.
        category_column (`str`, *optional*): column of the categories, if it is not `"category"`.

    Returns:
        `datasets.Dataset`: with the string column `"prompt"`, the string column `"category"` where there is one, and all
        other columns as they are.

    Raises:
        `ValueError`: for a name that is neither known nor a file (with the nearest, and all of them), a column, split or
            category that does not exist (with those that do), and where no prompt is left.
        `TypeError`: for a prompt that is not a string; its row is named.

    Example:

    ```python
    >>> load_prompts("dpok", category="count")["prompt"][0]
    'Four wolves in the park.'
    ```
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit = {limit}, but it must be at least 1; None keeps all prompts.")
    name = str(name_or_path)
    dataset = _load(name, split)
    known = HUB_PROMPTS.get(name)
    if known is not None:
        prompt_column = prompt_column or known.prompt
        category_column = category_column or known.category
    elif prompt_column is None and dataset.column_names == ["text"]:  # of a txt file
        dataset, prompt_column = _without_blank_lines(dataset), "text"
    prompts = _prompts(dataset, prompt_column or "prompt", name, known is not None and known.first_line)
    dataset = _with_column(dataset, prompt_column or "prompt", "prompt", prompts)
    if category_column is not None or "category" in dataset.column_names:
        category_column = category_column or "category"
        dataset = _with_column(dataset, category_column, "category", _categories(dataset, category_column, name))
    if category is not None:
        dataset = _of_category(dataset, [category] if isinstance(category, str) else list(category), name)
    return dataset if limit is None else dataset.select(range(min(limit, len(dataset))))


# --- where the rows come from -----------------------------------------------------------------------------------------


def _load(name: str, split: str | None) -> Dataset:
    """The rows under this name, with the columns that they have there."""
    from datasets import load_dataset  # takes a second to import, and lists of strings do without

    if name in shipped_lists():
        if split is not None:
            raise ValueError(f"split = {split!r}, but the shipped list {name!r} has no splits; leave it out.")
        return _shipped(name)
    if name in HUB_PROMPTS:
        return load_dataset(HUB_PROMPTS[name].repo, split=split or HUB_PROMPTS[name].split)
    path = Path(name).expanduser()
    if path.is_file():
        load = partial(load_dataset, _builder(path), data_files=str(path), **_options(path))
    elif path.is_dir() or _is_hub_id(name):
        load = partial(load_dataset, str(path) if path.is_dir() else name)
    else:
        raise ValueError(_unknown(name))
    if split is not None:
        return load(split=split)
    splits = load()
    if len(splits) != 1:
        raise ValueError(f"{name} has the splits {sorted(splits)}: choose one, e.g. split={sorted(splits)[0]!r}.")
    return next(iter(splits.values()))


def _shipped(name: str) -> Dataset:
    from datasets import Dataset

    file = resources.files("dpok_trl.prompts") / "lists" / f"{name}.json"
    return Dataset.from_list(json.loads(file.read_text(encoding="utf-8"))["prompts"])


def _builder(path: Path) -> str:
    if path.suffix not in _BUILDERS:
        raise ValueError(f"{path} ends in {path.suffix!r}; prompts are read from {', '.join(_BUILDERS)}.")
    return _BUILDERS[path.suffix]


def _options(path: Path) -> dict[str, str]:
    return {"sep": "\t"} if path.suffix == ".tsv" else {}


def _is_hub_id(name: str) -> bool:
    """`owner/name`, and nothing that looks like a file that is not there."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and Path(name).suffix not in _BUILDERS


def _unknown(name: str) -> str:
    names = [*shipped_lists(), *HUB_PROMPTS]
    close = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return (
        f"{name!r} is no list of prompts, no file and no folder.{hint} Lists: {', '.join(shipped_lists())}. On the Hub: "
        f"{', '.join(HUB_PROMPTS)}, or any dataset as 'owner/name'. For one prompt, give the trainer the string itself."
    )


# --- columns ----------------------------------------------------------------------------------------------------------


def _values(dataset: Dataset, column: str, name: str, parameter: str) -> list[Any]:
    if column not in dataset.column_names:
        raise ValueError(
            f"{name} has no column {column!r}; its columns are {dataset.column_names}. Name one as {parameter}."
        )
    # only this column and without a format: others may hold pictures, which are slow to decode
    return list(dataset.select_columns(column).with_format(None)[column])


def _prompts(dataset: Dataset, column: str, name: str, first_line: bool) -> list[str]:
    values = _values(dataset, column, name, "prompt_column")
    if not values:
        raise ValueError(f"{name} is empty: there is no prompt in it.")
    for row, value in enumerate(values):
        if isinstance(value, list) and value:
            value = value[0]
        if not isinstance(value, str):
            raise TypeError(
                f"row {row} of the column {column!r} of {name} must be a string, or a list that begins with one; it is "
                f"{value!r} of type {type(value).__name__}."
            )
        values[row] = value.strip().split("\n")[0].strip() if first_line else value
    return values


def _categories(dataset: Dataset, column: str, name: str) -> list[str | None]:
    """As strings, without blanks around them (the lists in circulation have some); `None` for a row without."""
    from datasets import ClassLabel

    values = _values(dataset, column, name, "category_column")
    feature = dataset.features[column]
    if isinstance(feature, ClassLabel):  # numbers with names
        values = [None if value is None else feature.int2str(value) for value in values]
    return [None if value is None else str(value).strip() for value in values]


def _with_column(dataset: Dataset, old: str, new: str, values: list[Any]) -> Dataset:
    """`values` as the column `new` in the place of the column `old`."""
    from datasets import Value

    if old != new and new in dataset.column_names:
        raise ValueError(
            f"the column {old!r} cannot become {new!r}: there is another column of that name. Rename or remove it first."
        )
    # Added before the other goes: a table without columns has no rows either.
    dataset = dataset.add_column("new " + new, values, feature=Value("string"))
    return dataset.remove_columns(old).rename_column("new " + new, new)


def _of_category(dataset: Dataset, wanted: list[str], name: str) -> Dataset:
    if "category" not in dataset.column_names:
        raise ValueError(
            f"category = {wanted}, but {name} has no categories; its columns are {dataset.column_names}. Name one as "
            "category_column, or leave category out."
        )
    categories = list(dataset["category"])
    there = sorted({category for category in categories if category is not None})
    missing = [category for category in wanted if category not in there]
    if missing or not wanted:
        raise ValueError(f"category = {wanted}, but {name} has the categories {there}.")
    return dataset.select([row for row, category in enumerate(categories) if category in wanted])


def _without_blank_lines(dataset: Dataset) -> Dataset:
    return dataset.select([row for row, line in enumerate(dataset["text"]) if line.strip()])
