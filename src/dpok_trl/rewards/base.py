"""The contract of a reward: one finite real number per image, or `None` where it does not apply.

Nothing is repaired here: a value made up for a missing or infinite reward would be learned from. What is not finite is told apart
from what does not apply, and the caller decides whether it stops the run or is left out of it.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpok_trl.rewards.binding import BoundReward, RewardInputs, reward_name


RewardFunction = Callable[..., Any]

__all__ = ["RewardError", "RewardFunction", "Scored", "reward_name", "score", "score_batch"]


class RewardError(RuntimeError):
    """A reward function failed, or what it returned is not one real number per image. The message names it."""


@dataclass(frozen=True)
class Scored:
    """What a reward says of one batch.

    Args:
        values (`torch.Tensor` of shape `(B,)`): float32, on the CPU. NaN where it does not apply, NaN or infinite where it failed.
        applies (`torch.Tensor` of shape `(B,)`, bool): False where the reward returned `None`.
        info (`Any`): The second item of a returned pair; `{}` without one.
    """

    values: Tensor
    applies: Tensor
    info: Any


def score_batch(reward: BoundReward, inputs: RewardInputs) -> Scored:
    """
    Asks a reward about one batch, in one call, or in one for each prompt's group where it `wants_groups`.

    Raises:
        [`RewardError`]: If the function raises, if what it returns is not one real number or `None` for each image (a list, a numpy array, a tensor of
            shape `(B,)` or `(B, 1)`, an object with `rewards` or `logits`, or a pair of that and some info).
    """
    if not len(inputs.images) == len(inputs.prompts) == len(inputs.metadata):
        raise ValueError(
            f"images, prompts and metadata must be equally many; got {len(inputs.images)} images, {len(inputs.prompts)} prompts and "
            f"{len(inputs.metadata)} metadata entries."
        )
    calls = _calls(reward, inputs)
    values, applies = torch.full((len(inputs),), torch.nan), torch.zeros(len(inputs), dtype=torch.bool)
    infos = []
    for rows in calls:
        part = _one_call(reward, inputs if len(calls) == 1 else inputs.rows(rows))
        values[rows], applies[rows] = part.values, part.applies
        infos.append(part.info)
    return Scored(values, applies, infos[0] if len(infos) == 1 else infos)


def score(
    reward_function: RewardFunction, images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]
) -> tuple[Tensor, Any]:
    """
    Asks a reward function about one batch and accepts nothing but a finite number for each image.

    Args:
        reward_function (`Callable`): See [`~dpok_trl.rewards.binding.BoundReward`] for how it is called.
        images (`torch.Tensor` of shape `(B, 3, H, W)`): floating point, values in [0, 1].
        prompts (`Sequence[str]` of length B)
        metadata (`Sequence` of length B): what came with each prompt.

    Returns:
        `tuple[torch.Tensor, Any]`: the rewards of shape `(B,)`, float32, on the CPU, a detached copy; and the info,
        the second item of a returned pair (`{}` if the function returned the rewards alone).

    Raises:
        [`RewardError`]: as [`score_batch`], and for any reward that is `None`, NaN or infinite.
        `TypeError`: if `reward_function` cannot be called.
        `ValueError`: if images, prompts and metadata differ in number.
    """
    reward = reward_function if isinstance(reward_function, BoundReward) else BoundReward(reward_function)
    scored = score_batch(reward, RewardInputs(images, tuple(prompts), tuple(metadata)))
    refuse_nonfinite(reward.name, scored.values, scored.applies, prompts)
    if not scored.applies.all():
        raise RewardError(
            f"the reward function {reward.name} returned None for some images: it must return one number per image."
        )
    return scored.values, scored.info


def refuse_nonfinite(name: str, values: Tensor, applies: Tensor, prompts: Sequence[str]) -> None:
    """Raises [`RewardError`] for rewards that apply and are NaN or infinite."""
    bad = applies & ~values.isfinite()
    if not bad.any():
        return
    first = int(bad.nonzero()[0, 0])
    raise RewardError(
        f"{int(bad.sum())} of the {len(values)} rewards that {name} returned are not finite in float32 "
        f"({int(values[bad].isnan().sum())} NaN, {int(values[bad].isinf().sum())} infinite); the first is {values[first]:g} "
        f"for image {first}, prompt {prompts[first]!r}."
    )


def _calls(reward: BoundReward, inputs: RewardInputs) -> list[list[int]]:
    """The rows of each call."""
    if not reward.wants_groups:
        return [list(range(len(inputs)))]
    groups: dict[str, list[int]] = {}
    for row, prompt in enumerate(inputs.prompts):
        groups.setdefault(prompt, []).append(row)
    return list(groups.values())


def _one_call(reward: BoundReward, inputs: RewardInputs) -> Scored:
    try:
        with torch.no_grad():
            result = reward(inputs)
    except RewardError:
        raise  # already in words
    except Exception as error:
        raise RewardError(f"the reward function {reward.name} raised {type(error).__name__}: {error}") from error
    values, info = _split(result)
    missing = [value is None for value in values] if isinstance(values, (list, tuple)) else []
    if any(missing):
        values = [torch.nan if value is None else value for value in values]
    rewards = _to_tensor(values, reward.name)
    rewards = _one_number_each(rewards, len(inputs), reward.name)
    return Scored(rewards, ~torch.tensor(missing) if any(missing) else torch.ones(len(inputs), dtype=torch.bool), info)


def _split(result: Any) -> tuple[Any, Any]:
    """`(rewards, info)` from what the function returned. Two numbers, or two columns of them, are rewards and no pair."""
    info: Any = {}
    if isinstance(result, tuple) and len(result) == 2 and not _is_numeric(result[1]):
        result, info = result
    for attribute in ("rewards", "logits"):
        result = getattr(result, attribute, result)
    return result, info


def _is_numeric(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return len(value) > 0 and all(map(_is_numeric, value))
    return isinstance(value, (numbers.Number, Tensor, np.ndarray))


def _to_tensor(values: Any, name: str) -> Tensor:
    """Float32 on the CPU. Always a copy: a function may use its own buffer again in the next call."""
    if values is None:
        raise RewardError(f"the reward function {name} returned None: it must return one number per image.")
    if not isinstance(values, Tensor):
        try:
            values = torch.tensor(values)
        except (TypeError, ValueError, RuntimeError) as error:
            raise RewardError(
                f"the reward function {name} must return one number per image, as a tensor, a numpy array or a list; "
                f"it returned {_describe(values)}, which cannot be read as numbers ({error})."
            ) from error
    if values.is_complex():
        raise RewardError(f"the reward function {name} returned complex numbers ({values.dtype}): rewards are real.")
    return values.detach().to("cpu", torch.float32, copy=True)


def _one_number_each(rewards: Tensor, batch_size: int, name: str) -> Tensor:
    shape = tuple(rewards.shape)
    if shape == (batch_size,):
        return rewards
    if shape == (batch_size, 1) or (shape == () and batch_size == 1):
        return rewards.reshape(batch_size)  # a head with one output
    if len(shape) == 1:
        raise RewardError(f"the reward function {name} returned {shape[0]} rewards for {batch_size} images.")
    problem = f"the reward function {name} returned rewards of shape {shape} for {batch_size} images"
    if len(shape) == 0:
        hint = "this is one number for the whole batch, often a mean; leave the batch dimension as it is"
    elif shape == (batch_size, batch_size):
        hint = (
            "every image against every prompt, as from a CLIP similarity matrix (its diagonal is wanted) or from "
            "broadcasting a (B, 1) tensor against a (B,) one"
        )
    else:
        hint = "reduce the other dimensions"
    raise RewardError(f"{problem}, but a reward is one number per image, shape ({batch_size},): {hint}.")


def _describe(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} of type {type(value).__name__}"
