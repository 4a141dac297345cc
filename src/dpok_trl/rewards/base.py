"""The contract of a reward function, and the one place where it is called.

A reward function is called as TRL's DDPO calls it,

    reward_function(images, prompts, metadata) -> rewards  or  (rewards, info)

and must give one finite real number per image. Nothing is repaired here: a value made up for a missing or infinite
reward would be learned from.
"""

import functools
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


RewardFunction = Callable[[Tensor, tuple[str, ...], tuple[Any, ...]], Any]


class RewardError(RuntimeError):
    """A reward function failed, or what it returned is not one finite number per image. The message names it."""


def reward_name(reward_function: Any) -> str:
    """The name a reward has in messages and metrics: of the function, or of the class of a callable object."""
    while isinstance(reward_function, functools.partial):
        reward_function = reward_function.func
    name: str = getattr(reward_function, "__name__", type(reward_function).__name__)
    return name


def score(
    reward_function: RewardFunction, images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]
) -> tuple[Tensor, Any]:
    """
    Call a reward function on one batch and check what it returns.

    Args:
        reward_function (`Callable`): called as `reward_function(images, prompts, metadata)` under `torch.no_grad()`.
        images (`torch.Tensor` of shape `(B, 3, H, W)`): floating point, values in [0, 1].
        prompts (`Sequence[str]` of length B): passed on as a tuple.
        metadata (`Sequence` of length B): what came with each prompt; passed on as a tuple.

    Returns:
        `tuple[torch.Tensor, Any]`: the rewards of shape `(B,)`, float32, on the CPU, a detached copy; and the info,
        the second item of a returned pair (`{}` if the function returned the rewards alone).

    Raises:
        [`RewardError`]: if the function raises, returns something other than B real numbers (a tensor of any real
            dtype, a numpy array or a list, of shape `(B,)`), or any of them is NaN or infinite.
        `TypeError`: if `reward_function` cannot be called.
        `ValueError`: if images, prompts and metadata differ in number.
    """
    if not callable(reward_function):
        raise TypeError(
            f"a reward must be a function of (images, prompts, metadata); got {reward_function!r} of type "
            f"{type(reward_function).__name__}."
        )
    batch_size = images.shape[0]
    if not batch_size == len(prompts) == len(metadata):
        raise ValueError(
            f"images, prompts and metadata must be equally many; got {batch_size} images, {len(prompts)} prompts and "
            f"{len(metadata)} metadata entries."
        )
    name = reward_name(reward_function)
    try:
        with torch.no_grad():
            result = reward_function(images, tuple(prompts), tuple(metadata))
    except RewardError:
        raise  # already in words
    except Exception as error:
        raise RewardError(f"the reward function {name} raised {type(error).__name__}: {error}") from error

    values, info = _split(result)
    rewards = _to_tensor(values, name)
    _check_shape(rewards, batch_size, name)
    _check_finite(rewards, prompts, name)
    return rewards, info


def _split(result: Any) -> tuple[Any, Any]:
    """`(rewards, info)` from what the function returned. A pair of plain numbers is two rewards, not a pair."""
    is_pair = isinstance(result, tuple) and len(result) == 2
    if is_pair and not all(_is_number(item) for item in result):
        return result[0], result[1]
    return result, {}


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Number) or (isinstance(value, Tensor) and value.ndim == 0)


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


def _check_shape(rewards: Tensor, batch_size: int, name: str) -> None:
    shape = tuple(rewards.shape)
    if shape == (batch_size,):
        return
    if len(shape) == 1:
        raise RewardError(f"the reward function {name} returned {shape[0]} rewards for {batch_size} images.")
    problem = f"the reward function {name} returned rewards of shape {shape} for {batch_size} images"
    if len(shape) == 0:
        hint = "this is one number for the whole batch, often a mean; leave the batch dimension as it is"
    elif shape == (batch_size, batch_size) and batch_size > 1:
        hint = (
            "every image against every prompt, as from a CLIP similarity matrix (its diagonal is wanted) or from "
            "broadcasting a (B, 1) tensor against a (B,) one"
        )
    elif sorted(shape) == sorted((batch_size, 1)):
        hint = "return rewards.flatten()"
    else:
        hint = "reduce the other dimensions"
    raise RewardError(f"{problem}, but a reward is one number per image, shape ({batch_size},): {hint}.")


def _check_finite(rewards: Tensor, prompts: Sequence[str], name: str) -> None:
    bad = ~rewards.isfinite()
    if not bad.any():
        return
    first = int(bad.nonzero()[0, 0])
    raise RewardError(
        f"{int(bad.sum())} of the {len(rewards)} rewards that {name} returned are not finite in float32 "
        f"({int(rewards.isnan().sum())} NaN, {int(rewards.isinf().sum())} infinite); the first is {rewards[first]:g} "
        f"for image {first}, prompt {prompts[first]!r}."
    )


def _describe(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} of type {type(value).__name__}"
