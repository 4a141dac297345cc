"""A replay in which every sample is at a step of its own."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from dpok_trl.core.gaussian import Reduction
from dpok_trl.core.trajectory import Trajectory
from dpok_trl.policy.interception import Networks
from dpok_trl.policy.nested import num_rows
from dpok_trl.policy.replayer import Replayer


# The step of the loop in which all samples are replayed: the first one starts from the x_T that the pipeline draws itself.
LOOP_STEP = 1


class MixedReplayer(Replayer):
    """Answers in a replay where sample `i` is at the step `each[i]`, all in one forward pass.

    In the loop's second step the pipeline finds a vector of timesteps in its scheduler, one for each row of the denoiser's batch, and latents of as
    many different steps. Most pipelines hand both on; one that compares timesteps with each other, or depends on the position in the loop, does
    not, so the policy makes a trial first ([`Policy.mixing_error`]).
    """

    def __init__(
        self,
        networks: Networks,
        trajectory: Trajectory,
        samples: Sequence[int],
        each: Sequence[int],
        reduction: Reduction,
        verify: bool,
        generators: Sequence[torch.Generator],
    ):
        super().__init__(networks, trajectory, samples, [LOOP_STEP], reduction, verify, generators)
        self.each = torch.tensor(each)
        self._pairs = list(zip(samples, each, strict=True))

    def state(self, index: int) -> torch.Tensor:
        return torch.stack([self.trajectory.latents[step][sample] for sample, step in self._pairs])

    def action(self, index: int) -> torch.Tensor:
        if index < LOOP_STEP:
            return self.state(LOOP_STEP)
        return torch.stack([self.trajectory.next_latents[step][sample] for sample, step in self._pairs])

    def grid_index(self, index: int) -> torch.Tensor:
        return self.each

    def prepare_scheduler(self, scheduler: Any) -> None:
        begin, rows = self.recording.begin, self._rows_per_sample()
        set_timesteps = scheduler.set_timesteps

        @functools.wraps(set_timesteps)  # pipelines look at its signature
        def set_a_vector_of_timesteps(*args: Any, **kwargs: Any) -> None:
            set_timesteps(*args, **kwargs)
            own = scheduler.timesteps
            table = own[:, None].repeat(1, rows * self.num_samples)
            table[begin + LOOP_STEP] = own[begin + self.each.to(own.device)].repeat(rows)
            scheduler.timesteps = table

        scheduler.set_timesteps = set_a_vector_of_timesteps
        scale_model_input = getattr(scheduler, "scale_model_input", None)  # flow matching has none
        if scale_model_input is None or "_step_index" not in scheduler.__dict__:
            return

        def scale_rows(sample: torch.Tensor, timestep: Any) -> torch.Tensor:
            scaled = []
            for row in range(len(sample)):
                step = self.each[row % self.num_samples].item() if self._step_index == LOOP_STEP else self._step_index
                scheduler._step_index = begin + step
                scaled.append(scale_model_input(sample[row : row + 1], timestep[row % len(timestep)]))
            return torch.cat(scaled)

        scheduler.scale_model_input = scale_rows

    def _rows_per_sample(self) -> int:
        """Rows of the denoiser's batch for each sample: 2 where guidance runs both halves in one call."""
        return num_rows(self.recording.templates[0][0]) // len(self.trajectory)
