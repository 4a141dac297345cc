"""The ratio of new to old probability is 1 before the first update: checked, and mended where rounding alone is to blame."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from dpok_trl.core.gaussian import Reduction
from dpok_trl.policy.policy import Policy
from dpok_trl.training.batches import TrainingBatch


logger = logging.getLogger(__name__)

# A replay that is off by more than this (mean log-probability per dimension, any precision) walks another path than the rollout;
# rounding in bf16 at another batch shape stays below 1e-2.
LARGEST_ROUNDING = 0.05


class RatioError(RuntimeError):
    """The policy's ratio is not 1 before the first update: training would start on wrong gradients."""


def check_ratio(
    policy: Policy,
    batch: TrainingBatch,
    *,
    reanchor: bool | None,
    with_grad: bool,
    clip_range: float,
    reduction: Reduction,
    largest: Callable[[torch.Tensor], float],
) -> bool:
    """Replays one training batch and compares with its rollout, before the first update.

    At another batch shape, or under compilation, kernels round differently. Then old log-probabilities are to be taken from a replay at the
    training shape (*re-anchored*), and a replay must reproduce itself.

    Args:
        reanchor (`bool`, *optional*): What the user wants; `None`: re-anchor if there is any deviation.
        with_grad (`bool`): See [`anchor`].
        clip_range (`float`): Deviations must stay below a tenth of it.
        largest (`Callable`): The largest entry of a tensor over all processes, so that all decide alike.

    Returns:
        `bool`: Whether to re-anchor.

    Raises:
        [`RatioError`]
    """
    rollout = batch.trajectory.log_probs[list(batch.samples)]
    replay = replayed_log_probs(policy, batch, verify=True, apart=True)
    between = largest((replayed_log_probs(policy, batch) - replay).abs())
    if not between <= clip_range / 10:
        what = "a step replayed alone gives other log-probabilities than in a walk with the steps before it: the pipeline carries something from step to step"
        raise RatioError(_causes(what, between, clip_range / 10))
    deviation = largest((replay - rollout).abs())
    dimensions = batch.trajectory.latents[0][0].numel() if reduction == "sum" else 1
    if not deviation <= LARGEST_ROUNDING * dimensions:
        what = "a replay of the first batch gives other log-probabilities than its rollout"
        raise RatioError(_causes(what, deviation, LARGEST_ROUNDING * dimensions))
    if reanchor is None:
        reanchor = deviation > 0
        if reanchor:
            logger.info(
                "a replay of %d samples differs from the rollout of %d by up to %.3g in log-probability: old log-probabilities are taken from a "
                "replay (about a quarter more network time; train_batch_size = sample_batch_size avoids it)",
                len(batch.samples),
                len(batch.trajectory),
                deviation,
            )
    if reanchor:
        anchored = replayed_log_probs(policy, batch, with_grad=True) if with_grad else replay
        deviation = largest((replayed_log_probs(policy, batch, with_grad=with_grad) - anchored).abs())
    if not deviation <= clip_range / 10:
        what = (
            "two replays of one batch differ"
            if reanchor
            else "train_reanchor = False, and the replay differs from the rollout"
        )
        raise RatioError(_causes(what, deviation, clip_range / 10))
    return reanchor


def refuse_ratio(deviation: float, clip_range: float) -> None:
    """Raises [`RatioError`] if the ratios of the very first update, taken with gradients, are off by more than a tenth of the clip range."""
    if not deviation <= clip_range / 10:
        raise RatioError(_causes("the ratio of the first update is not 1", deviation, clip_range / 10))


def anchor(policy: Policy, batches: list[TrainingBatch], with_grad: bool) -> None:
    """Takes the old log-probabilities of training batches from a replay at their own shape.

    Args:
        with_grad (`bool`): In gradient mode, as the update will compute them: a compiled network is another graph there, which rounds differently.
    """
    for batch in batches:
        log_probs = batch.trajectory.log_probs.clone()
        log_probs[list(batch.samples)] = replayed_log_probs(policy, batch, with_grad=with_grad)
        batch.trajectory = batch.trajectory.with_log_probs(log_probs)


def replayed_log_probs(
    policy: Policy, batch: TrainingBatch, verify: bool = False, with_grad: bool = False, apart: bool = False
) -> torch.Tensor:
    """Log-probabilities `(n, steps)` of a training batch at all its stochastic steps, under the policy as it is now, without their graph.

    Args:
        apart (`bool`): Each step in a replay of its own, as in an update.
    """
    steps = batch.trajectory.steps
    # One step at a time with gradients, whose graph is then freed. Apart, from the last to the first: in the other order a state that goes from step to
    # step would be built up as in the rollout.
    groups = [[step] for step in reversed(steps)] if with_grad or apart else [list(steps)]
    columns = {}
    for group in groups:
        with torch.set_grad_enabled(with_grad):
            replayed = policy(batch.trajectory, batch.samples, group, verify)
        columns.update({step: one.log_prob.detach() for step, one in zip(group, replayed, strict=True)})
    return torch.stack([columns[step] for step in steps], dim=1)


def _causes(what: str, deviation: float, allowed: float) -> str:
    return (
        f"{what}: the difference is up to {deviation:.3g}, allowed are {allowed:.3g}. The ratio must be 1 before the first update. "
        "Likely causes: something random in the denoiser (dropout outside eval mode, a custom attention processor); kernels that are not "
        "deterministic; a cache or hook that keeps a state between calls; a callback in sample_call_kwargs that changes the latents; a "
        "train_clip_range below the rounding of this precision. `check_pipeline(pipe, ...)` shows which step differs."
    )
