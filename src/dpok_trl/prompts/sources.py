"""Where prompts come from: a DDPO callable, a list, a `datasets.Dataset` or one string.

The trainer asks a [`PromptSource`] for the prompts of its own process, again and again. Listed prompts are used in
shuffled passes over the whole list, and the order is a function of the seed and of how many prompts all processes
together have used so far. So no prompt is left out on any number of processes, and a run is resumed by remembering
one number. With weights a pass holds a prompt more than once, or not at all.
"""

import math
import random
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from numbers import Real
from typing import Any


PromptFunction = Callable[[], tuple[str, Any]]

_ACCEPTED = (
    "a function that takes nothing and returns (prompt, metadata), a list of strings or of (prompt, metadata) pairs, "
    'a datasets.Dataset with a "prompt" column, or one string'
)


class PromptSource(ABC):
    """Prompts with their metadata, batch by batch. Built by [`prompt_source`].

    Attributes:
        images_per_prompt (`int`): how many times in a row each prompt is returned (the size of a group).
        num_prompts (`int` or `None`): how many prompts there are, `None` when a function makes them.
        listed (`Sequence[str]` or `None`): the prompts, in the order in which they were given; `None` when a function makes them.
    """

    num_prompts: int | None
    listed: Sequence[str] | None

    def __init__(self, *, images_per_prompt: int, seed: int, process_index: int, num_processes: int) -> None:
        if images_per_prompt < 1:
            raise ValueError(f"images_per_prompt must be at least 1, got {images_per_prompt}.")
        if not 0 <= process_index < num_processes:
            raise ValueError(
                f"process_index must be in [0, num_processes), got process_index={process_index} of "
                f"num_processes={num_processes}."
            )
        self.images_per_prompt = images_per_prompt
        self.seed = seed
        self.process_index = process_index
        self.num_processes = num_processes
        self._position = 0  # prompts used so far by all processes together

    def draw(self, num_samples: int) -> tuple[list[str], list[Any]]:
        """
        The prompts of the next `num_samples` images of this process. Every process must ask for the same number.

        Args:
            num_samples (`int`): number of images, a multiple of `images_per_prompt`.

        Returns:
            `tuple[list[str], list[Any]]`: prompts and metadata, both of length `num_samples`. Each prompt stands
            `images_per_prompt` times in a row, always on one process.

        Raises:
            `ValueError`: if `num_samples` is not a positive multiple of `images_per_prompt`.
        """
        group = self.images_per_prompt
        if num_samples < 1 or num_samples % group:
            below = num_samples // group * group
            nearest = f"{below} and {below + group}" if below > 0 else f"{group}"
            raise ValueError(
                f"num_samples={num_samples} images cannot be split into groups of images_per_prompt={group}: the "
                f"nearest that can: {nearest}."
            )
        count = num_samples // group
        first = self._position + self.process_index * count
        pairs = [pair for pair in self._take(first, count) for _ in range(group)]
        self._position += count * self.num_processes
        return [prompt for prompt, _ in pairs], [metadata for _, metadata in pairs]

    def pairs(self) -> list[tuple[str, Any]] | None:
        """All (prompt, metadata) pairs in the order in which they were given; `None` when a function makes them."""
        return None

    @abstractmethod
    def _take(self, first: int, count: int) -> list[tuple[str, Any]]:
        """`count` (prompt, metadata) pairs from the global position `first` on."""

    def state_dict(self) -> dict[str, Any]:
        """What [`~PromptSource.load_state_dict`] needs; the same on every process and plain enough for JSON."""
        return {"position": self._position, "num_prompts": self.num_prompts, "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Go on where the source that made `state` stood. The number of processes and `images_per_prompt` may differ.

        A prompt *function* keeps its own state: one that draws from `random`, `numpy` or `torch` goes on exactly once
        those generators are restored, as the trainer does.

        Raises:
            `ValueError`: if the seed or the number of prompts is another one, for the order would not be the same.
        """
        for key, now in (("num_prompts", self.num_prompts), ("seed", self.seed)):
            if state[key] != now:
                raise ValueError(
                    f"the checkpoint was made with {key}={state[key]}, this run has {key}={now}: the prompts would "
                    f"not go on in the same order. Resume with {key}={state[key]}, or start a new run."
                )
        self._position = state["position"]


class _FunctionPrompts(PromptSource):
    """One call of the user's function per prompt, as DDPO does."""

    num_prompts = None
    listed = None

    def __init__(self, function: PromptFunction, **options: Any) -> None:
        super().__init__(**options)
        self._function = function

    def _take(self, first: int, count: int) -> list[tuple[str, Any]]:
        return [self._call() for _ in range(count)]

    def _call(self) -> tuple[str, Any]:
        result = self._function()
        # Not by unpacking: a two-letter string would pass as a prompt and its metadata.
        if isinstance(result, (tuple, list)) and len(result) == 2 and isinstance(result[0], str):
            return result[0], result[1]
        name = getattr(self._function, "__name__", type(self._function).__name__)
        raise TypeError(
            f"the prompt function {name} must return (prompt, metadata), a string and anything; it returned "
            f"{_describe(result)}. Without metadata, return (prompt, {{}})."
        )


class _ListedPrompts(PromptSource):
    """Shuffled passes over known prompts: every prompt exactly once in each pass, or as often as its weight says."""

    def __init__(
        self,
        prompts: Sequence[str],
        metadata_of: Callable[[int], Any],
        weights: Sequence[Real] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.listed = prompts
        self._metadata_of = metadata_of
        self._bounds = None if weights is None else _cumulative(weights)
        self.num_prompts = len(prompts)
        self._shuffled: tuple[int, list[int]] = (-1, [])  # (pass, its order), so that one shuffle serves a pass

    def pairs(self) -> list[tuple[str, Any]]:
        return [(prompt, self._metadata_of(row)) for row, prompt in enumerate(self.listed)]

    def _take(self, first: int, count: int) -> list[tuple[str, Any]]:
        rows = [self._row(position) for position in range(first, first + count)]
        return [(self.listed[row], self._metadata_of(row)) for row in rows]

    def _row(self, position: int) -> int:
        pass_index, offset = divmod(position, len(self.listed))
        if self._shuffled[0] != pass_index:
            order = list(range(len(self.listed)))
            if self._bounds is not None:
                counts = _systematic_counts(self._bounds, random.Random(f"{self.seed}/{pass_index}/offset"))
                order = [row for row, count in enumerate(counts) for _ in range(count)]
            # A generator of our own for each pass: the order depends on nothing else that the run draws.
            random.Random(f"{self.seed}/{pass_index}").shuffle(order)
            self._shuffled = (pass_index, order)
        return self._shuffled[1][offset]


def prompt_source(
    prompt_function: Any,
    *,
    images_per_prompt: int = 1,
    seed: int = 0,
    process_index: int = 0,
    num_processes: int = 1,
    weight_column: str | None = None,
) -> PromptSource:
    """
    Make a [`PromptSource`] of whatever the user gave as `prompt_function`.

    Args:
        prompt_function (`Callable[[], tuple[str, Any]]`, `list`, `tuple`, `datasets.Dataset` or `str`):
            - a function, as in DDPO: called once per prompt on each process, returns `(prompt, metadata)`;
            - a list or tuple of strings, or of `(prompt, metadata)` pairs: used in shuffled passes, each prompt once
              per pass. The metadata of a bare string is `{}`;
            - a `datasets.Dataset` with a column `"prompt"`: as a list; the other columns of the row are the metadata;
            - a string: that one prompt, always.
        images_per_prompt (`int`, defaults to 1): how many images each prompt drawn is used for.
        seed (`int`, defaults to 0): of the shuffles; the same on every process.
        process_index (`int`, defaults to 0) and num_processes (`int`, defaults to 1): this process among all of them.
        weight_column (`str`, *optional*): column of the dataset, or entry of the metadata of a list, that holds a weight
            w_i >= 0. A pass stays N draws long for N prompts, and in each of them prompt i is drawn N * w_i / sum(w)
            times, rounded down or up at random, with that mean (systematic resampling). `None`: once.

    Returns:
        [`PromptSource`]

    Raises:
        `TypeError`: for another kind of object, or a prompt that is not a string or a weight that is not a number (its
            index and type are named).
        `ValueError`: if there is no prompt, or the dataset has no column `"prompt"`; if a prompt has no weight, a weight
            is negative or not finite, or all are 0; for weights of a function.

    Example:

    ```python
    >>> source = prompt_source(["a cat", "a dog"], images_per_prompt=2)
    >>> prompts, metadata = source.draw(4)
    >>> prompts
    ['a cat', 'a cat', 'a dog', 'a dog']
    ```
    """
    options = {
        "images_per_prompt": images_per_prompt,
        "seed": seed,
        "process_index": process_index,
        "num_processes": num_processes,
    }
    if isinstance(prompt_function, str):
        prompt_function = [prompt_function]
    if isinstance(prompt_function, (list, tuple)):
        prompts, metadata = _read_list(prompt_function)
        weights = None if weight_column is None else _weights_of_list(metadata, weight_column)
        return _ListedPrompts(prompts, metadata.__getitem__, weights, **options)
    # An object of the datasets library can only exist where that library was imported; we need not import it to know.
    library = sys.modules.get("datasets")
    if library is not None and isinstance(prompt_function, library.Dataset):
        prompts, metadata_of = _read_column(prompt_function), _columns_of(prompt_function)
        weights = None if weight_column is None else _weights_of_dataset(prompt_function, weight_column)
        return _ListedPrompts(prompts, metadata_of, weights, **options)
    if library is not None and isinstance(prompt_function, library.DatasetDict):
        raise TypeError(
            f"prompt_function is a datasets.DatasetDict with the splits {sorted(prompt_function)}: pass one of them, "
            f"e.g. dataset[{sorted(prompt_function)[0]!r}]."
        )
    if callable(prompt_function):
        if weight_column is not None:
            raise ValueError(
                f"weight_column = {weight_column!r} with a prompt function: it decides itself how often it returns a "
                "prompt. Draw by the weights inside it, or give a list or a datasets.Dataset."
            )
        return _FunctionPrompts(prompt_function, **options)
    raise TypeError(f"prompt_function must be {_ACCEPTED}; got {_describe(prompt_function)}.")


def _read_list(items: Sequence[Any]) -> tuple[list[str], list[Any]]:
    if not items:
        raise ValueError("prompt_function is an empty list: give at least one prompt.")
    prompts: list[str] = []
    metadata: list[Any] = []
    for index, item in enumerate(items):
        if isinstance(item, str):
            item = (item, {})
        if not (isinstance(item, (tuple, list)) and len(item) == 2 and isinstance(item[0], str)):
            raise TypeError(
                f"entry {index} of the prompts must be a string or a (prompt, metadata) pair; it is "
                f"{_describe(item)}. For rows with columns use datasets.Dataset.from_list."
            )
        prompts.append(item[0])
        metadata.append(item[1])
    return prompts, metadata


def _read_column(dataset: Any) -> list[str]:
    if "prompt" not in dataset.column_names:
        raise ValueError(
            f'the dataset has no column "prompt"; its columns are {dataset.column_names}. Rename one: '
            f'dataset.rename_column("...", "prompt").'
        )
    if len(dataset) == 0:
        raise ValueError("the dataset of prompts is empty: give at least one row.")
    # Only this column, and without the user's format: other columns may hold images that are slow to decode.
    prompts = list(dataset.select_columns("prompt").with_format(None)["prompt"])
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise TypeError(f'row {index} of the column "prompt" must be a string; it is {_describe(prompt)}.')
    return prompts


def _columns_of(dataset: Any) -> Callable[[int], dict[str, Any]]:
    others = dataset.remove_columns("prompt")
    if not others.column_names:
        return lambda row: {}
    return lambda row: others[row]


def _weights_of_list(metadata: Sequence[Any], column: str) -> list[float]:
    for index, entry in enumerate(metadata):
        if not (isinstance(entry, dict) and column in entry):
            has = f"has {sorted(map(str, entry))}" if isinstance(entry, dict) else f"is {_describe(entry)}"
            raise ValueError(
                f"the column of weights (sample_weight_column) is {column!r}, but the metadata of prompt {index} {has}. Write (prompt, {{{column!r}: 1.0}}) "
                "for every prompt."
            )
    return _checked_weights([entry[column] for entry in metadata], column)


def _weights_of_dataset(dataset: Any, column: str) -> list[float]:
    if column not in dataset.column_names:
        raise ValueError(
            f"the column of weights (sample_weight_column) is {column!r}, which is none of the prompts' columns: {dataset.column_names}."
        )
    return _checked_weights(list(dataset.select_columns(column).with_format(None)[column]), column)


def _checked_weights(weights: Sequence[Any], column: str) -> list[float]:
    for row, weight in enumerate(weights):
        if not isinstance(weight, Real) or isinstance(weight, bool):
            raise TypeError(f"row {row} of the weights {column!r} must be a number; it is {_describe(weight)}.")
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"row {row} of the weights {column!r} must be finite and at least 0; it is {weight}.")
    if not any(weights):
        raise ValueError(f"all {len(weights)} weights {column!r} are 0: no prompt could be drawn. Make one positive.")
    return [float(weight) for weight in weights]


def _cumulative(weights: Sequence[float]) -> list[int]:
    """The running sums of the weights over a common denominator: integers, so that equal weights are exactly equal shares."""
    ratios = [weight.as_integer_ratio() for weight in weights]
    denominator = max(below for _, below in ratios)  # powers of two
    return list(accumulate(above * (denominator // below) for above, below in ratios))


def _systematic_counts(bounds: Sequence[int], generator: random.Random) -> list[int]:
    """How often each of N prompts is drawn in a pass of N draws: systematic resampling.

    N equally spaced points, moved by one offset u in [0, 1), are laid over the line on which prompt i has a piece of length
    N * w_i / sum(w); a prompt is drawn for each point in its piece. So its count is that length rounded down or up, its
    mean over u is that length, and the counts add up to N (Kitagawa 1996, "Monte Carlo filter and smoother").
    """
    number, total = len(bounds), bounds[-1]
    offset = generator.getrandbits(53)  # u * 2^53
    # points k + u below the end of a piece: ceil(N * bound / total - u), in integers
    ends = [-((offset * total - (number * bound << 53)) // (total << 53)) for bound in bounds]
    return [end - start for start, end in pairwise([0, *ends])]


def _describe(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} of type {type(value).__name__}"
