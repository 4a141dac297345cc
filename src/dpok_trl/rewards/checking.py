"""`check_reward`: does a reward hold to the contract? A few calls on sample pictures, and what was wrong with them."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from dpok_trl.rewards.base import RewardError, RewardFunction, Scored, _is_numeric, score_batch
from dpok_trl.rewards.binding import BoundReward, RewardInputs, reward_name
from dpok_trl.rewards.pictures import to_tensor
from dpok_trl.rewards.registry import load_reward


SIZE = 64  # pixels on a side of the sample pictures
TOLERANCE = 1e-2  # of the spread of the rewards, which is learned from: kernels round differently in another batch
ROUNDING = 8 * torch.finfo(torch.float32).eps  # of the largest reward, where they lie closer than float32 tells apart

# Sentences that the demo world's rewards can read as well; each for two pictures, so that there are groups.
SAMPLE_PROMPTS = ("a green triangle", "four circles", "a red square and a blue circle") * 2


@dataclass(frozen=True)
class RewardReport:
    """Result of [`check_reward`]; printing it gives a table.

    Args:
        name (`str`): Of the reward, as in metrics.
        problems (`list[str]`): What breaks the contract, in words.
        notes (`list[str]`): What is allowed, and perhaps not meant.
        call (`str`): How the reward is called.
        returned (`str`): What it returned: type, shape, dtype.
        values (`list[float | None]`): The rewards of the sample images; `None` where it does not apply.
        repeat_difference (`float`, *optional*): Largest difference of a reward between two equal calls. `inf` if a reward became another kind, such as NaN.
        order_difference (`float`, *optional*): The same, of the images in another order.
        batch_difference (`float`, *optional*): The same, of the images one at a time. `None`, as the others, where it could not be told.
        first_seconds (`float`, *optional*): The first call, loading included.
        seconds_per_image (`float`, *optional*): Of the second.
    """

    name: str
    problems: list[str]
    notes: list[str] = field(default_factory=list)
    call: str = ""
    returned: str = ""
    values: list[float | None] = field(default_factory=list)
    repeat_difference: float | None = None
    order_difference: float | None = None
    batch_difference: float | None = None
    first_seconds: float | None = None
    seconds_per_image: float | None = None

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        rows = {"called": self.call, "returned": self.returned}
        if self.values:
            rows["rewards"] = _describe_values(self.values)
        differences = {
            "the same call again": self.repeat_difference,
            "in another order": self.order_difference,
            "one image at a time": self.batch_difference,
        }
        rows |= {name: f"differs by {value:.3g}" for name, value in differences.items() if value is not None}
        if self.seconds_per_image is not None:
            rows["time"] = (
                f"{self.seconds_per_image:.3g} s for an image; the first call, loading included, {self.first_seconds:.3g} s"
            )
        lines = [f"{self.name}: {'ok' if self.ok else 'NOT ok'}"]
        lines += [f"  {name:<20} {value}" for name, value in rows.items() if value]
        lines += [f"  problem: {problem}" for problem in self.problems]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def check_reward(
    reward: RewardFunction | str,
    images: Tensor | Sequence[Image.Image] | None = None,
    prompts: Sequence[str] | None = None,
    metadata: Sequence[Any] | None = None,
) -> RewardReport:
    """Calls a reward on sample images, twice, in another order and one at a time, and tells what the trainer would make of it.

    Args:
        reward: A function, the name of a shipped reward, `"module:function"`, or the address of a server.
        images (`torch.Tensor` of shape `(B, 3, H, W)` in [0, 1], or `Sequence[PIL.Image.Image]` of one size, *optional*): Default: six drawings.
        prompts (`Sequence[str]` of length `B`, *optional*)
        metadata (`Sequence` of length `B`, *optional*): For a reward that asks for columns. Default: `{}` for each.

    Returns:
        [`RewardReport`]: Whatever the reward does; an exception that it raises is a problem in the report.

    Raises:
        `TypeError`, `ValueError`: For arguments of this call that cannot be: no function, no reward of that name, images and prompts that differ in number.
    """
    function = load_reward(reward)
    if not callable(function):
        raise TypeError(
            f"reward must be a function, or the name of one; got {function!r} of type {type(function).__name__}."
        )
    inputs = _inputs(images, prompts, metadata)
    try:
        bound = _Recorded(function)
    except TypeError as error:
        return RewardReport(reward_name(function), [str(error)])
    try:
        return _Check(bound, inputs).report()
    except RewardError as error:
        return RewardReport(bound.name, [str(error)], call=_describe_call(bound, inputs))


class _Recorded(BoundReward):
    """Keeps what the function returned last, as it was."""

    returned: Any = None

    def __call__(self, inputs: RewardInputs) -> Any:
        self.returned = super().__call__(inputs)
        return self.returned


class _Check:
    def __init__(self, bound: _Recorded, inputs: RewardInputs):
        self.bound = bound
        self.inputs = inputs
        self.problems: list[str] = []
        self.notes: list[str] = []

    def report(self) -> RewardReport:
        first, first_seconds = self._timed()
        returned = _describe_returned(self.bound.returned)
        self._judge_values(first)
        pairs = zip(first.values.tolist(), first.applies.tolist(), strict=True)
        values = [value if applies else None for value, applies in pairs]
        if first.applies.any() and not _finite(first):  # a server that is away is not asked nine times
            call = _describe_call(self.bound, self.inputs)
            return RewardReport(self.bound.name, self.problems, self.notes, call, returned, values)
        second, seconds = self._timed()
        tolerance = _tolerance(_finite(first))
        repeat, order, batch = _difference(first, second), None, None
        if repeat > tolerance:
            self.problems.append(
                f"the same call gave other rewards, by up to {repeat:.3g}: it is random, or keeps a state between calls. Order and batches were not judged."
            )
        else:
            order = self._in_another_order(first, tolerance)
            batch = None if self.bound.wants_groups else self._one_at_a_time(first, tolerance)
        return RewardReport(
            self.bound.name,
            self.problems,
            self.notes,
            _describe_call(self.bound, self.inputs),
            returned,
            values,
            repeat,
            order,
            batch,
            first_seconds,
            seconds / len(self.inputs),
        )

    def _timed(self) -> tuple[Scored, float]:
        """The whole batch, in images of its own: a reward may write into them."""
        inputs = self.inputs.rows(range(len(self.inputs)))
        started = time.perf_counter()
        scored = score_batch(self.bound, inputs)
        seconds = time.perf_counter() - started
        changed = not torch.equal(inputs.images, self.inputs.images)
        if self.bound.image_type == "pil":
            shown, original = (_pixels(one.pictures) for one in (inputs, self.inputs))
            changed = shown != original
        message = "it writes into the images, which the other rewards and the trainer see too: work on a copy."
        if changed and message not in self.problems:
            self.problems.append(message)
        return scored, seconds

    def _judge_values(self, scored: Scored) -> None:
        if not scored.applies.any():
            self.problems.append(
                "it returned None for every image, so there was nothing to judge: give images, prompts and metadata that it applies to."
            )
            return
        values = scored.values[scored.applies]
        bad = int((~values.isfinite()).sum())
        if bad:
            self.problems.append(
                f"{bad} of {len(values)} rewards are not finite ({int(values.isnan().sum())} NaN, {int(values.isinf().sum())} infinite). The trainer leaves such "
                "images out, or stops (reward_on_error); where a reward does not apply, return None. Where a server failed, the log says why."
            )
        finite = _finite(scored)
        if len(finite) > 1 and max(finite) == min(finite):
            self.notes.append(
                f"all sample images got {finite[0]:g}. From equal rewards nothing is learned; try images of yours."
            )

    def _in_another_order(self, first: Scored, tolerance: float) -> float | None:
        order = list(range(len(self.inputs)))[::-1]
        try:
            other = score_batch(self.bound, self.inputs.rows(order))
        except RewardError as error:
            self.problems.append(f"with the images in another order it fails: {error}")
            return None
        difference = _difference(Scored(first.values[order], first.applies[order], None), other)
        if difference > tolerance:
            self.problems.append(
                f"with the images in another order, an image got another reward, by up to {difference:.3g}: rewards and images are mixed up, or depend on "
                "their place in the batch."
            )
        return difference

    def _one_at_a_time(self, first: Scored, tolerance: float) -> float | None:
        try:
            parts = [score_batch(self.bound, self.inputs.rows([row])) for row in range(len(self.inputs))]
        except RewardError as error:
            self.problems.append(f"with one image at a time it fails: {error}")
            return None
        joined = Scored(torch.cat([p.values for p in parts]), torch.cat([p.applies for p in parts]), None)
        difference = _difference(first, joined)
        if difference > tolerance:
            self.problems.append(
                f"with one image at a time, an image got another reward, by up to {difference:.3g}: it depends on the other images of the call, which are "
                "others with another batch size. A reward of a prompt's images together says so by wants_groups = True."
            )
        return difference


def _finite(scored: Scored) -> list[float]:
    return scored.values[scored.applies & scored.values.isfinite()].tolist()


def _tolerance(values: list[float]) -> float:
    if not values:
        return 0.0
    return max(TOLERANCE * (max(values) - min(values)), ROUNDING * max(map(abs, values)))


def _difference(one: Scored, other: Scored) -> float:
    """The largest, of rewards that are finite in both; infinite if one is finite, or applies, where the other does not."""
    finite = one.applies & one.values.isfinite()
    if not torch.equal(one.applies, other.applies) or not torch.equal(finite, other.applies & other.values.isfinite()):
        return math.inf
    return (one.values[finite] - other.values[finite]).abs().max().item() if finite.any() else 0.0


# --- samples ----------------------------------------------------------------------------------------------------------


def _inputs(
    images: Tensor | Sequence[Image.Image] | None, prompts: Sequence[str] | None, metadata: Sequence[Any] | None
) -> RewardInputs:
    if isinstance(prompts, str):
        raise TypeError(f"prompts must be a list of strings, one for each image; got the string {prompts!r}.")
    if images is not None and not isinstance(images, Tensor):
        others = [image for image in images if not isinstance(image, Image.Image)]
        if others:
            raise TypeError(f"images must be a tensor or PIL pictures; got a {type(others[0]).__name__} among them.")
    count = next((len(given) for given in (images, prompts, metadata) if given is not None), len(SAMPLE_PROMPTS))
    if count < 1:
        raise ValueError("at least one image is needed.")
    if prompts is None:
        prompts = (
            ["a picture"] * count if images is not None else [_cycled(SAMPLE_PROMPTS, row) for row in range(count)]
        )
    if images is None:
        drawings = sample_pictures()
        images = [_cycled(drawings, row) for row in range(count)]
    if metadata is None:
        metadata = [{}] * count
    if not len(images) == len(prompts) == len(metadata):
        raise ValueError(
            f"images, prompts and metadata must be equally many; got {len(images)}, {len(prompts)} and {len(metadata)}."
        )
    return RewardInputs(_as_tensor(images), tuple(prompts), tuple(metadata))


def _as_tensor(images: Tensor | Sequence[Image.Image]) -> Tensor:
    if not isinstance(images, Tensor):
        return to_tensor(images)
    if images.ndim not in (4, 5) or images.shape[-3] != 3 or not images.is_floating_point():
        raise ValueError(
            f"images must be floating point, of shape (B, 3, H, W) or (B, F, 3, H, W); got {images.dtype} of shape {tuple(images.shape)}."
        )
    if images.min() < 0 or images.max() > 1:
        raise ValueError(f"images must be in [0, 1]; got {images.min():g} to {images.max():g}.")
    return images


def _cycled(items: Sequence[Any], row: int) -> Any:
    return items[row % len(items)]


def sample_pictures() -> list[Image.Image]:
    """Six small pictures: what the three sample prompts ask for, and then noise, a gradient and an empty canvas."""
    half, quarter = SIZE // 2, SIZE // 4
    drawn = [Image.new("RGB", (SIZE, SIZE), (225, 225, 225)) for _ in range(4)]
    triangle, circles, pair, empty = drawn
    ImageDraw.Draw(triangle).polygon(
        [(half, quarter), (quarter, SIZE - quarter), (SIZE - quarter, SIZE - quarter)], (40, 160, 60)
    )
    for x in (quarter, 3 * quarter):
        for y in (quarter, 3 * quarter):
            ImageDraw.Draw(circles).ellipse([x - 8, y - 8, x + 8, y + 8], (50, 80, 200))
    ImageDraw.Draw(pair).rectangle([6, half - 10, 26, half + 10], (210, 40, 40))
    ImageDraw.Draw(pair).ellipse([38, half - 10, 58, half + 10], (50, 80, 200))
    noise = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    ramp = np.linspace(0, 255, SIZE, dtype=np.uint8)
    gradient = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :], np.uint8(90)), axis=-1)
    return [triangle, circles, pair, Image.fromarray(noise), Image.fromarray(gradient), empty]


def _pixels(pictures: Sequence[Any]) -> list[bytes]:
    frames = [frame for one in pictures for frame in (one if isinstance(one, list) else [one])]
    return [frame.tobytes() for frame in frames]


# --- words ------------------------------------------------------------------------------------------------------------


def _describe_call(bound: BoundReward, inputs: RewardInputs) -> str:
    kinds = {"pil": "PIL pictures", "pt": "a tensor"}
    details = [f"with {len(inputs)} images as {kinds[bound.image_type]}"]
    if bound.wants_groups:
        details.append("once for each prompt")
    if bound.overlaps:
        details.append("in a thread while images are sampled")
    return ", ".join(details)


def _describe_returned(value: Any) -> str:
    """In the order in which `score_batch` reads it."""
    if isinstance(value, tuple) and len(value) == 2 and not _is_numeric(value[1]):
        return f"{_describe_returned(value[0])}, and info ({type(value[1]).__name__})"
    for attribute in ("rewards", "logits"):
        if hasattr(value, attribute):
            return f"an object of type {type(value).__name__} with {attribute}: {_describe_returned(getattr(value, attribute))}"
    if isinstance(value, Tensor):
        return f"tensor of shape {tuple(value.shape)}, {str(value.dtype).removeprefix('torch.')}, on {value.device}"
    if isinstance(value, np.ndarray):
        return f"numpy array of shape {value.shape}, {value.dtype}"
    if isinstance(value, (list, tuple)):
        kinds = dict.fromkeys("None" if item is None else type(item).__name__ for item in value)
        return f"{type(value).__name__} of {len(value)}: {', '.join(kinds)}"
    return f"an object of type {type(value).__name__}"


def _describe_values(values: Sequence[float | None]) -> str:
    apply = [value for value in values if value is not None]
    finite = [value for value in apply if math.isfinite(value)]
    parts = []
    if finite:
        deviation = float(np.std(finite))
        parts.append(
            f"{min(finite):.4g} to {max(finite):.4g}, mean {np.mean(finite):.4g}, standard deviation {deviation:.3g}"
        )
    if len(finite) < len(apply):
        parts.append(f"{len(apply) - len(finite)} not finite")
    if len(apply) < len(values):
        parts.append(f"{len(values) - len(apply)} of {len(values)} None (does not apply)")
    return "; ".join(parts)
