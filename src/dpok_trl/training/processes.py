"""What several processes must agree on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from dpok_trl.rewards.base import RewardError


def largest(accelerator: Accelerator, values: torch.Tensor) -> float:
    """The largest entry of a tensor over all processes."""
    return accelerator.gather(values.amax()[None]).amax().item()


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """What fails within it on one process fails on all: one that raised alone would leave the others waiting for ever.

    Raises:
        On the process that failed, its error; on the others [`RewardError`] (if it is one) or `RuntimeError` with the same message.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:  # raised again below
        error = raised
    told = None if error is None else (isinstance(error, RewardError), f"{type(error).__name__}: {error}")
    failures = gather_object([told])
    if error is not None:
        raise error
    for process, failure in enumerate(failures):
        if failure is not None:
            of_reward, message = failure
            raise (RewardError if of_reward else RuntimeError)(f"process {process} failed with {message}")
