"""The ratio of new to old probability is 1 before the first update: checked, and mended where rounding alone is to blame."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import torch

from dpok_trl.core.gaussian import Reduction
from dpok_trl.policy.policy import Policy
from dpok_trl.policy.replayer import ReplayedStep
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
    compiled: bool,
    tolerance: float,
    reduction: Reduction,
    largest: Callable[[torch.Tensor], float],
) -> bool:
    """Replays one training batch and compares with its rollout, before the first update.

    At another batch shape, or under compilation, kernels round differently. Then old log-probabilities are to be taken from a replay at the
    training shape (*re-anchored*), and a replay must reproduce itself.

    Args:
        reanchor (`bool`, *optional*): What the user wants; `None`: re-anchor if there is any deviation, of a compiled network if it is above `tolerance`.
        compiled (`bool`): The graph with gradients, which the update runs, is another one than the rollout's and never gives the same bits. So it is the one
            that is compared, and a deviation that no clip could tell is not worth another forward pass for each transition.
        tolerance (`float`): Deviations must stay below it.
        largest (`Callable`): The largest entry of a tensor over all processes, so that all decide alike.

    Returns:
        `bool`: Whether to re-anchor.

    Raises:
        [`RatioError`]
    """
    rollout = batch.trajectory.log_probs[list(batch.samples)]
    replayed = _log_probs(replay(policy, batch, verify=True, apart=True))
    between = largest((_log_probs(replay(policy, batch)) - replayed).abs())
    if not between <= tolerance:
        what = "a step replayed alone gives other log-probabilities than in a walk with the steps before it: the pipeline carries something from step to step"
        raise RatioError(_causes(what, between, tolerance))
    deviation = largest((replayed - rollout).abs())
    dimensions = batch.trajectory.latents[0][0].numel() if reduction == "sum" else 1
    if not deviation <= LARGEST_ROUNDING * dimensions:
        what = "a replay of the first batch gives other log-probabilities than its rollout"
        raise RatioError(_causes(what, deviation, LARGEST_ROUNDING * dimensions))
    if compiled:
        replayed = _log_probs(replay(policy, batch, with_grad=True))
        deviation = largest((replayed - rollout).abs())
    if reanchor is None:
        reanchor = not deviation <= (tolerance if compiled else 0)
        if reanchor:
            logger.info(
                "a replay of %d samples differs from the rollout of %d by up to %.3g in log-probability: old log-probabilities are taken from a "
                "replay (about a quarter more network time%s)",
                len(batch.samples),
                len(batch.trajectory),
                deviation,
                "" if compiled else "; train_batch_size = sample_batch_size avoids it",
            )
    if reanchor:
        deviation = largest((_log_probs(replay(policy, batch, with_grad=compiled)) - replayed).abs())
    if not deviation <= tolerance:
        what = (
            "two replays of one batch differ"
            if reanchor
            else "train_reanchor = False, and the replay differs from the rollout"
        )
        raise RatioError(_causes(what, deviation, tolerance))
    return reanchor


def refuse_ratio(deviation: float, tolerance: float) -> None:
    """Raises [`RatioError`] if the ratios of the very first update, taken with gradients, are off by more than `tolerance`."""
    if not deviation <= tolerance:
        raise RatioError(_causes("the ratio of the first update is not 1", deviation, tolerance))


def anchor(policy: Policy, batches: Sequence[TrainingBatch], with_grad: bool, keep_distributions: bool) -> None:
    """Takes the old log-probabilities of training batches from a replay at their own shape.

    Args:
        with_grad (`bool`): In gradient mode, as the update will compute them: a compiled network is another graph there, which rounds differently.
        keep_distributions (`bool`): Keep the distributions that drew the actions as well (`TrainingBatch.old`), as much memory as the latents.
    """
    for batch in batches:
        replayed = replay(policy, batch, with_grad=with_grad)
        log_probs = batch.trajectory.log_probs.clone()
        log_probs[list(batch.samples)] = _log_probs(replayed)
        batch.trajectory = batch.trajectory.with_log_probs(log_probs)
        if keep_distributions:
            batch.old = {step: one.distribution for step, one in replayed.items()}


def replay(
    policy: Policy, batch: TrainingBatch, verify: bool = False, with_grad: bool = False, apart: bool = False
) -> dict[int, ReplayedStep]:
    """A training batch at all its stochastic steps, in their order, under the policy as it is now, without the graph.

    Args:
        apart (`bool`): Each step in a replay of its own, as in an update.
    """
    steps = batch.trajectory.steps
    # One step at a time with gradients, whose graph is then freed. Apart, from the last to the first: in the other order a state that goes from step to
    # step would be built up as in the rollout.
    groups = [[step] for step in reversed(steps)] if with_grad or apart else [list(steps)]
    answers = {}
    for group in groups:
        with torch.set_grad_enabled(with_grad):
            replayed = policy(batch.trajectory, batch.samples, group, verify)
        answers.update({step: one.detach() for step, one in zip(group, replayed, strict=True)})
    return {step: answers[step] for step in steps}


def _log_probs(replayed: Mapping[int, ReplayedStep]) -> torch.Tensor:
    return torch.stack([one.log_prob for one in replayed.values()], dim=1)


def _causes(what: str, deviation: float, allowed: float) -> str:
    return (
        f"{what}: the difference is up to {deviation:.3g}, allowed are {allowed:.3g}. The ratio must be 1 before the first update. "
        "Likely causes: something random in the denoiser (dropout outside eval mode, a custom attention processor); kernels that are not "
        "deterministic; a cache or hook that keeps a state between calls; a callback in sample_call_kwargs that changes the latents; a "
        "train_clip_range below the rounding of this precision. `check_pipeline(pipe, ...)` shows which step differs."
    )
