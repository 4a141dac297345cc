"""Reads the noise grid off a diffusers scheduler; the step itself is ours ([`dpok_trl.core.transitions`]).

A scheduler's grid (its timesteps and noise levels) is kept as the user made it. Only its `step` is replaced, by a
distribution that can be drawn, scored and compared.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, get_args

import diffusers
import torch
from torch import Tensor

from ..core.gaussian import Reduction
from ..core.grid import SchedulerGrid, next_distribution
from ..core.transitions import PredictionType, Transition, TransitionKind


class UnsupportedSchedulerError(ValueError):
    """The scheduler has no first-order Markov step that could be a policy; the message names one that has."""


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


def policy_scheduler(scheduler: diffusers.SchedulerMixin) -> diffusers.SchedulerMixin:
    """
    What a rollout walks on in place of the user's scheduler, whose `step` it replaces.

    Args:
        scheduler (`diffusers.SchedulerMixin`): The user's; not changed.

    Returns:
        `diffusers.SchedulerMixin`: A shallow copy, of the very same type (pipelines compare it). For the schedulers that
        evaluate a timestep twice or hand themselves more than latents (PNDM, CogVideoXDPM), the first-order scheduler
        on the same noise schedule and spacing.
    """
    for name, (replacement, defaults) in _WALKED_ON.items():
        if _is_a(scheduler, name):
            return _on_the_schedule_of(scheduler, replacement, defaults)
    return copy.copy(scheduler)


def as_ddim(scheduler: diffusers.SchedulerMixin) -> diffusers.DDIMScheduler:
    """DDIM on the noise schedule and spacing of another scheduler."""
    return _on_the_schedule_of(scheduler, diffusers.DDIMScheduler, _DDIM_DEFAULTS)


def scheduler_note(scheduler: diffusers.SchedulerMixin) -> str | None:
    """
    What the policy does otherwise than the user's scheduler, beside the noise of its steps.

    Returns:
        `str` or `None`: One line to log; `None` if the scheduler's own step is of first order.
    """
    name, config = type(scheduler).__name__, scheduler.config
    for walked, (replacement, _) in _WALKED_ON.items():
        if _is_a(scheduler, walked):
            return (
                f"a step of {name} depends on earlier model outputs too and is no policy: sampling with "
                f"{replacement.__name__} on the same noise schedule and spacing instead. The pipeline keeps its {name}."
            )
    notes = []
    # `from_config` carries settings along that the class does not have
    own = inspect.signature(type(scheduler).__init__).parameters
    order = config.solver_order if "solver_order" in own else 1
    if _is_a(scheduler, "LMSDiscreteScheduler"):
        order = LMS_ORDER
    if order > 1:
        notes.append(f"order {order} (solver_order) uses the model outputs of earlier steps too and is forced to 1")
    if _is_a(scheduler, "UniPCMultistepScheduler"):
        notes.append("its corrector, which looks back at the step before, is left out")
    if config.get("algorithm_type") in ("dpmsolver", "sde-dpmsolver") and "algorithm_type" in own:
        notes.append(f'algorithm_type="{config.algorithm_type}" is walked as DPM-Solver++ is, in the prediction of x0')
    variance = config.get("variance_type")
    if variance in _LARGE_VARIANCES:
        notes.append(f'variance_type="{variance}" becomes the variance of the posterior ("fixed_small")')
    return f"{name}: {'; '.join(notes)}. Timesteps and noise levels stay." if notes else None


def read_grid(scheduler: diffusers.SchedulerMixin) -> SchedulerGrid:
    """
    Reads the grid of a diffusers scheduler, as its last `set_timesteps` has left it.

    The next noise level of step i is that of `timesteps[i + 1]`, as in DDPM. Departs from `DDIMScheduler.step`, which
    goes to `t - num_train_timesteps // num_inference_steps`: with `"linspace"` and most `"trailing"` spacings this is
    not the timestep at which the loop goes on. Multistep solvers are read whatever their order: the grid does not
    depend on it, and the policy's step is of first order.

    Args:
        scheduler (`diffusers.SchedulerMixin`):
            A scheduler of those in `docs/how-it-works.md`, best from [`policy_scheduler`].

    Returns:
        [`SchedulerGrid`]

    Raises:
        UnsupportedSchedulerError: If its grid has more than one network call per step (Heun, PNDM ...), if it learns
            its variance or thresholds dynamically, or if the class is unknown: the message names one that works. If
            `set_timesteps` has not been called, or the grid is not one of denoising: the message says which setting.
    """
    reader = _reader_of(scheduler)
    try:
        return reader(scheduler)
    except UnsupportedSchedulerError:
        raise
    except ValueError as error:
        raise UnsupportedSchedulerError(
            f"{type(scheduler).__name__} cannot be walked as it is set: {error}"
        ) from error


def refuse_scheduler(scheduler: diffusers.SchedulerMixin) -> None:
    """Raises [`UnsupportedSchedulerError`] for a scheduler that [`read_grid`] refuses whatever its timesteps."""
    _reader_of(scheduler)


def _reader_of(scheduler: diffusers.SchedulerMixin) -> Callable[[diffusers.SchedulerMixin], SchedulerGrid]:
    is_flow = scheduler.config.get("use_flow_sigmas") or scheduler.config.get("prediction_type") == "flow_prediction"
    for refused, advice in _NOT_MARKOV.items():
        if _is_a(scheduler, refused):
            advice = _ADVICE_FLOW if is_flow else advice
            _refuse(scheduler, "a step of it is not a function of the current latents alone (not Markov)", advice)
    for readable, reader in _READERS.items():
        if _is_a(scheduler, readable):
            _refuse_options(scheduler)
            return reader
    if not hasattr(scheduler, "alphas_cumprod") and not hasattr(scheduler, "sigmas"):
        raise UnsupportedSchedulerError(
            f"{type(scheduler).__name__} cannot be a policy: it has neither `alphas_cumprod` nor `sigmas`, so its steps are no Gaussian ones between noise "
            "levels (its latents are tokens, say). There is no other scheduler for such a pipeline."
        )
    advice = _ADVICE_FLOW if "Flow" in type(scheduler).__name__ else _ADVICE_VP
    _refuse(scheduler, "its grid is not one this package can read", advice)


def _is_a(scheduler: diffusers.SchedulerMixin, name: str) -> bool:
    # By name, since diffusers exports some classes only with scipy or in newer versions.
    return any(base.__name__ == name for base in type(scheduler).__mro__)


def _refuse_options(scheduler: diffusers.SchedulerMixin) -> None:
    """Refuses options under which a scheduler of a readable class does something that our transitions do not."""
    config, problems, changes = scheduler.config, [], []
    if config.get("thresholding", False):
        problems.append("dynamic thresholding has no usable gradient")
        changes.append("thresholding=False")
    variance = config.get("variance_type") or "fixed_small"
    if variance not in ("fixed_small", "fixed_small_log", *_LARGE_VARIANCES):
        problems.append(
            f'variance_type="{variance}" lets the network choose the noise of a step; without it, pipelines that know '
            "of such networks drop the channels that predict the variance"
        )
        changes.append('variance_type="fixed_small"')
    if problems:
        advice = f"{type(scheduler).__name__}.from_config(pipe.scheduler.config, {', '.join(changes)})"
        _refuse(scheduler, "; ".join(problems), advice)
    if scheduler.timesteps is not None and scheduler.timesteps.dim() != 1:
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
        kind (`str`, defaults to `"auto"`): `"cps"` where the scheduler's own step puts new noise on x0 (LCM, SCM, TCD,
            `stochastic_sampling=True`), `"flow_sde"` on other flow grids and `"ancestral"` on all others; or one of
            [`~dpok_trl.core.transitions.TransitionKind`].
        eta (`float` in (0, 1], defaults to 1.0): Noise of `"ancestral"` and `"cps"`.
        noise_level (`float` > 0, defaults to 0.7): Noise of `"flow_sde"`.

    Raises:
        ValueError: If `kind` is unknown or does not fit the grid, or if a number is out of range.
    """
    if kind == "auto":
        kind = "cps" if grid.renoises else "flow_sde" if grid.is_flow else "ancestral"
    if kind not in get_args(TransitionKind):
        raise ValueError(f"kind must be 'auto' or one of {get_args(TransitionKind)}, but is {kind!r}")
    if kind == "flow_sde" and not grid.is_flow:
        raise ValueError(
            'kind "flow_sde" needs a flow-matching scheduler (alpha = 1 - sigma), and this one is not; '
            'use "ancestral" or "auto"'
        )
    return Transition(kind=kind, eta=eta, noise_level=noise_level)


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
    """DDIM, DDPM and the consistency models' schedulers: integer timesteps into `alphas_cumprod`."""
    is_ddpm = _is_a(scheduler, "DDPMScheduler") or _is_a(scheduler, "DDPMParallelScheduler")
    if scheduler.num_inference_steps is None and not (is_ddpm and scheduler.custom_timesteps):
        raise ValueError("the scheduler has no grid yet: call scheduler.set_timesteps(num_inference_steps) first")
    is_lcm, is_tcd = _is_a(scheduler, "LCMScheduler"), _is_a(scheduler, "TCDScheduler")
    if is_ddpm or is_lcm:
        final = torch.tensor(1.0)
    elif is_tcd:
        final = scheduler.alphas_cumprod[0]
    else:
        final = scheduler.final_alpha_cumprod
    visited = scheduler.alphas_cumprod.cpu()[scheduler.timesteps.cpu()].double()
    signal = torch.cat([visited, final.cpu().double().reshape(1)])
    # CogVideoX's and TCD's schedulers have the option but do not clamp.
    clamps = scheduler.config.clip_sample and not (is_tcd or _is_a(scheduler, "CogVideoXDDIMScheduler"))
    return SchedulerGrid(
        timesteps=scheduler.timesteps.cpu().double(),
        alpha=signal.sqrt(),
        sigma=(1.0 - signal).sqrt(),
        prediction_type=_prediction_type(scheduler),
        clip_range=scheduler.config.clip_sample_range if clamps else None,
        epsilon_from_clipped_x0=is_ddpm,
        x0_scalings=_lcm_scalings(scheduler) if is_lcm else None,
        renoises=is_lcm or is_tcd,
    )


def _lcm_scalings(scheduler: diffusers.SchedulerMixin) -> tuple[Tensor, Tensor]:
    """Those of `get_scalings_for_boundary_condition_discrete`, which make x0 the latents themselves at timestep 0."""
    scaled_timesteps = scheduler.timesteps.cpu().double() * scheduler.config.timestep_scaling
    total = scaled_timesteps.square() + LCM_SIGMA_DATA**2
    return scaled_timesteps / total.sqrt(), LCM_SIGMA_DATA**2 / total


def _read_variance_exploding(scheduler: diffusers.SchedulerMixin) -> SchedulerGrid:
    """Euler, Euler-ancestral and LMS: x = x0 + sigma * eps, with `scale_model_input` before the network."""
    timesteps, sigma = _timesteps_and_sigmas(scheduler)
    return SchedulerGrid(timesteps, torch.ones_like(sigma), sigma, _prediction_type(scheduler))


def _read_edm(scheduler: diffusers.SchedulerMixin) -> SchedulerGrid:
    """EDM: x = x0 + sigma * eps, and the network predicts what is left of x0 after a share of x."""
    prediction_type, data = _prediction_type(scheduler), scheduler.config.sigma_data
    if prediction_type == "sample":
        _refuse(scheduler, "it has no scalings for prediction_type='sample'", _ADVICE_VE)
    timesteps, sigma = _timesteps_and_sigmas(scheduler)
    here = sigma[:-1]
    c_out = here * data / (here.square() + data**2).sqrt()
    c_skip = data**2 / (here.square() + data**2)
    scalings = (-c_out if prediction_type == "v_prediction" else c_out, c_skip)
    return SchedulerGrid(timesteps, torch.ones_like(sigma), sigma, "sample", x0_scalings=scalings)


def _read_flow(scheduler: diffusers.SchedulerMixin) -> SchedulerGrid:
    """Flow matching: x = (1 - sigma) * x0 + sigma * eps, and the network predicts eps - x0."""
    config = scheduler.config
    if config.get("scale_factors"):
        advice = f"{type(scheduler).__name__}.from_config(pipe.scheduler.config, scale_factors=None)"
        _refuse(scheduler, "scale_factors enlarge the latents between two steps", advice)
    timesteps, sigma = _timesteps_and_sigmas(scheduler)
    renoises = _is_a(scheduler, "FlowMatchLCMScheduler") or bool(config.get("stochastic_sampling", False))
    if bool((sigma > 1).any()):
        # Cosmos takes the class for an Euler step on a variance-exploding grid: x = x0 + sigma * eps, and the network's output is eps.
        return SchedulerGrid(timesteps, torch.ones_like(sigma), sigma, "epsilon", renoises=renoises)
    if not config.get("invert_sigmas", False):
        return SchedulerGrid(timesteps, 1.0 - sigma, sigma, "flow_prediction", is_flow=True, renoises=renoises)
    # Mochi counts the signal instead of the noise, and its network predicts x0 - eps: x0 = x + (1 - signal) * output.
    noise = 1.0 - sigma
    scalings = (noise[:-1], torch.ones_like(noise[:-1]))
    return SchedulerGrid(timesteps, sigma, noise, "sample", is_flow=True, x0_scalings=scalings, renoises=renoises)


def _read_solver(scheduler: diffusers.SchedulerMixin) -> SchedulerGrid:
    """DPM-Solver and its kin: `sigmas` are the flow's, or noise-to-signal ratios of a VP grid."""
    prediction_type, is_flow = _prediction_type(scheduler), bool(scheduler.config.use_flow_sigmas)
    if is_flow != (prediction_type == "flow_prediction"):
        _refuse(
            scheduler,
            f"prediction_type={prediction_type!r} does not go with use_flow_sigmas={is_flow}",
            f"{type(scheduler).__name__}.from_config(pipe.scheduler.config, use_flow_sigmas={not is_flow})",
        )
    timesteps, sigma = _timesteps_and_sigmas(scheduler)
    if is_flow:
        return SchedulerGrid(timesteps, 1.0 - sigma, sigma, prediction_type, is_flow=True)
    alpha = (1.0 + sigma.square()).rsqrt()
    return SchedulerGrid(timesteps, alpha, sigma * alpha, prediction_type)


def _read_trigflow(scheduler: diffusers.SchedulerMixin) -> SchedulerGrid:
    """SCM: x = cos(t) * x0 + sin(t) * sigma_data * eps, and x0 is cos(t) * x - sin(t) * output."""
    if scheduler.num_inference_steps is None:
        raise ValueError("the scheduler has no grid yet: call scheduler.set_timesteps(num_inference_steps) first")
    angle = scheduler.timesteps.cpu().double()
    # Its first angle of 1.5708 is past pi / 2, by 4e-6: no signal, and not a negative one.
    cosine, sine = angle.cos().clamp(min=0.0), angle.sin()
    return SchedulerGrid(
        timesteps=angle[:-1],
        alpha=cosine,
        sigma=scheduler.config.sigma_data * sine,
        prediction_type="sample",
        x0_scalings=(-sine[:-1], cosine[:-1]),
        renoises=True,
    )


def _timesteps_and_sigmas(scheduler: diffusers.SchedulerMixin) -> tuple[Tensor, Tensor]:
    """Both on the CPU in float64, one more sigma than timesteps."""
    # With sigmas of the caller's, LTX's scheduler gives the last of them a timestep too, at which no step begins.
    surplus = (0, 1) if _is_a(scheduler, "LTXEulerAncestralRFScheduler") else (1,)
    if scheduler.sigmas is None or len(scheduler.sigmas) - len(scheduler.timesteps) not in surplus:
        counts = (
            "none" if scheduler.sigmas is None else f"{len(scheduler.sigmas)} for {len(scheduler.timesteps)} timesteps"
        )
        raise ValueError(
            f"the scheduler needs one more sigma than timesteps and has {counts}: call "
            "scheduler.set_timesteps(num_inference_steps) first"
        )
    sigmas = scheduler.sigmas.cpu().double()
    return scheduler.timesteps.cpu().double()[: len(sigmas) - 1], sigmas


def _prediction_type(scheduler: diffusers.SchedulerMixin) -> PredictionType:
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "original_sample":  # Euler's other name for it
        return "sample"
    if prediction_type not in get_args(PredictionType):
        kinds = ", ".join(map(repr, get_args(PredictionType)))
        problem = f"prediction_type={prediction_type!r} is not one of {kinds}; it has to be what the network predicts"
        advice = f'{type(scheduler).__name__}.from_config(pipe.scheduler.config, prediction_type="epsilon")'
        _refuse(scheduler, problem, advice)
    return prediction_type


def _on_the_schedule_of(scheduler: Any, replacement: Any, defaults: dict[str, Any]) -> Any:
    # Not `from_config`, which drops every value that the first config had by default, also where the two defaults differ.
    accepted = inspect.signature(replacement.__init__).parameters
    return replacement(**{**defaults, **{name: value for name, value in scheduler.config.items() if name in accepted}})


LMS_ORDER = 4  # the default of `LMSDiscreteScheduler.step`, and no option of pipelines
LCM_SIGMA_DATA = 0.5  # fixed in `LCMScheduler`

_LARGE_VARIANCES = ("fixed_large", "fixed_large_log")

# DDIM's own defaults for keys that the other config lacks would clamp x_0 in latent space.
_DDIM_DEFAULTS = {"clip_sample": False, "set_alpha_to_one": False}

_WALKED_ON: dict[str, tuple[Any, dict[str, Any]]] = {
    "PNDMScheduler": (diffusers.DDIMScheduler, _DDIM_DEFAULTS),
    "CogVideoXDPMScheduler": (diffusers.CogVideoXDDIMScheduler, {}),
}

_ADVICE_VP = "DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False)"
_ADVICE_VE = "EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)"
_ADVICE_FLOW = "FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)"

_READERS: dict[str, Callable[[diffusers.SchedulerMixin], SchedulerGrid]] = {
    "DDIMScheduler": _read_alphas_cumprod,
    "DDIMParallelScheduler": _read_alphas_cumprod,
    "DDPMScheduler": _read_alphas_cumprod,
    "DDPMParallelScheduler": _read_alphas_cumprod,
    "CogVideoXDDIMScheduler": _read_alphas_cumprod,
    "LCMScheduler": _read_alphas_cumprod,
    "TCDScheduler": _read_alphas_cumprod,
    "EulerDiscreteScheduler": _read_variance_exploding,
    "EulerAncestralDiscreteScheduler": _read_variance_exploding,
    "LMSDiscreteScheduler": _read_variance_exploding,
    "EDMEulerScheduler": _read_edm,
    "EDMDPMSolverMultistepScheduler": _read_edm,
    "FlowMatchEulerDiscreteScheduler": _read_flow,
    "FlowMatchLCMScheduler": _read_flow,
    "LTXEulerAncestralRFScheduler": _read_flow,
    "DPMSolverMultistepScheduler": _read_solver,
    "DPMSolverSinglestepScheduler": _read_solver,
    "DEISMultistepScheduler": _read_solver,
    "UniPCMultistepScheduler": _read_solver,
    "SCMScheduler": _read_trigflow,
}

# PNDM and CogVideoXDPM are here for those who read them directly; a rollout never walks on them.
_NOT_MARKOV = {
    "PNDMScheduler": _ADVICE_VP,
    "CogVideoXDPMScheduler": "CogVideoXDDIMScheduler.from_config(pipe.scheduler.config)",
    "IPNDMScheduler": _ADVICE_VP,
    "HeunDiscreteScheduler": _ADVICE_VE,
    "KDPM2DiscreteScheduler": _ADVICE_VE,
    "KDPM2AncestralDiscreteScheduler": _ADVICE_VE,
    "DPMSolverSDEScheduler": _ADVICE_VE,
    "SASolverScheduler": _ADVICE_VP,
    "FlowMatchHeunDiscreteScheduler": _ADVICE_FLOW,
}


def _refuse(scheduler: diffusers.SchedulerMixin, problem: str, advice: str) -> NoReturn:
    raise UnsupportedSchedulerError(
        f"{type(scheduler).__name__} cannot be a policy: {problem}. Set pipe.scheduler = {advice}"
    )
