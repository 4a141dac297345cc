"""From scored rollouts to optimizer steps: which transitions are trained on, together, and in which order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from dpok_trl.core.gaussian import Gaussian
from dpok_trl.core.trajectory import Trajectory, Transitions
from dpok_trl.rewards.binding import RewardInputs
from dpok_trl.rewards.combining import Scores
from dpok_trl.training.config_checks import selected_steps, smallest_fraction


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
    """`train_batch_size` samples of one trajectory, with what the update needs to know of each of its steps.

    Args:
        trajectory ([`Trajectory`])
        samples (`tuple[int, ...]` of length `n`): Its rows.
        advantages (`torch.Tensor` of shape `(n, len(trajectory.steps))`): Of these rows, at each stochastic step.
        old (`dict[int, Gaussian]`): For each step, the distributions that drew the actions; empty where the objective does not ask.
        references (`dict`): For each step that was needed so far, the reference's distributions (or model outputs).
        charges (`torch.Tensor` of shape `(n, len(trajectory.steps))`, *optional*): KL in nats that each action answers for; `None` where the KL has its own
            gradient only.
    """

    trajectory: Trajectory
    samples: tuple[int, ...]
    advantages: torch.Tensor
    old: dict[int, Gaussian] = field(default_factory=dict)
    references: dict[int, Gaussian | torch.Tensor] = field(default_factory=dict)
    charges: torch.Tensor | None = None

    @cached_property
    def _rows(self) -> torch.Tensor:
        return torch.tensor(self.samples, device=self.advantages.device)

    def transitions(self, steps: Sequence[int], charge_weight: float = 0.0) -> Transitions:
        """One of each sample, at `steps`. `charge_weight`: beta / alpha, what a nat costs in units of the advantage."""
        advantages = self.advantages if self.charges is None else self.advantages - charge_weight * self.charges
        device = self.advantages.device
        places = [self.trajectory.steps.index(step) for step in steps]
        # Mostly all the same: a number needs no upload, which would make a GPU wait.
        column = places[0] if len(set(places)) == 1 else torch.tensor(places, device=device)
        return Transitions(
            trajectory=self.trajectory,
            samples=self.samples,
            steps=tuple(steps),
            old_log_prob=self.trajectory.log_probs[self._rows, column],
            advantage=advantages[torch.arange(len(places), device=device), column],
            reference=_rows_at([self.references[step] for step in steps]) if self.references else None,
            old=_rows_at([self.old[step] for step in steps]) if self.old else None,
        )


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


def cut_batches(
    batches: Sequence[SampledBatch], advantages: torch.Tensor, kept: torch.Tensor, size: int
) -> list[TrainingBatch]:
    """Cuts sampling batches into training batches of `size` samples.

    Args:
        advantages (`torch.Tensor` of shape `(N,)` or `(N, S)`): For each sample of `batches`, the same for all of its steps or not.
        kept (`torch.BoolTensor` of shape `(N,)`): The samples to train on.
    """
    cut = []
    lengths = [len(batch.trajectory) for batch in batches]
    for batch, of_batch, keep in zip(batches, advantages.split(lengths), kept.split(lengths), strict=True):
        trajectory = batch.trajectory
        of_batch = of_batch.to(trajectory.log_probs.device)  # once, and not for each transition
        of_batch = of_batch.reshape(len(trajectory), -1).expand(len(trajectory), len(trajectory.steps))
        rows = keep.nonzero().flatten().tolist()
        for start in range(0, len(rows), size):
            samples = tuple(rows[start : start + size])
            cut.append(TrainingBatch(trajectory, samples, of_batch[list(samples)]))
    return cut


def plan_updates(
    batches: Sequence[TrainingBatch],
    *,
    count: int,
    timestep_fraction: float,
    accumulation: int,
    timesteps_per_update: int | None,
    random: np.random.Generator,
    mixed: bool = False,
) -> list[Update]:
    """The optimizer steps of one pass.

    `count` of the training batches are drawn, without replacement and in random order, and taken `accumulation` at a time. Of each, `timestep_fraction` of the stochastic steps is drawn, in
    random order, and split evenly over optimizer steps with at most `timesteps_per_update` each (`None`: all in one, as in DDPO). The
    optimizer steps are shuffled too. `mixed`: the order is drawn for each sample, so that a forward pass sees samples at different steps.

    Raises:
        `ValueError`: If the fraction selects no step.
    """
    updates: list[Update] = []
    order = random.permutation(len(batches))[:count]
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
    count = selected_steps(len(actions), fraction)
    if count < 1:
        raise ValueError(
            f"train_timestep_fraction = {fraction} of the {len(actions)} stochastic steps selects none. Give at least {smallest_fraction(len(actions))}."
        )
    if mixed:
        return np.stack([random.permutation(actions)[:count] for _ in batch.samples], axis=1)
    return np.repeat(random.permutation(actions)[:count, None], len(batch.samples), axis=1)
