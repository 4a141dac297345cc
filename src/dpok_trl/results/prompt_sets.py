"""The prompts of an evaluation: one or several named sets."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpok_trl.prompts import prompt_source


ONLY_SET = "prompts"  # the name of prompts that were given without one
TRAINING = "training"


@dataclass(frozen=True)
class PromptSet:
    """Prompts that are evaluated together.

    Args:
        name (`str`)
        prompts (`tuple[str, ...]`)
        metadata (`tuple` of the same length): What rewards and the pipeline's call get beside each prompt.
    """

    name: str
    prompts: tuple[str, ...]
    metadata: tuple[Any, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def categories(self, column: str | None) -> list[str] | None:
        """The category of each prompt, from an entry of its metadata; `None` where no prompt has one.

        Raises:
            `ValueError`: If some have one and others do not.
        """
        has = [isinstance(entry, dict) and entry.get(column) is not None for entry in self.metadata]
        if column is None or not any(has):
            return None
        if not all(has):
            raise ValueError(
                f"{sum(has)} of the {len(self)} prompts of the set '{self.name}' have a '{column}' and the others have none. Give every prompt one, or none."
            )
        return [str(entry[column]) for entry in self.metadata]


def read_prompt_sets(given: Any) -> list[PromptSet]:
    """
    Args:
        given: Prompts as a list of strings or of `(prompt, metadata)` pairs, or a `datasets.Dataset` with a "prompt" column; or a dict from names of sets to
            them.

    Raises:
        `TypeError` or `ValueError`: For anything else, an empty set, a prompt that comes twice in a set, or a name that could not stand in a metric.
    """
    sets = given if isinstance(given, Mapping) else {ONLY_SET: given}
    if not sets:
        raise ValueError(
            "no prompts to evaluate on: the dict of sets is empty. Give at least one set, such as {'held-out': [...]}."
        )
    return [_read(name, prompts) for name, prompts in sets.items()]


def _read(name: Any, given: Any) -> PromptSet:
    if not isinstance(name, str) or not re.fullmatch(r"[\w .+-]+", name):
        raise ValueError(
            f"{name!r} cannot be the name of a set of prompts: it is part of the names of metrics. Use letters, digits and - _ . + only."
        )
    try:
        pairs = prompt_source(given).pairs()
    except (TypeError, ValueError) as error:
        raise type(error)(f"the prompts of the set '{name}': {error}") from error
    if pairs is None:
        raise TypeError(
            f"the set '{name}' is a function. An evaluation goes over the same prompts every time: give a list of them, or a datasets.Dataset."
        )
    times = Counter(
        prompt for prompt, metadata in pairs if not metadata
    )  # with metadata it may be another picture to start from
    twice = [prompt for prompt, count in times.items() if count > 1]
    if twice:
        raise ValueError(
            f"{twice[0]!r} stands {times[twice[0]]} times in the set '{name}' ({len(twice)} prompts do so more than once). Every prompt counts alike: give it "
            "once, and raise the number of images of each prompt."
        )
    return PromptSet(name, tuple(prompt for prompt, _ in pairs), tuple(metadata for _, metadata in pairs))


def refuse_wrong_sets(sets: Sequence[PromptSet], training: Sequence[str]) -> None:
    """Raises `ValueError` where prompts of the set "held-out" are among those that are trained on, and where none of the set "training" is. Blanks and capital
    letters make no other prompt."""
    known = set(map(_bare, training))
    for one in sets:
        both = [prompt for prompt in one.prompts if _bare(prompt) in known]
        if re.sub(r"[\W_]", "", one.name).lower() == "heldout" and both:
            raise ValueError(
                f"{len(both)} of the {len(one)} prompts of the set '{one.name}' are trained on: {_some(both)}. Take them out, or give the set another name, "
                f"such as '{TRAINING}'."
            )
        if one.name == TRAINING and not both:
            raise ValueError(
                f"no prompt of the set '{TRAINING}' is trained on: it holds {_some(one.prompts)}, and the training {_some(training)}. Give the set another name, "
                "or prompts of the training."
            )


def _bare(prompt: str) -> str:
    return " ".join(prompt.split()).casefold()


def _some(prompts: Sequence[str]) -> str:
    return ", ".join(map(repr, prompts[:3])) + (" ..." if len(prompts) > 3 else "")
