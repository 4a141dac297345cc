"""The stochastic window of an epoch (MixGRPO, https://arxiv.org/abs/2507.21802)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dpok_trl.training.config import DPOKConfig


def sde_window(config: DPOKConfig, epoch: int) -> Callable[[int], range] | None:
    """Which of the steps that can be stochastic are, in an epoch; the same for all processes. `None`: all of them.

    The number of those steps is known only once the pipeline has set its timesteps, so the answer is a function of it: image-to-image walks a
    part of the grid, and steps without noise (often the last one) or with less than `sample_min_std` are none of them.
    """
    size, start = config.sample_sde_window_size, config.sample_sde_window_start
    if size is None:
        return None

    def window(steps: int) -> range:
        last = max(steps - size, 0)
        if config.sample_sde_window_schedule == "progressive":
            first = min(start + epoch // config.sample_sde_window_interval, last)
        elif config.sample_sde_window_schedule == "random":
            first = int(np.random.default_rng([config.seed, epoch]).integers(last + 1))
        else:
            first = start
        return range(first, first + size)

    return window
