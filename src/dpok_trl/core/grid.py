"""The noise levels of a whole walk, and the distribution of each of its steps."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .gaussian import Gaussian
from .transitions import NoiseLevels, PredictionType, Transition, predict_x0_eps, scaled


@dataclass(frozen=True, eq=False)
class SchedulerGrid:
    """
    What the mathematics needs to know of a scheduler after `set_timesteps`, in S steps of denoising.

    Args:
        timesteps (`torch.Tensor` of shape `(S,)`, float64, CPU): The scheduler's values, in the order of denoising.
        alpha (`torch.Tensor` of shape `(S + 1,)`, float64, CPU): Signal level before each step; the last entry holds
            after the last step.
        sigma (`torch.Tensor` of shape `(S + 1,)`, float64, CPU): Noise level, likewise.
        prediction_type (`str`): What the network predicts; see [`~dpok_trl.core.transitions.predict_x0_eps`].
        is_flow (`bool`): Whether `alpha = 1 - sigma`.
        clip_range (`float`, *optional*): The predicted x0 is clamped to `[-clip_range, clip_range]`.
        epsilon_from_clipped_x0 (`bool`): Whether eps is derived again from the clamped x0 (DDPM does, DDIM does not).
        x0_scalings (pair of `torch.Tensor` of shape `(S,)`, float64, CPU, *optional*): `c_out` and `c_skip` of networks
            that predict x0 less a part of their input: x0 is `c_out * x0 + c_skip * x`, and eps follows from it
            (consistency models, arXiv:2303.01469, eq. 5; EDM, arXiv:2206.00364, eq. 7).
        renoises (`bool`): Whether the scheduler's own step puts all new noise on x0, as consistency models do.

    Raises:
        ValueError: If the lengths do not fit, or the levels are not finite, repeat, or are not those of denoising.
    """

    timesteps: Tensor
    alpha: Tensor
    sigma: Tensor
    prediction_type: PredictionType
    is_flow: bool = False
    clip_range: float | None = None
    epsilon_from_clipped_x0: bool = False
    x0_scalings: tuple[Tensor, Tensor] | None = None
    renoises: bool = False

    def __post_init__(self) -> None:
        steps = len(self.timesteps)
        if steps == 0 or self.alpha.shape != (steps + 1,) or self.sigma.shape != (steps + 1,):
            raise ValueError(
                f"a grid of {steps} timesteps needs {steps + 1} values of alpha and of sigma and at least one step, "
                f"but has shapes {tuple(self.alpha.shape)} and {tuple(self.sigma.shape)}"
            )
        if self.x0_scalings is not None and any(scaling.shape != (steps,) for scaling in self.x0_scalings):
            shapes = [tuple(scaling.shape) for scaling in self.x0_scalings]
            raise ValueError(f"a grid of {steps} timesteps needs {steps} values of each x0 scaling, but has {shapes}")
        if not bool(torch.isfinite(self.alpha).all() & torch.isfinite(self.sigma).all()):
            raise ValueError(
                f"the scheduler's noise levels must be finite, but sigma is {self.sigma.tolist()} and alpha "
                f"{self.alpha.tolist()}; too few steps for its spacing (often a single one) or a broken option make "
                "such grids: take more steps or another timestep spacing"
            )
        # The last step may stay where it is: DDIM without `set_alpha_to_one` does at a last timestep of 0, and so does
        # DEIS at its smallest sigma.
        stays = (self.alpha[1:-1] == self.alpha[:-2]) & (self.sigma[1:-1] == self.sigma[:-2])
        if bool(stays.any()):
            index = int(stays.nonzero()[0])
            raise ValueError(
                f"the scheduler repeats a noise level: steps {index} and {index + 1} of {steps}, at the timesteps "
                f"{self.timesteps[index].item():g} and {self.timesteps[index + 1].item():g}, both begin at sigma "
                f"{self.sigma[index].item():g}, so that one of them does nothing; take fewer steps or other timesteps"
            )
        self.levels(torch.arange(steps))  # checks all steps at once

    def __len__(self) -> int:
        return len(self.timesteps)

    def starting_at(self, step_index: int) -> SchedulerGrid:
        """The grid of the steps from `step_index` on: an image-to-image pipeline begins in the middle of its scheduler's."""
        scalings = self.x0_scalings
        return replace(
            self,
            timesteps=self.timesteps[step_index:],
            alpha=self.alpha[step_index:],
            sigma=self.sigma[step_index:],
            x0_scalings=None if scalings is None else (scalings[0][step_index:], scalings[1][step_index:]),
        )

    def levels(self, step_index: int | Tensor) -> NoiseLevels:
        """
        The two ends of a step.

        Args:
            step_index (`int` or `torch.LongTensor` of shape `(B,)`):
                In `[0, S)`: the position in the loop. Never look it up from a timestep, which may repeat.

        Returns:
            [`~dpok_trl.core.transitions.NoiseLevels`] of shape `()` or `(B,)`.
        """
        if isinstance(step_index, Tensor):
            step_index = step_index.cpu()
            inside = bool(((step_index >= 0) & (step_index < len(self))).all())
        else:
            inside = 0 <= step_index < len(self)
        if not inside:
            raise IndexError(f"step_index must be in [0, {len(self)}), but is {step_index}")
        return NoiseLevels(
            self.alpha[step_index], self.sigma[step_index], self.alpha[step_index + 1], self.sigma[step_index + 1]
        )


def predict_on_grid(
    grid: SchedulerGrid, model_output: Tensor, sample: Tensor, step_index: int | Tensor
) -> tuple[Tensor, Tensor]:
    """
    The clean latents and the noise that the network sees, after the clamping and the scalings of the scheduler.

    Args and shapes as in [`next_distribution`].

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: x0 and eps, of shape `(B, *)`, float32.
    """
    levels = grid.levels(step_index)
    x0, eps = predict_x0_eps(model_output, sample, levels, grid.prediction_type)
    derive_epsilon = False
    if grid.clip_range is not None:
        x0 = x0.clamp(-grid.clip_range, grid.clip_range)
        derive_epsilon = grid.epsilon_from_clipped_x0
    if grid.x0_scalings is not None:
        row = step_index.cpu() if isinstance(step_index, Tensor) else step_index
        c_out, c_skip = (scaling[row] for scaling in grid.x0_scalings)
        x0 = scaled(c_out, x0) + scaled(c_skip, sample.float())
        derive_epsilon = True
    if derive_epsilon:
        _, eps = predict_x0_eps(x0, sample, levels, "sample")
    return x0, eps


def next_distribution(
    grid: SchedulerGrid, transition: Transition, model_output: Tensor, sample: Tensor, step_index: int | Tensor
) -> Gaussian:
    """
    The distribution of the next latents: the policy `p(x_{t-1} | x_t, prompt)`.

    Args:
        grid ([`SchedulerGrid`]): Of the walk.
        transition ([`~dpok_trl.core.transitions.Transition`]): The rule of this step.
        model_output (`torch.Tensor` of shape `(B, *)`): What the pipeline hands to `scheduler.step`; any dtype.
        sample (`torch.Tensor` of shape `(B, *)`): The latents before the step; any dtype.
        step_index (`int` or `torch.LongTensor` of shape `(B,)`): In `[0, S)`.

    Returns:
        [`~dpok_trl.core.gaussian.Gaussian`]: Computed in float32, with the gradient to `model_output`.
    """
    x0, eps = predict_on_grid(grid, model_output, sample, step_index)
    return transition(sample, x0, eps, grid.levels(step_index))
