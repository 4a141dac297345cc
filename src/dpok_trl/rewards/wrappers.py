"""Rewards made of a reward: clipped, standardised, negated, remembered. They compose."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import pickle
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dpok_trl.core.advantages import BATCH_EPSILON
from dpok_trl.rewards.base import Scored, score_batch
from dpok_trl.rewards.binding import BoundReward, RewardInputs, TrainerState
from dpok_trl.rewards.registry import load_reward


class _GivenInputs(RewardInputs):
    """Inputs whose images already are what the reward takes, pictures or a tensor."""

    @cached_property
    def pictures(self) -> Any:
        return self.images

    def rows(self, indices: Sequence[int]) -> RewardInputs:
        some = {name: [getattr(self, name)[index] for index in indices] for name in ("images", "prompts", "metadata")}
        if isinstance(self.images, Tensor):
            some["images"] = torch.stack(some["images"])
        return dataclasses.replace(self, **some)


class _Wrapper:
    """
    Asks another reward. What fails (NaN, infinite) and what does not apply (`None`) stays what it is.

    It keeps the reward's `image_type`, `overlaps` and `wants_groups`, its columns, its `to` and `device` if it has them, and its `info` under a new name.
    """

    verb: str

    def __init__(self, reward: Any):
        self.bound = reward if isinstance(reward, BoundReward) else BoundReward(load_reward(reward))
        self.image_type = self.bound.image_type
        self.overlaps = self.bound.overlaps
        self.wants_groups = self.bound.wants_groups
        self.__name__ = f"{self.verb}({self.bound.name})"
        info = getattr(self.bound.function, "info", None)
        if info is not None:
            self.info = dataclasses.replace(info, name=self.__name__, range=self._range(info.range))
        if hasattr(self.bound.function, "to"):
            self.to = self._to  # only then: what has `to` is taken for something with a network

    @property
    def device(self) -> torch.device | None:
        """The reward's; `None` where it is not decided. An `AttributeError` where the reward has none, so that the wrapper has none either."""
        return self.bound.function.device

    def __call__(
        self,
        images: Any,
        prompts: Sequence[str],
        metadata: Sequence[Any] | None = None,
        trainer_state: TrainerState | None = None,
        log_metric: Any = None,
    ) -> tuple[list[float | None], Any]:
        """
        Args:
            images: A list of pictures or a tensor, as the reward takes them.
            prompts (`Sequence[str]` of length `B`)
            metadata (`Sequence` of length `B`, *optional*): What came with each prompt; the reward's columns are taken from it.

        Returns:
            `tuple[list, Any]`: The rewards, `None` where they do not apply, and the info of the reward.
        """
        metadata = [{} for _ in prompts] if metadata is None else metadata
        logging = {} if log_metric is None else {"log_metric": log_metric}
        inputs = _GivenInputs(images, tuple(prompts), tuple(metadata), trainer_state, **logging)
        scored = self._score(inputs)
        values = scored.values.clone()
        finite = scored.applies & values.isfinite()
        if finite.any():
            values[finite] = self._changed(values[finite])
        pairs = zip(values.tolist(), scored.applies.tolist(), strict=True)
        return [value if applies else None for value, applies in pairs], scored.info

    def _score(self, inputs: RewardInputs) -> Scored:
        return score_batch(self.bound, inputs)

    def _changed(self, values: Tensor) -> Tensor:
        """The wrapper's own part, for finite rewards that apply, at least one."""
        return values

    def _range(self, range: str) -> str:
        return range

    def _to(self, device: str | torch.device) -> _Wrapper:
        self.bound.function.to(device)
        return self


class Clipped(_Wrapper):
    """
    A reward that is never below `low` nor above `high`: what goes beyond is not worth more, so it is no use to hack.

    Args:
        reward: A function, the name of a shipped reward, `"module:function"` or an address.
        low, high (`float`, *optional*): Bounds; one of them may be left out.

    A reward that is infinite has failed, and stays infinite.
    """

    verb = "clipped"

    def __init__(self, reward: Any, low: float | None = None, high: float | None = None):
        if low is None and high is None:
            raise ValueError("Clipped needs `low`, `high` or both.")
        if low is not None and high is not None and not low < high:
            raise ValueError(f"Clipped needs `low` below `high`; got {low} and {high}.")
        self.low, self.high = low, high
        super().__init__(reward)

    def _changed(self, values: Tensor) -> Tensor:
        return values.clamp(self.low, self.high)

    def _range(self, range: str) -> str:
        low, high = -math.inf if self.low is None else self.low, math.inf if self.high is None else self.high
        return f"[{low:g}, {high:g}]"


class Negated(_Wrapper):
    """
    Minus a reward: less is better. For `"jpeg-incompressibility"` there is `"jpeg-compressibility"` already.

    Args:
        reward: A function, the name of a shipped reward, `"module:function"` or an address.
    """

    verb = "negated"

    def _changed(self, values: Tensor) -> Tensor:
        return -values

    def _range(self, range: str) -> str:
        return f"minus: {range}"


class Standardized(_Wrapper):
    """
    `(reward - mean) / std`, so that rewards of different scale can be added.

    Args:
        reward: A function, the name of a shipped reward, `"module:function"` or an address.
        mean, std (`float`, *optional*): Of the reward, both or none; for the shipped ones see `info.range`. **Better given**: the scale then is the same in
            each round, on each process and after a resume.
        momentum (`float`): Without `mean` and `std` they are running statistics: each call moves them by this share towards its own finite rewards, *before*
            these are standardised. The first call sets them.

    Running statistics are those of one process and of one object: they follow the order of the calls (with `overlaps`, that of threads), they are not in
    the trainer's checkpoints (`state_dict` and `load_state_dict` are there to keep them), and a reward that rises does not show as a rise.
    Advantages subtract a mean anyway, so what matters is the scale. A reward that `wants_groups` needs `mean` and `std`.
    """

    verb = "standardized"

    def __init__(self, reward: Any, mean: float | None = None, std: float | None = None, momentum: float = 0.1):
        if (mean is None) != (std is None):
            raise ValueError(f"Standardized needs both mean and std, or none; got mean={mean} and std={std}.")
        if std is not None and not std > 0:
            raise ValueError(f"Standardized needs a std above 0; got {std}.")
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum must be above 0 and at most 1; got {momentum}.")
        super().__init__(reward)
        self.running = mean is None
        if self.running and self.wants_groups:
            raise ValueError(
                f"{self.bound.name} is a reward of all images of a prompt together, so each prompt would move the running statistics by itself: give mean "
                "and std."
            )
        self.momentum = momentum
        self.mean = mean
        self.variance = None if std is None else std**2
        self._lock = threading.Lock()  # with `overlaps`, several threads call

    def _changed(self, values: Tensor) -> Tensor:
        exact = values.double()
        with self._lock:
            if self.running:
                self._follow(exact.mean().item(), exact.var(correction=0).item())
            mean, std = self.mean, self.variance**0.5
        return ((exact - mean) / (std if not self.running else std + BATCH_EPSILON)).float()

    def _follow(self, mean: float, variance: float) -> None:
        """The mean and variance of a mixture: `1 - momentum` of what was seen so far, `momentum` of this call."""
        if self.mean is None:
            self.mean, self.variance = mean, variance
            return
        share, away = self.momentum, mean - self.mean
        self.variance = (1 - share) * self.variance + share * variance + share * (1 - share) * away**2
        self.mean += share * away

    def _range(self, range: str) -> str:
        return "about mean 0, standard deviation 1"

    def state_dict(self) -> dict[str, float | None]:
        """The statistics; `None` before the first call."""
        with self._lock:
            return {"mean": self.mean, "variance": self.variance}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """Goes on from statistics that [`~Standardized.state_dict`] gave."""
        with self._lock:
            self.mean, self.variance = state["mean"], state["variance"]


class Cached(_Wrapper):
    """
    Asks a reward once about the same picture, prompt and metadata: for evaluations that come back to the same images, and for servers that cost money.

    Args:
        reward: A function, the name of a shipped reward, `"module:function"` or an address. Not one that is random, or that depends on anything but these
            three. The info it returns is not kept.
        size (`int`): Rewards to remember; the one that was not asked for the longest goes first.

    Rewards that failed (NaN, infinite) are asked again. `hits` and `misses` count the images.
    """

    verb = "cached"

    def __init__(self, reward: Any, size: int = 10_000):
        super().__init__(reward)
        if size < 1:
            raise ValueError(f"Cached needs a size of at least 1; got {size}.")
        if self.wants_groups:
            raise ValueError(
                f"{self.bound.name} is a reward of all images of a prompt together, so it cannot be remembered for one of them."
            )
        self.size = size
        self.hits = self.misses = 0
        self._known: OrderedDict[bytes, float | None] = OrderedDict()
        self._lock = threading.Lock()

    def _score(self, inputs: RewardInputs) -> Scored:
        keys = [_key(*sample) for sample in zip(inputs.images, inputs.prompts, inputs.metadata, strict=True)]
        with self._lock:
            found = {key: self._known[key] for key in keys if key in self._known}
            for key in found:
                self._known.move_to_end(key)
        unknown = {key: row for row, key in enumerate(keys) if key not in found}  # each picture once
        if unknown:
            scored = super()._score(inputs.rows(list(unknown.values())))
            values = zip(scored.values.tolist(), scored.applies.tolist(), strict=True)
            asked = {key: value if applies else None for key, (value, applies) in zip(unknown, values, strict=True)}
            found |= asked
            with self._lock:
                self._known.update(
                    (key, value) for key, value in asked.items() if value is None or math.isfinite(value)
                )
                while len(self._known) > self.size:
                    self._known.popitem(last=False)
        with self._lock:
            self.misses += len(unknown)
            self.hits += len(keys) - len(unknown)
        rewards = [found[key] for key in keys]
        applies = torch.tensor([reward is not None for reward in rewards], dtype=torch.bool)
        return Scored(torch.tensor([math.nan if reward is None else reward for reward in rewards]), applies, {})


def _key(image: Any, prompt: str, metadata: Any) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in (*_bytes(image), prompt.encode(), pickle.dumps(metadata)):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


def _bytes(image: Any) -> list[bytes]:
    """All that makes a tensor, a picture, or the frames of a video what it is."""
    if isinstance(image, Tensor):
        pixels = image.detach().cpu().contiguous()
        return [f"{pixels.dtype} {tuple(pixels.shape)}".encode(), pixels.flatten().view(torch.uint8).numpy().tobytes()]
    if isinstance(image, (list, tuple)):
        return [part for frame in image for part in _bytes(frame)]
    return [f"{image.mode} {image.size} {image.getpalette()}".encode(), image.tobytes()]
