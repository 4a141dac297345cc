"""What several processes must agree on."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from dpok_trl.rewards.base import RewardError


def largest(accelerator: Accelerator, values: torch.Tensor) -> float:
    """The largest entry of a tensor over all processes."""
    return accelerator.gather(values.amax()[None]).amax().item()


def raise_together(accelerator: Accelerator, error: Exception | None) -> None:
    """Called on all processes, with what went wrong on this one: a process that raised alone would leave the others waiting for ever.

    Raises:
        `error`; on the other processes [`RewardError`] (if it is one) or `RuntimeError` with the same message.
    """
    told = None if error is None else (isinstance(error, RewardError), f"{type(error).__name__}: {error}")
    failures = gather_object([told])
    if error is not None:
        raise error
    for process, failure in enumerate(failures):
        if failure is not None:
            of_reward, message = failure
            raise (RewardError if of_reward else RuntimeError)(f"process {process} failed with {message}")
