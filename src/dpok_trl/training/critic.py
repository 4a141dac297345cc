"""The value function of a run: what it is asked for each round, and what it learns from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from accelerate import Accelerator

from dpok_trl.core.trajectory import Trajectory
from dpok_trl.core.value import ValueFunction, explained_variance
from dpok_trl.policy.features import value_inputs
from dpok_trl.training.batches import SampledBatch
from dpok_trl.training.config import DPOKConfig


LARGEST_BATCH = 256  # as in the official DPOK code


class Critic:
    """V(x_t, prompt, t), regressed on the reward that a trajectory ends with (DPOK, https://arxiv.org/abs/2305.16381, appendix A.5).

    Args:
        config ([`DPOKConfig`]): Its `value_` settings.
        accelerator (`Accelerator`)
    """

    def __init__(self, config: DPOKConfig, accelerator: Accelerator):
        self.config = config
        self.accelerator = accelerator
        self.function = ValueFunction(
            learning_rate=config.value_learning_rate,
            scale_targets=config.value_scale_targets,
            seed=config.seed,
            device=accelerator.device,
        )

    def values(self, batches: Sequence[SampledBatch], rewards: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        """V at each stochastic step of a new round, **before** V has seen it: a baseline that depends on no reward of the round but through their mean
        and standard deviation.

        Args:
            batches: Of this process.
            rewards (`torch.Tensor` of shape `(N,)`): Of all processes, NaN for an image that does not count.

        Returns:
            `tuple[torch.Tensor, dict[str, float]]`: `(N, S)` float32 of all processes, on the CPU; `value/explained_variance`.
        """
        counts = rewards.isfinite()
        self.function.observe(rewards[counts])
        values = self.accelerator.gather(torch.cat([self._values_of(batch.trajectory) for batch in batches])).cpu()
        targets = rewards[counts][:, None].expand(-1, values.shape[1])
        return values, {"value/explained_variance": explained_variance(values[counts].flatten(), targets.flatten())}

    def fit(self, batches: Sequence[SampledBatch], epoch: int) -> dict[str, float]:
        """Some steps of regression on the transitions of all batches in the buffer, drawn at random.

        Returns:
            `dict[str, float]`: `value/loss`.
        """
        config, device = self.config, self.accelerator.device
        random = np.random.default_rng([config.seed, epoch, self.accelerator.process_index])
        transitions = [
            (batch, row, step)
            for batch in batches
            for row in batch.rewards.isfinite().nonzero().flatten().tolist()
            for step in batch.trajectory.steps
        ]

        def draw(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            # With replacement only where rewards have failed and fewer are left than wanted.
            chosen = random.choice(len(transitions), count, replace=count > len(transitions)) if transitions else []
            drawn: dict[int, list[tuple[int, int]]] = {}
            for index in chosen:
                batch, row, step = transitions[index]
                drawn.setdefault(id(batch), []).append((row, step))
            inputs, steps, rewards = [], [], []
            for batch in batches:
                if pairs := drawn.get(id(batch)):
                    rows, steps_of_batch = zip(*pairs, strict=True)
                    inputs.append(value_inputs(batch.trajectory, rows, steps_of_batch))
                    steps.extend(steps_of_batch)
                    rewards.append(batch.rewards[list(rows)])
            if (
                not transitions
            ):  # all rewards of this process have failed; the others wait for its gradient, which is to be 0
                trajectory = batches[0].trajectory
                seen = value_inputs(trajectory, [0], [trajectory.steps[0]])
                at = torch.tensor([trajectory.steps[0]], device=device)
                return seen, at, self.function.predict(seen, at)
            return torch.cat(inputs), torch.tensor(steps, device=device), torch.cat(rewards)

        loss = self.function.fit(
            draw,
            batch_size=config.value_batch_size or min(LARGEST_BATCH, max(1, len(transitions))),
            updates=config.value_num_updates,
            accumulation=config.value_gradient_accumulation_steps,
            average=lambda gradient: self.accelerator.reduce(gradient, "mean"),
        )
        return {
            "value/loss": self.accelerator.reduce(torch.tensor(loss, device=self.accelerator.device), "mean").item()
        }

    def _values_of(self, trajectory: Trajectory) -> torch.Tensor:
        """`(B, S)`."""
        columns = []
        for step in trajectory.steps:
            inputs = value_inputs(trajectory, range(len(trajectory)), [step] * len(trajectory))
            self.function.build(inputs.shape[1], len(trajectory.next_latents))
            columns.append(self.function.predict(inputs, torch.full((len(inputs),), step, device=inputs.device)))
        return torch.stack(columns, dim=1)
