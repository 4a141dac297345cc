"""From rewards to advantages: how much better than expected a trajectory turned out.

Everything here takes the rewards of the whole batch, gathered from all ranks, and gives each trajectory the same
advantage in whatever order they come: sums are exact (`math.fsum`), so not even rounding depends on how a batch was
split.
"""

import math
import random
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


# As in DDPO (arXiv:2305.13301; kvablack/ddpo-pytorch, which TRL took over).
BATCH_EPSILON = 1e-8
TRACKER_EPSILON = 1e-6
# As in Flow-GRPO (arXiv:2505.05470): larger, since the std of a small group is often next to nothing.
GROUP_EPSILON = 1e-4


def batch_advantages(rewards: Tensor) -> Tensor:
    """
    `(reward - mean) / (std + 1e-8)` over the batch, with the population's standard deviation, as DDPO does.

    Args:
        rewards (`torch.Tensor` of shape `(B,)`): One reward per trajectory, of any real dtype, all finite.

    Returns:
        `torch.Tensor` of shape `(B,)`, float32, on the device of `rewards`; all zero if all rewards are equal.

    Raises:
        ValueError: If the shape is not `(B,)` or a reward is not finite.
    """
    values = _as_floats(rewards)
    mean, std = _mean_and_std(values)
    return _as_tensor([(value - mean) / (std + BATCH_EPSILON) for value in values], rewards)


def group_advantages(rewards: Tensor, groups: Sequence[Hashable] | Tensor, scale: bool = True) -> Tensor:
    """
    `(reward - mean) / (std + 1e-4)` within each group of the batch, usually the images of one prompt (GRPO).

    Args:
        rewards (`torch.Tensor` of shape `(B,)`): One reward per trajectory, of any real dtype, all finite.
        groups (sequence of length `B`, or `torch.Tensor` of shape `(B,)`): The group of each: its prompt or a number.
        scale (`bool`, defaults to `True`): Whether to divide by the group's (population) standard deviation.

    Returns:
        `torch.Tensor` of shape `(B,)`, float32, on the device of `rewards`; its mean is zero in every group.

    Raises:
        ValueError: If lengths differ, if a group has one member only (it could learn nothing), or if a reward is not
            finite.
    """
    values, members = _grouped(rewards, groups)
    advantages = [0.0] * len(values)
    for rows in members.values():
        mean, std = _mean_and_std([values[row] for row in rows])
        for row in rows:
            advantages[row] = (values[row] - mean) / (std + GROUP_EPSILON if scale else 1.0)
    return _as_tensor(advantages, rewards)


def leave_one_out_advantages(rewards: Tensor, groups: Sequence[Hashable] | Tensor) -> Tensor:
    """
    `reward - mean of the others in its group` (RLOO, arXiv:2402.14740): a baseline that leaves the gradient unbiased.

    Arguments, result and errors are those of [`group_advantages`]; it equals that with `scale=False`, times
    `n / (n - 1)` in a group of `n`.
    """
    values, members = _grouped(rewards, groups)
    advantages = [0.0] * len(values)
    for rows in members.values():
        mean, _ = _mean_and_std([values[row] for row in rows])
        for row in rows:
            advantages[row] = (values[row] - mean) * len(rows) / (len(rows) - 1)
    return _as_tensor(advantages, rewards)


def clip_advantages(advantages: Tensor, limit: float) -> Tensor:
    """
    Clamps advantages to `[-limit, limit]` (DDPO's `train_adv_clip_max`).

    Raises:
        ValueError: If `limit` is not positive.
    """
    if not limit > 0.0:
        raise ValueError(f"the limit of the advantages must be > 0, but is {limit}; DDPO's is 5")
    return advantages.clamp(-limit, limit)


class PerPromptStatTracker:
    """
    Normalises each reward by the running statistics of its own prompt, as DDPO's tracker of the same name does.

    Of every prompt the last `buffer_size` rewards are kept, the current ones included. A prompt that has fewer than
    `min_count` of them is normalised by the batch instead.

    Departs from DDPO: when only a part of a batch's rewards fits the buffer, chance (of a fixed seed) says which part
    stays, where DDPO keeps those that came last. So the order of the batch does not matter. Integer and half precision
    rewards are computed in float64, where DDPO truncates and raises.

    Args:
        buffer_size (`int` > 0): How many rewards to keep of each prompt.
        min_count (`int` > 0): How many a prompt must have before its own statistics are used; at most `buffer_size`.

    Raises:
        ValueError: If the numbers are not as above (no prompt could ever have more than `buffer_size` rewards).
    """

    def __init__(self, buffer_size: int, min_count: int) -> None:
        if not 0 < min_count <= buffer_size:
            raise ValueError(
                f"need 0 < min_count <= buffer_size, but min_count is {min_count} and buffer_size is {buffer_size}; "
                "TRL's defaults are 16 and 16"
            )
        self.buffer_size = buffer_size
        self.min_count = min_count
        self._rewards: dict[str, deque[float]] = {}

    def update(self, prompts: Sequence[str], rewards: Tensor) -> Tensor:
        """
        Takes a batch into the statistics and returns its advantages, `(reward - mean) / (std + 1e-6)`.

        Args:
            prompts (sequence of `str` of length `B`): The prompt of each trajectory.
            rewards (`torch.Tensor` of shape `(B,)`): Its reward, of any real dtype, finite.

        Returns:
            `torch.Tensor` of shape `(B,)`, float32, on the device of `rewards`.

        Raises:
            ValueError: If the lengths differ or a reward is not finite; the statistics are then as before.
        """
        values = _as_floats(rewards)
        members = _members(prompts, len(values))
        batch_statistics = _mean_and_std(values)
        advantages = [0.0] * len(values)
        for prompt, rows in members.items():
            kept = self._rewards.setdefault(prompt, deque(maxlen=self.buffer_size))
            # Sorted, the order of the batch is irrelevant; shuffled, a full buffer does not prefer high rewards.
            arrivals = sorted(values[row] for row in rows)
            random.Random(len(arrivals)).shuffle(arrivals)
            kept.extend(arrivals)
            mean, std = batch_statistics if len(kept) < self.min_count else _mean_and_std(kept)
            for row in rows:
                advantages[row] = (values[row] - mean) / (std + TRACKER_EPSILON)
        return _as_tensor(advantages, rewards)

    def get_stats(self) -> dict[str, dict[str, float]]:
        """The `mean`, `std` and `count` of every prompt seen so far, as DDPO's tracker gives them."""
        stats = {}
        for prompt, kept in self._rewards.items():
            mean, std = _mean_and_std(kept)
            stats[prompt] = {"mean": mean, "std": std, "count": len(kept)}
        return stats

    def state_dict(self) -> dict[str, Any]:
        """The statistics as plain lists and numbers; through JSON and back they are the same to the last bit."""
        return {"rewards": {prompt: list(kept) for prompt, kept in self._rewards.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replaces the statistics. With a smaller `buffer_size` than the saved one, the newest rewards stay."""
        self._rewards = {
            str(prompt): deque(map(float, kept), maxlen=self.buffer_size) for prompt, kept in state["rewards"].items()
        }


def _as_floats(rewards: Tensor) -> list[float]:
    if rewards.dim() != 1 or len(rewards) == 0:
        raise ValueError(f"rewards must have shape (B,) with B > 0, but have shape {tuple(rewards.shape)}")
    values: list[float] = rewards.detach().to(torch.float64).tolist()
    broken = [row for row, value in enumerate(values) if not math.isfinite(value)]
    if broken:
        raise ValueError(
            f"{len(broken)} of {len(values)} rewards are not finite (first: row {broken[0]} is {values[broken[0]]}); "
            "a reward function must return finite numbers"
        )
    return values


def _as_tensor(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)


def _mean_and_std(values: Sequence[float] | deque[float]) -> tuple[float, float]:
    """Mean and population standard deviation, the same for every order of `values`."""
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))


def _members(groups: Sequence[Any], count: int) -> dict[Any, list[int]]:
    """The rows of each group."""
    if len(groups) != count:
        raise ValueError(f"need one group or prompt per reward, but got {len(groups)} for {count} rewards")
    members: dict[Any, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    return members


def _grouped(rewards: Tensor, groups: Sequence[Hashable] | Tensor) -> tuple[list[float], dict[Any, list[int]]]:
    values = _as_floats(rewards)
    members = _members(groups.tolist() if isinstance(groups, Tensor) else groups, len(values))
    alone = [group for group, rows in members.items() if len(rows) == 1]
    if alone:
        raise ValueError(
            f"{len(alone)} of {len(members)} groups have one member (first: {alone[0]!r}), whose advantage would "
            "always be 0; draw at least 2 images per prompt, or normalise over the batch"
        )
    return values, members
