"""`check_pipeline`: does a pipeline work as a policy? Rollout and replay on the user's own pipeline, step by step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from dpok_trl.policy.errors import ReplayError, UnsupportedPipelineError
from dpok_trl.policy.hooks import PipelineHooks
from dpok_trl.policy.loading import load_pipeline
from dpok_trl.policy.lora import adapter_name, remove_adapter
from dpok_trl.policy.policy import Policy
from dpok_trl.policy.schedulers import UnsupportedSchedulerError
from dpok_trl.policy.tuning import Tuned, tune


@dataclass(frozen=True)
class StepReport:
    """One stochastic step of the check.

    Args:
        step_index (`int`): From 0, in generation order.
        timestep (`float`): The scheduler's value.
        std (`float`): Standard deviation of the step.
        log_prob_error (`float`): Largest |log p(replay) - log p(rollout)| over the samples, mean-reduced; 0 is exact.
        ratio (`float`): The ratio of the sample with that error, exp(log p(replay) - log p(rollout)).
        gradient_norm (`float`): Of the log-probability with respect to the adapter.
    """

    step_index: int
    timestep: float
    std: float
    log_prob_error: float
    ratio: float
    gradient_norm: float


@dataclass(frozen=True)
class PipelineReport:
    """Result of [`check_pipeline`]; printing it gives a table.

    Args:
        ok (`bool`): Every stochastic step replays exactly and has a gradient.
        reason (`str`): Why not; empty if `ok`.
        pipeline (`str`): The pipeline's class.
        scheduler (`str`): The scheduler's class.
        steps (`list[StepReport]`)
    """

    ok: bool
    reason: str
    pipeline: str
    scheduler: str
    steps: list[StepReport] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.pipeline} with {self.scheduler}: " + ("ok" if self.ok else f"not usable. {self.reason}")]
        if self.steps:
            lines.append(
                f"{'step':>5} {'timestep':>9} {'std':>9} {'log-prob error':>15} {'ratio':>10} {'gradient norm':>14}"
            )
        lines += [
            f"{s.step_index:>5} {s.timestep:>9.4g} {s.std:>9.4g} {s.log_prob_error:>15.3g} {s.ratio:>10.7g} {s.gradient_norm:>14.4g}"
            for s in self.steps
        ]
        return "\n".join(lines)


def check_pipeline(
    pipe: DiffusionPipeline | str | Path,
    *,
    prompts: Sequence[str] = ("a photo of a cat", "a red circle"),
    arguments: Mapping[str, Sequence[Any]] | None = None,
    kind: str = "auto",
    eta: float = 1.0,
    noise_level: float = 0.7,
    fp32_latents: bool = False,
    hooks: PipelineHooks | None = None,
    call_kwargs: Mapping[str, Any] | None = None,
    **more_call_kwargs: Any,
) -> PipelineReport:
    """Rolls `pipe` out and replays every stochastic step of it.

    A pipeline without an adapter gets one for the time of the check, always the same. The pipeline is left as it was, and torch's global random
    state too.

    Args:
        pipe (`DiffusionPipeline`, `str` or `Path`): A pipeline, a Hub id or a folder.
        prompts (`Sequence[str]`): A batch of at least two shows more than one.
        arguments (`Mapping[str, Sequence]`, *optional*): Arguments of the call with one value for each prompt.
        kind, eta, noise_level, fp32_latents, hooks: See [`Policy`].
        call_kwargs (`Mapping[str, Any]`, *optional*): Arguments of the pipeline's call, as in training. Those that have the name of an argument above can
            only be given here: the `noise_level` of an upscaling pipeline, say.
        more_call_kwargs: All others can be given by themselves: `num_inference_steps`, `guidance_scale`, `height` ...

    Returns:
        [`PipelineReport`]: With `ok=False` and a `reason` for what cannot be a policy; other errors (a wrong call argument, say) are raised.

    Raises:
        `ValueError`: For an argument of the call that is given twice, and for one that the call does not take.
    """
    twice = sorted(more_call_kwargs.keys() & (call_kwargs or {}).keys())
    if twice:
        raise ValueError(f"{', '.join(twice)} is given twice, in call_kwargs and by itself. Give it once.")
    pipe = load_pipeline(pipe)
    hooks = PipelineHooks() if hooks is None else hooks
    names = (type(pipe).__name__, type(getattr(pipe, "scheduler", None)).__name__)
    try:
        with _some_adapter(pipe, hooks) as tuned:
            policy = Policy(
                pipe,
                tuned,
                call_kwargs={**(call_kwargs or {}), **more_call_kwargs},
                kind=kind,
                eta=eta,
                noise_level=noise_level,
                fp32_latents=fp32_latents,
                hooks=hooks,
            )
            steps, without_gradient = _check_steps(policy, prompts, arguments)
    except (UnsupportedPipelineError, UnsupportedSchedulerError, ReplayError) as error:
        return PipelineReport(False, str(error), *names)
    for step in steps:
        if step.log_prob_error != 0.0:
            reason = (
                f"step {step.step_index} replays with another log-probability (off by {step.log_prob_error:.3g}): something in the pipeline is "
                "random, not deterministic, or keeps a state between calls."
            )
            return PipelineReport(False, reason, *names, steps)
        if not step.gradient_norm > 0:
            return PipelineReport(False, f"step {step.step_index} gives the adapter no gradient.", *names, steps)
    if without_gradient:
        reason = f"no step gives {', '.join(without_gradient)} a gradient: the call does not use it."
        return PipelineReport(False, reason, *names, steps)
    return PipelineReport(True, "", *names, steps)


def _check_steps(
    policy: Policy, prompts: Sequence[str], arguments: Mapping[str, Sequence[Any]] | None
) -> tuple[list[StepReport], list[str]]:
    """The report of each step, and the networks that got no gradient from any."""
    trajectory = policy.rollout(prompts, list(range(len(prompts))), arguments)
    owners = {
        parameter: name
        for name, module in policy.tuned.modules.items()
        for parameter in module.parameters()
        if parameter.requires_grad
    }
    without_gradient = set(owners.values())
    steps = []
    for column, step_index in enumerate(trajectory.steps):
        (replayed,) = policy(trajectory, steps=[step_index], verify=True)
        difference = replayed.log_prob.detach() - trajectory.log_probs[:, column]
        worst = difference[difference.abs().argmax()].item()
        gradients = torch.autograd.grad(replayed.log_prob.sum(), list(owners), allow_unused=True)
        norms = {
            parameter: gradient.float().norm()
            for parameter, gradient in zip(owners, gradients, strict=True)
            if gradient is not None
        }
        without_gradient -= {owners[parameter] for parameter, norm in norms.items() if norm > 0}
        steps.append(
            StepReport(
                step_index=step_index,
                timestep=trajectory.recording.grid.timesteps[step_index].item(),
                std=replayed.distribution.std[0].item(),
                log_prob_error=abs(worst),
                ratio=torch.tensor(worst).exp().item(),
                gradient_norm=torch.stack(list(norms.values())).norm().item() if norms else 0.0,
            )
        )
    return steps, sorted(without_gradient)


@contextmanager
def _some_adapter(pipe: DiffusionPipeline, hooks: PipelineHooks) -> Iterator[Tuned]:
    """Adds an adapter where there is none, and afterwards restores adapters, `requires_grad`, dtypes and train mode."""
    denoisers = hooks.denoisers(pipe)
    networks = [component for component in pipe.components.values() if isinstance(component, torch.nn.Module)]
    added = [module for module in denoisers.values() if adapter_name(module) is None]
    before = {p: (p.requires_grad, p.dtype) for module in networks for p in module.parameters()}
    training = {module: module.training for network in networks for module in network.modules()}
    try:
        # so that a check is repeatable, and the caller's own random numbers are as if there had been none
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.default_generator.manual_seed(0)
            torch.cuda.manual_seed_all(0)
            tuned = tune(pipe, denoisers)
        yield tuned
    finally:
        for module in added:
            if adapter_name(module) is not None:
                remove_adapter(module)
        for parameter, (requires_grad, dtype) in before.items():
            parameter.requires_grad_(requires_grad)
            parameter.data = parameter.data.to(dtype)
        for module, mode in training.items():
            module.training = mode
