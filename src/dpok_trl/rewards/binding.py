"""What a reward asks for: read off its signature once, and handed over by name."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import torch
from PIL import Image


# parameter name -> what is handed over
NAMES = {
    "images": "images",
    "image": "images",
    "prompts": "prompts",
    "prompt": "prompts",
    "texts": "prompts",
    "captions": "prompts",
    "metadata": "metadata",
    "prompt_metadata": "metadata",
    "trainer_state": "trainer_state",
    "log_metric": "log_metric",
}


@dataclass(frozen=True)
class TrainerState:
    """Where a run is, for rewards that ask for `trainer_state`."""

    epoch: int
    global_step: int


@dataclass(frozen=True)
class RewardInputs:
    """One batch as rewards see it.

    Args:
        images (`torch.Tensor` of shape `(B, 3, H, W)`, or `(B, F, 3, H, W)` for videos): In [0, 1].
        prompts (`tuple[str, ...]` of length `B`)
        metadata (`tuple` of length `B`): What came with each prompt; its entries, where it is a dict, are the columns a reward may ask for.
        trainer_state ([`TrainerState`], *optional*): `None` outside a run.
        log_metric (`Callable[[str, float], None]`): Adds a number to the metrics of the round.
    """

    images: torch.Tensor
    prompts: tuple[str, ...]
    metadata: tuple[Any, ...]
    trainer_state: TrainerState | None = None
    log_metric: Callable[[str, float], None] = field(default=lambda name, value: None)
    _made: list[list[Any]] = field(default_factory=list, repr=False, compare=False)  # the pictures; shared by copies
    _making: Any = field(default_factory=Lock, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def pictures(self) -> list[Any]:
        """8-bit RGB pictures; for each video the list of its frames. Made once, whoever asks."""
        with self._making:  # rewards may run in threads
            if not self._made:
                self._made.append(self._pictures())
        return self._made[0]

    def _pictures(self) -> list[Any]:
        pixels = (self.images.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8).movedim(-3, -1).numpy()
        if pixels.ndim == 4:
            return [Image.fromarray(picture) for picture in pixels]
        return [[Image.fromarray(frame) for frame in video] for video in pixels]

    def columns(self) -> list[str]:
        """The entries that the metadata of every sample has."""
        if not all(isinstance(entry, dict) for entry in self.metadata):
            return []
        names = [name for name in self.metadata[0] if isinstance(name, str)]  # others can be no parameters
        return [name for name in names if all(name in entry for entry in self.metadata)]

    def rows(self, indices: Sequence[int]) -> RewardInputs:
        """Some samples, in the given order."""
        return RewardInputs(
            self.images[torch.tensor(indices, device=self.images.device)],
            tuple(self.prompts[index] for index in indices),
            tuple(self.metadata[index] for index in indices),
            self.trainer_state,
            self.log_metric,
        )


class BoundReward:
    """A reward function and how to call it.

    Args:
        function (`Callable`): A function, a callable object, an `nn.Module`, a coroutine function. Its parameters are bound **by name**: `images`, `prompts`,
            `metadata`, `trainer_state`, `log_metric`, and any entry of the prompt metadata (a dataset's columns); `**kwargs` gets all columns. A function
            of `(images, prompts, metadata)`, or of three parameters of any other names, is called as DDPO calls it, by position and with tensors; one or two
            parameters of other names are the images and the prompts.
        name (`str`, *optional*): In metrics and messages. Default: the function's.

    Attributes of `function` that are heeded: `image_type` (`"pil"`: a list of RGB pictures, the default for calls by name; `"pt"`: the tensor),
    `overlaps` (may run in a thread while images are sampled), `wants_groups` (called for each prompt with all of its images in the batch).

    Raises:
        `TypeError`: If it is not callable, or its parameters cannot be told apart; the message names them.
    """

    def __init__(self, function: Callable[..., Any], name: str | None = None):
        if not callable(function):
            raise TypeError(
                f"a reward must be a function of (images, prompts, metadata); got {function!r} of type {type(function).__name__}."
            )
        self.function = function
        self.name = reward_name(function) if name is None else name
        self._positions, self._keywords, self._optional, self._takes_columns = _read_signature(function, self.name)
        default = "pt" if len(self._positions) == 3 else "pil"
        innermost = _without_partials(function)
        self.image_type: str = getattr(innermost, "image_type", default)
        if self.image_type not in ("pil", "pt"):
            raise TypeError(f"image_type of {self.name} is {self.image_type!r}, but it must be 'pil' or 'pt'.")
        self.overlaps: bool = getattr(innermost, "overlaps", False)
        self.wants_groups: bool = getattr(innermost, "wants_groups", False)

    def __call__(self, inputs: RewardInputs) -> Any:
        """What the function returns for a batch; a coroutine is run to its end."""
        columns = inputs.columns()
        missing = [name for name in self._keywords if name not in NAMES and name not in columns]
        if missing:
            raise TypeError(
                f"the reward {self.name} asks for {', '.join(missing)}, and the prompts come with "
                f"{', '.join(columns) or 'no such columns'}. A parameter is images, prompts, metadata, trainer_state, log_metric, or an entry of the "
                "metadata of every prompt (a column of the dataset)."
            )
        both = [name for name in self._keywords if name in NAMES and name in columns]
        if both:
            raise TypeError(
                f"the parameter {', '.join(both)} of the reward {self.name} is also a column of the prompts' metadata, and stands for the {NAMES[both[0]]} here. "
                "Rename the column, or take the parameter's other name (images or image; prompts, prompt, texts or captions; metadata or prompt_metadata)."
            )
        arguments = {name: self._value(NAMES.get(name), name, inputs) for name in self._keywords}
        offered = columns if self._takes_columns else [name for name in self._optional if name in columns]
        taken = {*arguments, *_set_by_partial(self.function)}
        arguments.update({name: self._value(None, name, inputs) for name in offered if name not in taken})
        result = self.function(*(self._value(kind, kind, inputs) for kind in self._positions), **arguments)
        return _finished(result) if inspect.isawaitable(result) else result

    def _value(self, kind: str | None, name: str, inputs: RewardInputs) -> Any:
        if kind is None:
            return [entry[name] for entry in inputs.metadata]
        if kind == "images":
            return inputs.images if self.image_type == "pt" else list(inputs.pictures)
        return getattr(inputs, kind)


def _finished(result: Any) -> Any:
    """What a coroutine returns. It gets a loop of its own, in a thread if this one has a loop that runs, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(_awaited(result))
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(asyncio.run, _awaited(result)).result()


async def _awaited(result: Any) -> Any:
    with torch.no_grad():  # which is a thread's own
        return await result


def _without_partials(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _set_by_partial(function: Any) -> dict[str, Any]:
    """Arguments that stay as they are."""
    return function.keywords if isinstance(function, functools.partial) else {}


def reward_name(function: Any) -> str:
    """The name a reward has in messages and metrics: a shipped one's own, else that of the function, or of the class of a callable object."""
    function = _without_partials(function)
    info = getattr(function, "info", None)
    name: str = getattr(info, "name", None) or getattr(function, "__name__", type(function).__name__)
    return name


def _read_signature(function: Any, name: str) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], bool]:
    """What is handed over by position, what by name, which columns are taken where there are some, and whether all are (`**kwargs`)."""
    ddpo = ("images", "prompts", "metadata")
    innermost = _without_partials(function)
    target = function
    if isinstance(innermost, torch.nn.Module):  # whose own signature says nothing
        target = innermost.forward
        if isinstance(function, functools.partial):
            target = functools.partial(target, *function.args, **function.keywords)
    try:
        parameters = list(inspect.signature(target).parameters.values())
    except ValueError:  # built in C: no signature to read
        return ddpo, (), (), False
    if any(
        p.kind is p.VAR_POSITIONAL for p in parameters
    ):  # a decorator that hides what it wraps: as DDPO would call it
        return ddpo, (), (), False
    takes_columns = any(p.kind is p.VAR_KEYWORD for p in parameters)
    bound = _set_by_partial(function)
    named = [p for p in parameters if p.kind is not p.VAR_KEYWORD and p.name not in bound]
    required = [p.name for p in named if p.default is p.empty]
    in_place = [p.name for p in named if p.kind is not p.KEYWORD_ONLY]
    if set(required) <= set(in_place[:3]):  # else they cannot be given by position
        if [NAMES[p.name] for p in named if p.name in NAMES] == [NAMES.get(p) for p in in_place[:3]] == list(ddpo):
            return ddpo, (), tuple(p.name for p in named if p.name not in in_place[:3]), takes_columns
        if required and not any(NAMES.get(parameter) for parameter in required):
            return ddpo[: len(required)], (), (), False
    keywords = [p.name for p in named if p.name in NAMES or p.default is p.empty]
    optional = [p.name for p in named if p.name not in keywords]
    given = {NAMES.get(keyword) for keyword in [*keywords, *bound]}
    if takes_columns:
        keywords += [kind for kind in ddpo if kind not in given]
    elif "images" not in given:
        raise TypeError(
            f"the reward {name} has the parameters {', '.join(p.name for p in parameters) or 'none'}, and none of them takes the images. Name it `images` (and "
            "`prompts`, `metadata`, or a column of the dataset), or write a function of (images, prompts, metadata)."
        )
    return (), tuple(keywords), tuple(optional), takes_columns
