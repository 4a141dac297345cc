"""Several rewards into one number per image."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from dpok_trl.rewards.base import refuse_nonfinite, score_batch
from dpok_trl.rewards.binding import BoundReward, RewardInputs
from dpok_trl.rewards.registry import load_reward


Aggregation = Literal["sum", "normalize_then_sum"]
OnError = Literal["mask", "raise"]

EPSILON = 1e-8  # of the standard deviation of a prompt's rewards, as in the advantages


@dataclass
class Scores:
    """What `K` rewards said of one batch.

    Args:
        values (`torch.Tensor` of shape `(B, K)`): float32, CPU; not finite where a reward failed, NaN where it does not apply.
        applies (`torch.Tensor` of shape `(B, K)`, bool): False where a reward returned `None`.
        info (`Any`): Of the reward, if there is one; else a dict by name.
        seconds (`list[float]` of length `K`): Spent in each.
        metrics (`dict[str, list[float]]`): What rewards logged.
    """

    values: torch.Tensor
    applies: torch.Tensor
    info: Any
    seconds: list[float]
    metrics: dict[str, list[float]] = field(default_factory=dict)


class RewardSet:
    """The rewards of a run.

    Args:
        rewards: A reward, a list of them, or a dict from names to them. A reward is a function (see [`~dpok_trl.rewards.binding.BoundReward`]), the name of a
            shipped one, `"module:function"`, or the address of a server (`"http://..."`).
        weights (`Sequence[float]` or `Mapping[str, float]`, *optional*): One for each; 1 by default.
        aggregation (`"sum"` or `"normalize_then_sum"`): Of the weighted rewards as they are, or of each after it was normalised over the images of its prompt,
            for rewards of very different scale (GDPO, https://arxiv.org/abs/2601.05242).
        on_error (`"mask"` or `"raise"`): What a reward that is NaN or infinite does: the image is left out of the update and of every statistic, or the run
            stops. A whole round of them always stops it.
        device (`torch.device` or `str`, *optional*): Where rewards run that are given by name, or as objects without a device of their own. Others stay where
            they are.

    Raises:
        `ValueError`: For unknown names, and weights that do not fit the rewards; with both numbers.
        `TypeError`: For what cannot be called.
    """

    def __init__(
        self,
        rewards: Any,
        weights: Sequence[float] | Mapping[str, float] | None = None,
        aggregation: Aggregation = "sum",
        on_error: OnError = "mask",
        device: torch.device | str | None = None,
    ):
        if isinstance(rewards, Mapping):
            named = [(str(name), reward) for name, reward in rewards.items()]
        else:
            named = [(None, reward) for reward in (rewards if isinstance(rewards, (list, tuple)) else [rewards])]
        if not named:
            raise ValueError("no reward was given; at least one is needed.")
        self.rewards = _with_distinct_names([BoundReward(_made(reward, device), name) for name, reward in named])
        self.weights = torch.tensor(_in_order(weights, self.names))
        self.aggregation = aggregation
        self.on_error = on_error

    @property
    def names(self) -> list[str]:
        return [reward.name for reward in self.rewards]

    def __len__(self) -> int:
        return len(self.rewards)

    def to(self, device: torch.device | str) -> None:
        """Moves the rewards that run a network, but for those that overlap with sampling: a thread may be using them."""
        for function in self._networks():
            function.to(device)

    @property
    def have_networks(self) -> bool:
        """Whether [`~RewardSet.to`] moves anything."""
        return len(self._networks()) > 0

    def _networks(self) -> list[Any]:
        return [one.function for one in self.rewards if hasattr(one.function, "to") and not one.overlaps]

    def score(self, inputs: RewardInputs, which: Sequence[int] | None = None) -> Scores:
        """Asks the rewards (all, or those at the indices `which`) about one batch.

        Raises:
            [`RewardError`]: If one raises or returns something else than one number per image; with `on_error="raise"` for a value that is not finite.
        """
        chosen = [self.rewards[index] for index in (range(len(self)) if which is None else which)]
        columns, infos, seconds = [], {}, []
        metrics: dict[str, list[float]] = {}
        for reward in chosen:
            started = time.monotonic()
            logged = replace(
                inputs,
                log_metric=lambda name, value, reward=reward: metrics.setdefault(
                    _metric(reward.name, name), []
                ).append(float(value)),
            )
            scored = score_batch(reward, logged)
            seconds.append(time.monotonic() - started)
            if self.on_error == "raise":
                refuse_nonfinite(reward.name, scored.values, scored.applies, inputs.prompts)
            columns.append(scored)
            infos[reward.name] = scored.info
        return Scores(
            torch.stack([scored.values for scored in columns], dim=1),
            torch.stack([scored.applies for scored in columns], dim=1),
            next(iter(infos.values())) if len(self) == 1 else infos,
            seconds,
            metrics,
        )

    def total(
        self, values: torch.Tensor, applies: torch.Tensor, prompts: Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One number per image.

        Args:
            values, applies (`torch.Tensor` of shape `(N, K)`): Of all processes.
            prompts (`Sequence[str]` of length `N`)

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: The weighted sum of the rewards that apply, `(N,)`, float32; and which images count, `(N,)`, bool: those that no
            reward failed for and at least one applies to, with a finite sum. The sum of an image that does not count is NaN.
        """
        counts = (~applies | values.isfinite()).all(dim=1) & applies.any(dim=1)
        used = applies & counts[:, None]
        values = torch.where(used, values, 0.0)
        if self.aggregation == "normalize_then_sum":
            values = _normalized(values, used, prompts)
        total = (values * self.weights).sum(dim=1)
        counts &= total.isfinite()  # a sum may overflow
        return torch.where(counts, total, torch.nan), counts


def _metric(reward: str, name: str) -> str:
    if name in ("mean", "std", "nonfinite", "seconds"):
        raise ValueError(
            f"log_metric('{name}') would write over the trainer's own rewards/{reward}/{name}; choose another name."
        )
    return f"rewards/{reward}/{name}"


def join_scores(parts: Sequence[tuple[Sequence[int], Scores]]) -> Scores:
    """The scores of all rewards of a set, from parts that were asked at different times, each with the indices of its rewards."""
    if len(parts) == 1:
        return parts[0][1]
    order = sorted(
        (index, part, column) for part, (indices, _) in enumerate(parts) for column, index in enumerate(indices)
    )
    scores = [one for _, one in parts]
    return Scores(
        torch.stack([scores[part].values[:, column] for _, part, column in order], dim=1),
        torch.stack([scores[part].applies[:, column] for _, part, column in order], dim=1),
        {name: info for one in scores for name, info in one.info.items()},
        [scores[part].seconds[column] for _, part, column in order],
        {name: numbers for one in scores for name, numbers in one.metrics.items()},
    )


def _normalized(values: torch.Tensor, used: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    """Each reward less its mean and over its standard deviation, over the images of the same prompt; 0 where it is not used."""
    normalized = torch.zeros_like(values)
    for prompt in dict.fromkeys(prompts):
        rows = torch.tensor([index for index, other in enumerate(prompts) if other == prompt])
        for column in range(values.shape[1]):
            group = rows[used[rows, column]]
            if len(group):
                # in float32 the mean of equal rewards is another number, and so is their deviation
                scores = values[group, column].double()
                spread = scores.std(correction=0) if scores.min() < scores.max() else torch.inf
                normalized[group, column] = ((scores - scores.mean()) / (spread + EPSILON)).float()
    return normalized


def _made(reward: Any, device: torch.device | str | None) -> Any:
    function = load_reward(reward)
    undecided = isinstance(reward, str) or getattr(function, "device", device) is None
    if undecided and device is not None and hasattr(function, "to"):
        function.to(device)
    return function


def _with_distinct_names(rewards: list[BoundReward]) -> list[BoundReward]:
    """`<lambda>`, `<lambda>_2` ...: two rewards of one name would write over each other's metrics."""
    taken: set[str] = set()
    for reward in rewards:
        name = reward.name
        for number in itertools.count(2):
            if reward.name not in taken:
                break
            reward.name = f"{name}_{number}"
        taken.add(reward.name)
    return rewards


def _in_order(weights: Sequence[float] | Mapping[str, float] | None, names: list[str]) -> list[float]:
    if weights is None:
        return [1.0] * len(names)
    numbers = list(weights.values() if isinstance(weights, Mapping) else weights)
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"reward_weights must be finite numbers; got {numbers}.")
    if isinstance(weights, Mapping):
        if set(weights) != set(names):
            raise ValueError(
                f"reward_weights has the names {', '.join(weights)}, and the rewards are {', '.join(names)}."
            )
        return [float(weights[name]) for name in names]
    if len(weights) != len(names):
        raise ValueError(
            f"reward_weights has {len(weights)} numbers for {len(names)} rewards ({', '.join(names)}); give one for each, or leave it out for 1 each."
        )
    return [float(weight) for weight in weights]
