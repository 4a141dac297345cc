"""From rewards to advantages: how much better than expected a trajectory turned out.

Everything here takes the rewards of the whole batch, gathered from all ranks, and gives each trajectory the same
advantage in whatever order they come: sums are exact (`math.fsum`), so not even rounding depends on how a batch was
split.

An advantage is `reward - baseline`, divided by a standard deviation of the rewards if it is scaled. The gradient stays
unbiased under a baseline that does not depend on the trajectory's own actions: that holds for none
([`raw_advantages`]), for the others of a group ([`leave_one_out_advantages`]) and for a value function
([`value_advantages`]). A mean over `n` rewards that has the own one in it only shortens the gradient, by `1 - 1/n`. A
standard deviation that has it in it does more, but less and less as `n` grows.
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


def raw_advantages(rewards: Tensor, scale: bool = True) -> Tensor:
    """
    `reward / (std + 1e-8)` with the population's standard deviation over the batch: no baseline.

    Args:
        rewards (`torch.Tensor` of shape `(B,)`): One reward per trajectory, of any real dtype, all finite.
        scale (`bool`, defaults to `True`): Whether to divide by the standard deviation.

    Returns:
        `torch.Tensor` of shape `(B,)`, float32, on the device of `rewards`; with `scale` all zero if all rewards are
        equal, as under the baselines that are means: they have no scale.

    Raises:
        ValueError: If the shape is not `(B,)` or a reward is not finite.
    """
    values = _as_floats(rewards)
    if not scale:
        return _as_tensor(values, rewards)
    scale_of_rewards = _std_or_infinity(values) + BATCH_EPSILON
    return _as_tensor([value / scale_of_rewards for value in values], rewards)


def value_advantages(rewards: Tensor, values: Tensor, scale: bool = True) -> Tensor:
    """
    `(reward - V(x_t, prompt, t)) / (std + 1e-8)`, with the population's standard deviation of the batch's rewards.

    The reward is that of the finished image (DPOK, arXiv:2305.16381, appendix A.5: `V` is fitted to it at every step),
    so each step of a trajectory has an advantage of its own.

    Args:
        rewards (`torch.Tensor` of shape `(B,)`): One reward per trajectory, of any real dtype, all finite.
        values (`torch.Tensor` of shape `(B, S)`): What was expected of each trajectory before each of its steps, in
            units of the reward, all finite. It must not have been fitted to these rewards, or it is biased.
        scale (`bool`, defaults to `True`): Whether to divide by the standard deviation.

    Returns:
        `torch.Tensor` of shape `(B, S)`, float32, on the device of `rewards`; with `scale` all zero if all rewards are
        equal, as under the baselines that are means: they have no scale.

    Raises:
        ValueError: If the shapes do not fit or a number is not finite.
    """
    targets = _as_floats(rewards)
    expected = _as_matrix("values", values)
    if len(expected) != len(targets):
        raise ValueError(
            f"values must have shape (B, S), one row per reward, but have shape {tuple(values.shape)} for "
            f"{len(targets)} rewards"
        )
    advantages = torch.tensor(targets, dtype=torch.float64)[:, None] - expected
    if scale:
        advantages /= _std_or_infinity(targets) + BATCH_EPSILON
    return advantages.to(device=rewards.device, dtype=torch.float32)


def batch_advantages(rewards: Tensor, scale: bool = True) -> Tensor:
    """
    `(reward - mean) / (std + 1e-8)` over the batch, with the population's standard deviation, as DDPO does.

    Args:
        rewards (`torch.Tensor` of shape `(B,)`): One reward per trajectory, of any real dtype, all finite.
        scale (`bool`, defaults to `True`): Whether to divide by the standard deviation.

    Returns:
        `torch.Tensor` of shape `(B,)`, float32, on the device of `rewards`; all zero if all rewards are equal.

    Raises:
        ValueError: If the shape is not `(B,)` or a reward is not finite.
    """
    values = _as_floats(rewards)
    mean, std = _mean_and_std(values)
    return _as_tensor([(value - mean) / (std + BATCH_EPSILON if scale else 1.0) for value in values], rewards)


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


def leave_one_out_advantages(rewards: Tensor, groups: Sequence[Hashable] | Tensor, scale: bool = False) -> Tensor:
    """
    `reward - mean of the others in its group` (RLOO, arXiv:2402.14740): a baseline that leaves the gradient unbiased.

    Arguments, result and errors are those of [`group_advantages`]; it equals that, times `n / (n - 1)` in a group of
    `n`. With `scale` the own reward is in the standard deviation, and the gradient no longer unbiased.
    """
    values, members = _grouped(rewards, groups)
    advantages = [0.0] * len(values)
    for rows in members.values():
        mean, std = _mean_and_std([values[row] for row in rows])
        for row in rows:
            others = (values[row] - mean) * len(rows) / (len(rows) - 1)
            advantages[row] = others / (std + GROUP_EPSILON if scale else 1.0)
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


def kl_to_go(kl: Tensor, log_ratio: Tensor | None = None) -> Tensor:
    """
    What an action is charged with: the KL of all later steps of its trajectory.

    An action moves the states of the later steps, and with them their KL. That is the term of the gradient of
    `sum_k E[KL_k]` that DPOK drops (arXiv:2305.16381, appendix A.3): `E[sum_j grad log p(a_j | s_j) * charge_j]` with
    `charge_j = sum_{k > j} KL_k(s_k)`. The exact gradient is this plus the gradient of each step's own KL.

    That own gradient is `E[grad log p(a_j | s_j) * log(p / p_ref)(a_j | s_j)]`. So with `log_ratio`, which adds the
    log-ratio of the own action, the charge alone gives the whole gradient: the KL as a penalty in the reward.

    Args:
        kl (`torch.Tensor` of shape `(B, S)`):
            Of each step, in nats whatever the reduction of the log-probability is, in generation order; all of the
            policy that drew the trajectory.
        log_ratio (`torch.Tensor` of shape `(B, S)`, *optional*):
            `log p(a) - log p_ref(a)` of each step's action under that policy and the reference, in nats.

    Returns:
        `torch.Tensor` of shape `(B, S)`, float32, on the device of `kl`, in nats. To be subtracted from the advantages,
        times `beta / alpha`, after [`leave_one_out`].

    Raises:
        ValueError: If the shapes are not both `(B, S)` or a number is not finite.
    """
    steps = _as_matrix("kl", kl)
    charges = torch.zeros_like(steps)
    charges[:, :-1] = steps[:, 1:].flip(1).cumsum(1).flip(1)
    if log_ratio is not None:
        if log_ratio.shape != kl.shape:
            raise ValueError(
                f"kl and log_ratio must have the same shape (B, S), but have {tuple(kl.shape)} and "
                f"{tuple(log_ratio.shape)}"
            )
        charges += _as_matrix("log_ratio", log_ratio)
    return charges.to(device=kl.device, dtype=torch.float32)


def leave_one_out(charges: Tensor) -> Tensor:
    """
    Each charge minus the mean charge of the other rows at the same step.

    That mean depends on none of the row's own actions, so the gradient stays unbiased. It varies less where most of a
    charge is common to all trajectories, as the KL of many later steps is. A single row has no others and keeps its
    charges.

    Args:
        charges (`torch.Tensor` of shape `(B, S)`): From [`kl_to_go`], of all ranks; all finite.

    Returns:
        `torch.Tensor` of shape `(B, S)`, float32, on the device of `charges`; for `B > 1` its mean over the rows is
        zero at every step.

    Raises:
        ValueError: If the shape is not `(B, S)` or a number is not finite.
    """
    rows = _as_matrix("charges", charges)
    count = len(rows)
    if count > 1:
        means = torch.tensor([math.fsum(column) / count for column in rows.T.tolist()], dtype=torch.float64)
        rows = (rows - means) * (count / (count - 1))
    return rows.to(device=charges.device, dtype=torch.float32)


def best_and_worst(rewards: Tensor, groups: Sequence[Hashable] | Tensor, best: int, worst: int) -> Tensor:
    """
    Which trajectories to train on: the `best` highest and the `worst` lowest rewards of each group.

    The ones between say least about what to change (DanceGRPO, arXiv:2505.07818, trains on the top 8 and bottom 8 of 16
    and more). The gradient is then one of another distribution: the choice depends on the reward.

    Args:
        rewards (`torch.Tensor` of shape `(B,)`):
            One reward per trajectory, of any real dtype. One that is not finite lies between the best and the worst: it
            is kept only where a group has too few others.
        groups (sequence of length `B`, or `torch.Tensor` of shape `(B,)`): The group of each: its prompt or a number.
        best (`int` >= 0): How many to keep from the top; of equal ones those that come first.
        worst (`int` >= 0): How many from the bottom; of equal ones those that come last.

    Returns:
        `torch.BoolTensor` of shape `(B,)`, on the device of `rewards`: `best + worst` of each group.

    Raises:
        ValueError: If lengths differ, if `best` or `worst` is negative or both are 0, or if a group has fewer than
            `best + worst` members.
    """
    if best < 0 or worst < 0 or best + worst == 0:
        raise ValueError(f"need best >= 0 and worst >= 0, not both 0, but best is {best} and worst is {worst}")
    values = _as_list(rewards)
    members = _members(groups.tolist() if isinstance(groups, Tensor) else groups, len(values))
    kept = torch.zeros(len(values), dtype=torch.bool)
    for group, rows in members.items():
        if len(rows) < best + worst:
            raise ValueError(
                f"group {group!r} has {len(rows)} members, but the best {best} and the worst {worst} are "
                f"{best + worst}; draw more images per prompt, or keep fewer"
            )
        finite = sorted((row for row in rows if math.isfinite(values[row])), key=lambda row: -values[row])
        broken = [row for row in rows if not math.isfinite(values[row])]
        line = finite[:best] + broken + finite[best:]
        kept[line[:best] + line[len(line) - worst :]] = True
    return kept.to(rewards.device)


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

    def update(self, prompts: Sequence[str], rewards: Tensor, scale: bool = True) -> Tensor:
        """
        Takes a batch into the statistics and returns its advantages, `(reward - mean) / (std + 1e-6)`.

        Args:
            prompts (sequence of `str` of length `B`): The prompt of each trajectory.
            rewards (`torch.Tensor` of shape `(B,)`): Its reward, of any real dtype, finite.
            scale (`bool`, defaults to `True`): Whether to divide by the standard deviation.

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
                advantages[row] = (values[row] - mean) / (std + TRACKER_EPSILON if scale else 1.0)
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


def _as_list(rewards: Tensor) -> list[float]:
    if rewards.dim() != 1 or len(rewards) == 0:
        raise ValueError(f"rewards must have shape (B,) with B > 0, but have shape {tuple(rewards.shape)}")
    values: list[float] = rewards.detach().to(torch.float64).tolist()
    return values


def _as_floats(rewards: Tensor) -> list[float]:
    values = _as_list(rewards)
    broken = [row for row, value in enumerate(values) if not math.isfinite(value)]
    if broken:
        raise ValueError(
            f"{len(broken)} of {len(values)} rewards are not finite (first: row {broken[0]} is {values[broken[0]]}); "
            "a reward function must return finite numbers"
        )
    return values


def _as_matrix(name: str, matrix: Tensor) -> Tensor:
    """`matrix` in float64 on the CPU, `(B, S)`."""
    if matrix.dim() != 2 or matrix.numel() == 0:
        raise ValueError(f"{name} must have shape (B, S) with B > 0 and S > 0, but have shape {tuple(matrix.shape)}")
    values = matrix.detach().cpu().to(torch.float64)
    broken = (~values.isfinite()).nonzero().tolist()
    if broken:
        row, step = broken[0]
        raise ValueError(
            f"{len(broken)} of {values.numel()} {name} are not finite (first: row {row}, step {step} is "
            f"{values[row, step].item()})"
        )
    return values


def _as_tensor(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)


def _mean_and_std(values: Sequence[float] | deque[float]) -> tuple[float, float]:
    """Mean and population standard deviation, the same for every order of `values`."""
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))


def _std_or_infinity(values: list[float]) -> float:
    """Population standard deviation, infinite where all values are equal: `x / (0 + 1e-8)` would be a huge number."""
    return math.inf if len(set(values)) == 1 else _mean_and_std(values)[1]


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
