"""The weight of the KL term over a run, and the KL that is charged to actions."""

from __future__ import annotations

import torch

from dpok_trl.core.advantages import kl_to_go
from dpok_trl.training.batches import TrainingBatch


LARGEST_ERROR = 0.2  # as in arXiv 1909.08593


def adapted_weight(weight: float, kl: float, target: float) -> float:
    """The next epoch's weight of the KL term: `weight * (1 + clip(kl / target - 1, -0.2, 0.2))`.

    The proportional controller of Ziegler et al. (https://arxiv.org/abs/1909.08593, section 2.2). Departs from it in its gain, 1 and not 0.1: it acts once
    in an epoch, and runs have some hundred epochs and not thousands of batches.

    Args:
        kl (`float`): KL of a whole denoising path in nats, as measured in the epoch.
        target (`float`): The KL to hold.
    """
    return weight * (1 + min(max(kl / target - 1, -LARGEST_ERROR), LARGEST_ERROR))


def kl_of_actions(batch: TrainingBatch, charge_own_step: bool) -> torch.Tensor:
    """What each action of a training batch is charged with, in nats, `(n, S)`: see [`kl_to_go`].

    Needs the old distributions and the reference's at all stochastic steps.

    Args:
        charge_own_step (`bool`): Charge the log-ratio of the action itself too, where the KL has no gradient of its own.
    """
    trajectory, rows = batch.trajectory, list(batch.samples)
    kl, log_ratio = [], []
    for step in trajectory.steps:
        old, reference = batch.old[step], batch.references[step]
        kl.append(old.kl(reference, "sum"))
        if charge_own_step:
            log_ratio.append(old.log_ratio(reference, trajectory.next_latents[step][rows], "sum"))
    return kl_to_go(torch.stack(kl, dim=1), torch.stack(log_ratio, dim=1) if charge_own_step else None)
