"""The stochastic window of an epoch (MixGRPO, https://arxiv.org/abs/2507.21802)."""

from __future__ import annotations

import numpy as np

from dpok_trl.training.config import DPOKConfig


def sde_window(config: DPOKConfig, epoch: int, steps: int) -> range:
    """The steps that are stochastic in an epoch, of the `steps` that a call walks; the same for all processes.

    A moving window stops before the last step, which ends without noise on most grids and so is no action.
    """
    size = config.sample_sde_window_size
    if size is None:
        return range(steps)
    first, last = config.sample_sde_window_start, max(steps - 1 - size, 0)
    if config.sample_sde_window_schedule == "progressive":
        first = max(first, min(first + epoch // config.sample_sde_window_interval, last))
    elif config.sample_sde_window_schedule == "random":
        first = int(np.random.default_rng([config.seed, epoch]).integers(last + 1))
    return range(first, first + size)
