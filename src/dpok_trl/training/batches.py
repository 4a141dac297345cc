"""From scored rollouts to optimizer steps: which transitions are trained on, together, and in which order."""

from __future__ import annotations

import math
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from dpok_trl.core.gaussian import Gaussian
from dpok_trl.core.trajectory import Trajectory, Transitions
from dpok_trl.rewards.binding import RewardInputs
from dpok_trl.rewards.combining import Scores
from dpok_trl.training.config_checks import smallest_fraction


@dataclass
class SampledBatch:
    """One sampling batch of this process: its trajectory, what the user handed over with the prompts, and what the rewards say."""

    trajectory: Trajectory
    metadata: tuple[Any, ...]
    inputs: RewardInputs | None = None  # what the rewards see
    jobs: list[tuple[int, Future]] = field(
        default_factory=list
    )  # of the rewards that overlap with sampling, by their index
    scores: Scores | None = None  # of all rewards
    rewards: torch.Tensor | None = None  # (B,) float32 on the CPU: their total, NaN for an image that does not count


@dataclass
class TrainingBatch:
    """`train_batch_size` samples of one trajectory, with the reference's answer at the steps that were needed so far."""

    trajectory: Trajectory
    samples: tuple[int, ...]
    advantages: torch.Tensor  # (B,) for all samples of the trajectory
    references: dict[int, Gaussian | torch.Tensor] = field(default_factory=dict)

    def transitions(self, steps: tuple[int, ...]) -> Transitions:
        """One of each sample, at `steps`."""
        reference = _rows_at([self.references[step] for step in steps]) if self.references else None
        return self.trajectory.transitions(self.samples, steps, self.advantages, reference)


# An optimizer step: for each forward and backward pass in it, a training batch and the denoising step of each of its samples.
Update = list[tuple[TrainingBatch, tuple[int, ...]]]


def _rows_at(answers: list[Gaussian | torch.Tensor]) -> Gaussian | torch.Tensor:
    """Row `i` of the i-th answer."""
    if all(answer is answers[0] for answer in answers):
        return answers[0]
    if isinstance(answers[0], torch.Tensor):
        return torch.stack([answer[row] for row, answer in enumerate(answers)])
    mean = torch.stack([answer.mean[row] for row, answer in enumerate(answers)])
    return Gaussian(mean, torch.stack([answer.std[row] for row, answer in enumerate(answers)]))


def cut_batches(batches: list[SampledBatch], advantages: torch.Tensor, size: int) -> list[TrainingBatch]:
    """Cuts sampling batches into training batches of `size` samples; `advantages` has an entry for each sample of `batches`."""
    per_batch = advantages.split([len(batch.trajectory) for batch in batches])
    return [
        TrainingBatch(
            batch.trajectory,
            tuple(range(row, row + size)),
            advantages_of_batch.to(batch.trajectory.log_probs.device),  # once, and not for each transition
        )
        for batch, advantages_of_batch in zip(batches, per_batch, strict=True)
        for row in range(0, len(batch.trajectory), size)
    ]


def plan_updates(
    batches: list[TrainingBatch],
    *,
    timestep_fraction: float,
    accumulation: int,
    timesteps_per_update: int | None,
    random: np.random.Generator,
    mixed: bool = False,
) -> list[Update]:
    """The optimizer steps of one pass over the training batches.

    Training batches are shuffled and taken `accumulation` at a time. Of each, `timestep_fraction` of the stochastic steps is drawn, in
    random order, and split evenly over optimizer steps with at most `timesteps_per_update` each (`None`: all in one, as in DDPO). The
    optimizer steps are shuffled too. `mixed`: the order is drawn for each sample, so that a forward pass sees samples at different steps.

    Raises:
        `ValueError`: If the fraction selects no step.
    """
    updates: list[Update] = []
    order = random.permutation(len(batches))
    for start in range(0, len(order), accumulation):
        chosen = [batches[index] for index in order[start : start + accumulation]]
        steps = [_choose_steps(batch, timestep_fraction, random, mixed) for batch in chosen]
        parts = math.ceil(len(steps[0]) / (timesteps_per_update or len(steps[0])))  # one grid, so the same for all
        groups: list[Update] = [[] for _ in range(parts)]
        for batch, steps_of_batch in zip(chosen, steps, strict=True):
            for group, part in zip(groups, np.array_split(steps_of_batch, parts), strict=True):
                group.extend((batch, tuple(row)) for row in part.tolist())
        updates.extend(groups)
    return [updates[index] for index in random.permutation(len(updates))]


def _choose_steps(batch: TrainingBatch, fraction: float, random: np.random.Generator, mixed: bool) -> np.ndarray:
    """`(steps, samples)`: the step of each sample in each forward pass."""
    actions = batch.trajectory.steps
    count = int(len(actions) * fraction)
    if count < 1:
        raise ValueError(
            f"train_timestep_fraction = {fraction} of the {len(actions)} stochastic steps selects none. Give at least {smallest_fraction(len(actions))}."
        )
    if mixed:
        return np.stack([random.permutation(actions)[:count] for _ in batch.samples], axis=1)
    return np.repeat(random.permutation(actions)[:count, None], len(batch.samples), axis=1)
