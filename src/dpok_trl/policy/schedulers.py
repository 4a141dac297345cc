"""Reads the noise grid off a diffusers scheduler; the step itself is ours ([`dpok_trl.core.transitions`]).

A scheduler's grid (its timesteps and noise levels) is kept as the user made it. Only its `step` is replaced, by a
distribution that can be drawn, scored and compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn, get_args

import diffusers
import torch
from torch import Tensor

from ..core.gaussian import Gaussian, Reduction
from ..core.transitions import NoiseLevels, PredictionType, Transition, TransitionKind, predict_x0_eps


class UnsupportedSchedulerError(ValueError):
    """The scheduler has no first-order Markov step that could be a policy; the message names one that has."""


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
        clip_range (`float`, *optional*): The predicted x0 is clamped to `[-clip_range, clip_range]`.
        epsilon_from_clipped_x0 (`bool`): Whether eps is derived again from the clamped x0 (DDPM does, DDIM does not).
        is_flow (`bool`): Whether `alpha = 1 - sigma`.

    Raises:
        ValueError: If the lengths do not fit or the levels are not those of denoising.
    """

    timesteps: Tensor
    alpha: Tensor
    sigma: Tensor
    prediction_type: PredictionType
    clip_range: float | None
    epsilon_from_clipped_x0: bool
    is_flow: bool

    def __post_init__(self) -> None:
        steps = len(self.timesteps)
        if steps == 0 or self.alpha.shape != (steps + 1,) or self.sigma.shape != (steps + 1,):
            raise ValueError(
                f"a grid of {steps} timesteps needs {steps + 1} values of alpha and of sigma and at least one step, "
                f"but has shapes {tuple(self.alpha.shape)} and {tuple(self.sigma.shape)}"
            )
        self.levels(torch.arange(steps))  # checks all steps at once

    def __len__(self) -> int:
        return len(self.timesteps)

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


@dataclass(frozen=True, eq=False)
class DPOKSchedulerOutput:
    """
    What [`scheduler_step`] returns; the first two fields are those of TRL's `DDPOSchedulerOutput`.

    Args:
        latents (`torch.Tensor` of shape `(B, *)`): The next latents, in the dtype of the model output.
        log_probs (`torch.Tensor` of shape `(B,)`, float32, or `None`): Of `latents` as returned, i.e. rounded.
            `None` if the step is deterministic (often the last one), because then there is no density.
        mean (`torch.Tensor` of shape `(B, *)`, float32): Of the step's distribution.
        std (`torch.Tensor` of shape `(B,)`, float32, CPU): Of the step's distribution.
    """

    latents: Tensor
    log_probs: Tensor | None
    mean: Tensor
    std: Tensor


def read_grid(scheduler: diffusers.SchedulerMixin) -> SchedulerGrid:
    """
    Reads the grid of a diffusers scheduler, as its last `set_timesteps` has left it.

    The next noise level of step i is that of `timesteps[i + 1]`, as in DDPM. Departs from `DDIMScheduler.step`, which
    goes to `t - num_train_timesteps // num_inference_steps`: with `"linspace"` and most `"trailing"` spacings this is
    not the timestep at which the loop goes on.

    Args:
        scheduler (`diffusers.SchedulerMixin`):
            DDIM, DDPM, Euler, Euler-ancestral, FlowMatchEuler, or first-order DPM-Solver++, DEIS or UniPC.

    Returns:
        [`SchedulerGrid`]

    Raises:
        UnsupportedSchedulerError: If its steps are not Markov (Heun, PNDM, second order ...), learn their variance,
            threshold dynamically, or if the class is unknown. The message names a scheduler that works.
        ValueError: If `set_timesteps` has not been called.
    """
    for refused, advice in _NOT_MARKOV.items():
        if isinstance(scheduler, getattr(diffusers, refused)):
            _refuse(scheduler, "a step of it is not a function of the current latents alone (not Markov)", advice)
    for readable, reader in _READERS.items():
        if isinstance(scheduler, getattr(diffusers, readable)):
            _refuse_options(scheduler)
            return reader(scheduler)
    advice = _ADVICE_FLOW if "Flow" in type(scheduler).__name__ else _ADVICE_VP
    _refuse(scheduler, "its grid is not one this package can read", advice)


def _refuse_options(scheduler: diffusers.SchedulerMixin) -> None:
    """Refuses options under which a scheduler of a readable class does something that our transitions do not."""
    again, config = f"{type(scheduler).__name__}.from_config(pipe.scheduler.config, ", scheduler.config
    if config.get("solver_order", 1) > 1:
        problem = f"solver_order={config.solver_order} uses earlier steps too (not Markov)"
        _refuse(scheduler, problem, again + "solver_order=1)")
    if config.get("thresholding", False):
        _refuse(scheduler, "dynamic thresholding has no usable gradient", again + "thresholding=False)")
    variance = config.get("variance_type") or "fixed_small"
    if variance not in ("fixed_small", "fixed_small_log"):
        problem = f'variance_type="{variance}" is not the variance of the posterior'
        if variance.startswith("learned"):
            problem += ", and the network has to be one that does not predict its variance"
        _refuse(scheduler, problem, again + 'variance_type="fixed_small")')
    # FlowMatchEuler has no prediction_type: flow matching knows but one.
    prediction_type = config.get("prediction_type", "flow_prediction")
    if prediction_type not in get_args(PredictionType):
        kinds = ", ".join(map(repr, get_args(PredictionType)))
        _refuse(scheduler, f"prediction_type={prediction_type!r} is not one of {kinds}", _ADVICE_VP)
    if scheduler.timesteps.dim() != 1:
        raise ValueError(f"the scheduler's timesteps must be 1-D, but have shape {tuple(scheduler.timesteps.shape)}")


def make_transition(
    grid: SchedulerGrid,
    kind: Literal["auto"] | TransitionKind = "auto",
    eta: float = 1.0,
    noise_level: float = 0.7,
) -> Transition:
    """
    Chooses the rule for a grid.

    Args:
        grid ([`SchedulerGrid`]): The grid.
        kind (`str`, defaults to `"auto"`): `"flow_sde"` on flow grids and `"ancestral"` on all others, or one of
            [`~dpok_trl.core.transitions.TransitionKind`].
        eta (`float` in (0, 1], defaults to 1.0): Noise of `"ancestral"` and `"cps"`.
        noise_level (`float` > 0, defaults to 0.7): Noise of `"flow_sde"`.

    Raises:
        ValueError: If `kind` is unknown or does not fit the grid, or if a number is out of range.
    """
    if kind == "auto":
        kind = "flow_sde" if grid.is_flow else "ancestral"
    if kind == "flow_sde" and not grid.is_flow:
        raise ValueError(
            'kind "flow_sde" needs a flow-matching scheduler (alpha = 1 - sigma), and this one is not; '
            'use "ancestral" or "auto"'
        )
    return Transition(kind=kind, eta=eta, noise_level=noise_level)


def next_distribution(
    grid: SchedulerGrid, transition: Transition, model_output: Tensor, sample: Tensor, step_index: int | Tensor
) -> Gaussian:
    """
    The distribution of the next latents: the policy `p(x_{t-1} | x_t, prompt)`.

    Args:
        grid ([`SchedulerGrid`]): From [`read_grid`].
        transition ([`~dpok_trl.core.transitions.Transition`]): From [`make_transition`].
        model_output (`torch.Tensor` of shape `(B, *)`): What the pipeline hands to `scheduler.step`; any dtype.
        sample (`torch.Tensor` of shape `(B, *)`): The latents before the step; any dtype.
        step_index (`int` or `torch.LongTensor` of shape `(B,)`): In `[0, S)`.

    Returns:
        [`~dpok_trl.core.gaussian.Gaussian`]: Computed in float32, with the gradient to `model_output`.
    """
    levels = grid.levels(step_index)
    x0, eps = predict_x0_eps(model_output, sample, levels, grid.prediction_type)
    if grid.clip_range is not None:
        x0 = x0.clamp(-grid.clip_range, grid.clip_range)
        if grid.epsilon_from_clipped_x0:
            _, eps = predict_x0_eps(x0, sample, levels, "sample")
    return transition(sample, x0, eps, levels)


def scheduler_step(
    scheduler: diffusers.SchedulerMixin,
    model_output: Tensor,
    timestep: int | float | Tensor,
    sample: Tensor,
    *,
    eta: float = 1.0,
    kind: Literal["auto"] | TransitionKind = "auto",
    noise_level: float = 0.7,
    prev_sample: Tensor | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    reduction: Reduction = "mean",
) -> DPOKSchedulerOutput:
    """
    One step with its log-probability: TRL's `scheduler_step`, for any scheduler that [`read_grid`] reads.

    Draws the next latents if `prev_sample` is `None`, and scores `prev_sample` otherwise. Departs from TRL: `eta`
    defaults to 1.0 (its 0.0 has no log-probability), and the log-probability is that of the latents as returned, i.e.
    after rounding to their dtype, so that scoring them again gives the same number.

    Args:
        scheduler (`diffusers.SchedulerMixin`): After `set_timesteps`.
        model_output (`torch.Tensor` of shape `(B, *)`): The network's output, guided.
        timestep (`int`, `float` or `torch.Tensor` of shape `()` or `(B,)`): Values of `scheduler.timesteps`.
        sample (`torch.Tensor` of shape `(B, *)`): The latents x_t.
        eta (`float` in (0, 1], defaults to 1.0): Noise of `"ancestral"` and `"cps"`.
        kind (`str`, defaults to `"auto"`): See [`make_transition`].
        noise_level (`float` > 0, defaults to 0.7): Noise of `"flow_sde"`.
        prev_sample (`torch.Tensor` of shape `(B, *)`, *optional*): The next latents to score.
        generator (`torch.Generator` or a list of B of them, *optional*): For drawing.
        reduction (`"mean"` or `"sum"`, defaults to `"mean"`): Of the log-probability over dimensions.

    Returns:
        [`DPOKSchedulerOutput`]

    Raises:
        ValueError: If a timestep is not on the grid or not unique there, if both `prev_sample` and `generator` are
            given, or if a `prev_sample` of a deterministic step is to be scored.
    """
    if prev_sample is not None and generator is not None:
        raise ValueError("scheduler_step draws (generator) or scores (prev_sample), but was given both; pass one")
    grid = read_grid(scheduler)
    transition = make_transition(grid, kind, eta, noise_level)
    step_index = _index_of(grid, timestep)
    distribution = next_distribution(grid, transition, model_output, sample, step_index)
    if prev_sample is not None:
        log_probs = distribution.log_prob(prev_sample, reduction)
        return DPOKSchedulerOutput(prev_sample, log_probs, distribution.mean, distribution.std)
    latents = distribution.sample(generator, dtype=model_output.dtype)
    deterministic = bool((distribution.std == 0).all())
    log_probs = None if deterministic else distribution.log_prob(latents, reduction)
    return DPOKSchedulerOutput(latents, log_probs, distribution.mean, distribution.std)


def _index_of(grid: SchedulerGrid, timestep: int | float | Tensor) -> int | Tensor:
    """Positions of timesteps that occur exactly once in the grid."""
    wanted = torch.as_tensor(timestep).detach().to(device="cpu", dtype=torch.float64)
    if wanted.dim() > 1:
        raise ValueError(f"timestep must have shape () or (B,), but has shape {tuple(wanted.shape)}")
    matches = grid.timesteps == wanted.unsqueeze(-1)
    counts = matches.sum(dim=-1)
    if bool((counts != 1).any()):
        raise ValueError(
            f"each timestep must occur exactly once in scheduler.timesteps {grid.timesteps.tolist()}, but "
            f"{wanted.tolist()} occurs {counts.tolist()} times; pass values of scheduler.timesteps, and call "
            "set_timesteps first"
        )
    index = matches.long().argmax(dim=-1)
    return int(index) if wanted.dim() == 0 else index


def _read_alphas_cumprod(scheduler: diffusers.SchedulerMixin) -> SchedulerGrid:
    """DDIM and DDPM: integer timesteps into `alphas_cumprod`."""
    is_ddpm = isinstance(scheduler, (diffusers.DDPMScheduler, diffusers.DDPMParallelScheduler))
    if scheduler.num_inference_steps is None and not (is_ddpm and scheduler.custom_timesteps):
        raise ValueError("the scheduler has no grid yet: call scheduler.set_timesteps(num_inference_steps) first")
    final = torch.tensor(1.0) if is_ddpm else scheduler.final_alpha_cumprod
    visited = scheduler.alphas_cumprod.cpu()[scheduler.timesteps.cpu()]
    signal = torch.cat([visited, final.cpu().reshape(1)]).double()
    config = scheduler.config
    return SchedulerGrid(
        timesteps=scheduler.timesteps.cpu().double(),
        alpha=signal.sqrt(),
        sigma=(1.0 - signal).sqrt(),
        prediction_type=config.prediction_type,
        clip_range=config.clip_sample_range if config.clip_sample else None,
        epsilon_from_clipped_x0=is_ddpm,
        is_flow=False,
    )


def _read_variance_exploding(scheduler: diffusers.SchedulerMixin) -> SchedulerGrid:
    """Euler and Euler-ancestral: x = x0 + sigma * eps, with `scale_model_input` before the network."""
    sigma = _sigmas(scheduler)
    return _without_clipping(scheduler, torch.ones_like(sigma), sigma, is_flow=False)


def _read_flow(scheduler: diffusers.SchedulerMixin) -> SchedulerGrid:
    """FlowMatchEuler: x = (1 - sigma) * x0 + sigma * eps, and the network predicts eps - x0."""
    if scheduler.config.get("invert_sigmas", False):
        problem = "invert_sigmas=True counts noise the other way round, as only Mochi's network expects"
        _refuse(scheduler, problem, _ADVICE_FLOW.replace(")", ", invert_sigmas=False)"))
    sigma = _sigmas(scheduler)
    return _without_clipping(scheduler, 1.0 - sigma, sigma, is_flow=True)


def _read_solver(scheduler: diffusers.SchedulerMixin) -> SchedulerGrid:
    """First-order DPM-Solver and its kin: `sigmas` are the flow's, or noise-to-signal ratios of a VP grid."""
    sigma, is_flow = _sigmas(scheduler), bool(scheduler.config.use_flow_sigmas)
    if is_flow != (scheduler.config.prediction_type == "flow_prediction"):
        _refuse(
            scheduler,
            f"prediction_type={scheduler.config.prediction_type!r} does not go with use_flow_sigmas={is_flow}",
            f"{type(scheduler).__name__}.from_config(pipe.scheduler.config, use_flow_sigmas={not is_flow})",
        )
    if is_flow:
        return _without_clipping(scheduler, 1.0 - sigma, sigma, is_flow=True)
    alpha = (1.0 + sigma.square()).rsqrt()
    return _without_clipping(scheduler, alpha, sigma * alpha, is_flow=False)


def _sigmas(scheduler: diffusers.SchedulerMixin) -> Tensor:
    if len(scheduler.sigmas) != len(scheduler.timesteps) + 1:
        raise ValueError(
            f"the scheduler has {len(scheduler.sigmas)} sigmas for {len(scheduler.timesteps)} timesteps and needs one "
            "more than timesteps: call scheduler.set_timesteps(num_inference_steps) first"
        )
    sigmas: Tensor = scheduler.sigmas.cpu().double()
    return sigmas


def _without_clipping(
    scheduler: diffusers.SchedulerMixin, alpha: Tensor, sigma: Tensor, is_flow: bool
) -> SchedulerGrid:
    return SchedulerGrid(
        timesteps=scheduler.timesteps.cpu().double(),
        alpha=alpha,
        sigma=sigma,
        prediction_type="flow_prediction" if is_flow else scheduler.config.prediction_type,
        clip_range=None,
        epsilon_from_clipped_x0=False,
        is_flow=is_flow,
    )


_ADVICE_VP = "DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False)"
_ADVICE_VE = "EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)"
_ADVICE_FLOW = "FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)"

_READERS: dict[str, Callable[[diffusers.SchedulerMixin], SchedulerGrid]] = {
    "DDIMScheduler": _read_alphas_cumprod,
    "DDIMParallelScheduler": _read_alphas_cumprod,
    "DDPMScheduler": _read_alphas_cumprod,
    "DDPMParallelScheduler": _read_alphas_cumprod,
    "EulerDiscreteScheduler": _read_variance_exploding,
    "EulerAncestralDiscreteScheduler": _read_variance_exploding,
    "FlowMatchEulerDiscreteScheduler": _read_flow,
    "DPMSolverMultistepScheduler": _read_solver,
    "DPMSolverSinglestepScheduler": _read_solver,
    "DEISMultistepScheduler": _read_solver,
    "UniPCMultistepScheduler": _read_solver,
}

_NOT_MARKOV = {
    "PNDMScheduler": _ADVICE_VP,
    "IPNDMScheduler": _ADVICE_VP,
    "LMSDiscreteScheduler": _ADVICE_VE,
    "HeunDiscreteScheduler": _ADVICE_VE,
    "KDPM2DiscreteScheduler": _ADVICE_VE,
    "KDPM2AncestralDiscreteScheduler": _ADVICE_VE,
    "FlowMatchHeunDiscreteScheduler": _ADVICE_FLOW,
}


def _refuse(scheduler: diffusers.SchedulerMixin, problem: str, advice: str) -> NoReturn:
    raise UnsupportedSchedulerError(
        f"{type(scheduler).__name__} cannot be a policy: {problem}. Set pipe.scheduler = {advice}"
    )
