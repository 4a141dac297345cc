"""The policy against the pipeline itself: every input of every call of every denoiser, the images, and who gets a gradient.

Schedulers that can draw noise are compared at the noise that they draw; for those that cannot, the policy's noise is taken to its limit 0, and if
they have a noisy form, that one is compared too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL.Image import Image
from zoo import call_arguments

from dpok_trl.policy.hooks import PipelineHooks
from dpok_trl.policy.policy import Policy
from dpok_trl.policy.schedulers import policy_scheduler
from dpok_trl.policy.tuning import tune


VANISHING = 1e-6  # eta at which the policy is the deterministic sampler, to the tolerance below
SAME_PATH = 2e-4  # fp32, relative to the largest value: eta = 1e-6 and four steps through random networks
SAME_ROWS = 1e-5  # fp32 log-probabilities, mean-reduced: kernels depend on the batch

# Schedulers that draw noise in every step, and the transition of the policy that draws the same with eta = 1; all others are deterministic.
DRAWS_NOISE = {
    "DDPMScheduler": "ancestral",
    "EulerAncestralDiscreteScheduler": "ancestral",
    "LTXEulerAncestralRFScheduler": "ancestral",
    "FlowMatchLCMScheduler": "cps",
    "LCMScheduler": "cps",
    "SCMScheduler": "cps",
}


def call_untouched(pipe: DiffusionPipeline, prompts: tuple[str, ...], **more: Any) -> tuple[Any, list[float]]:
    """What `pipe` returns, with a generator for each sample, and the timesteps that it visits."""
    arguments = {**call_arguments(pipe), **more}
    # What the policy gives each sample of its own: the negative prompt, and the picture that it starts from.
    if isinstance(arguments.get("negative_prompt"), str):
        arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(prompts)
    if "strength" in inspect.signature(type(pipe).__call__).parameters:
        for name in ("image", "mask_image"):
            if isinstance(arguments.get(name), Image):
                arguments[name] = [arguments[name]] * len(prompts)
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    with first_order(pipe), recorded_steps(pipe, generators) as timesteps, torch.no_grad(), torch.random.fork_rng([]):
        torch.manual_seed(0)  # for what a pipeline draws beside its generators: the policy's own seed there
        output = pipe(prompt=list(prompts), generator=generators, output_type="pt", return_dict=False, **arguments)
    return output, timesteps


def compare_with_untouched(pipe: DiffusionPipeline, prompts: tuple[str, ...]) -> tuple[str, float]:
    """The policy against the pipeline itself: what is wrong ("" if nothing), and the largest difference found."""
    tuned = tune(pipe, PipelineHooks().denoisers(pipe))
    own, problems, paths = pipe.scheduler, [], []
    for scheduler, kind, more in comparisons(pipe):
        pipe.scheduler = scheduler
        eta = 1.0 if kind else VANISHING
        policy = Policy(pipe, tuned, call_kwargs=call_arguments(pipe), kind=kind or "ancestral", eta=eta)
        found, path = _compare(policy, prompts, **more)
        problems += found if scheduler is own else [f"with {type(scheduler).__name__}, {problem}" for problem in found]
        paths.append(path)
    pipe.scheduler = own
    problems += denoisers_without_gradient(Policy(pipe, tuned, call_kwargs=call_arguments(pipe)), prompts)
    return "; ".join(problems), max(paths)


def comparisons(pipe: DiffusionPipeline) -> list[tuple[Any, str | None, dict[str, Any]]]:
    """Schedulers; for each the policy's transition that draws the same noise, `None` where it draws none; and arguments of the call for it."""
    own = pipe.scheduler
    name, config = type(own).__name__, own.config
    if kind := drawn_noise(own):
        return [(own, kind, {})]
    if name == "DDIMScheduler" and "eta" in inspect.signature(type(pipe).__call__).parameters:
        return [(own, "ancestral", {"eta": 1.0})]
    deterministic = (own, None, {})
    if name == "EulerDiscreteScheduler" and config.prediction_type != "sample":  # which its noisy form does not know
        return [deterministic, (diffusers.EulerAncestralDiscreteScheduler.from_config(config), "ancestral", {})]
    # With sigmas counted the other way round (Mochi), or not those of a flow (Cosmos), the noisy form of diffusers is another process.
    is_flow = not config.get("invert_sigmas") and (config.get("sigma_max") or 0.0) <= 1.0
    if name == "FlowMatchEulerDiscreteScheduler" and is_flow:
        return [deterministic, (type(own).from_config(config, stochastic_sampling=True), "cps", {})]
    return [deterministic]


def _compare(policy: Policy, prompts: tuple[str, ...], **more: Any) -> tuple[list[str], float]:
    with recorded_calls(policy.networks) as ours:
        trajectory = policy.rollout(prompts, seeds=list(range(len(prompts))))
    with recorded_calls(policy.networks) as theirs:
        output, timesteps = call_untouched(policy.pipe, prompts, **more)

    problems = []
    visited = trajectory.recording.grid.timesteps
    if len(visited) != len(timesteps) or largest_difference(visited, torch.tensor(timesteps).double()) > SAME_PATH:
        problems.append(f"the rollout visits the timesteps {visited.tolist()}, the untouched pipeline {timesteps}")
    if len(ours) != len(theirs):
        problems.append(f"{len(ours)} calls of denoisers in the rollout, {len(theirs)} in the untouched pipeline")
    first = largest_difference(ours[:1], theirs[:1])
    if first != 0.0:
        problems.append(f"the first call of the denoiser differs by {first:.3g} from that of the untouched pipeline")
    path = max(largest_difference(ours, theirs), largest_difference(trajectory.images, as_images(output)))
    if not path <= SAME_PATH:
        problems.append(f"the rollout differs by {path:.3g} from the untouched pipeline")
    return problems, path


def drawn_noise(scheduler: Any) -> str | None:
    """The transition that draws as the scheduler itself does; `None` if it draws nothing."""
    if scheduler.config.get("stochastic_sampling", False):
        return "cps"
    if scheduler.config.get("algorithm_type", "").startswith("sde-"):
        return "ancestral"
    return DRAWS_NOISE.get(type(scheduler).__name__)


@contextmanager
def first_order(pipe: DiffusionPipeline) -> Iterator[None]:
    """With the scheduler that the policy walks on, at the order at which a step depends on the current latents alone."""
    scheduler = policy_scheduler(pipe.scheduler)
    settings: dict[str, Any] = {"solver_order": 1} if scheduler.config.get("solver_order", 1) > 1 else {}
    if "disable_corrector" in scheduler.config:  # UniPC goes back to the step before at order 1, too
        settings["disable_corrector"] = list(range(scheduler.config.num_train_timesteps))
    if str(scheduler.config.get("variance_type")).startswith("fixed_large"):
        settings["variance_type"] = "fixed_small"
    if settings:
        scheduler = type(scheduler).from_config(scheduler.config, **settings)
    own = pipe.scheduler
    pipe.scheduler = scheduler
    try:
        yield
    finally:
        pipe.scheduler = own


def difference_in_other_batches(pipe: DiffusionPipeline, prompts: tuple[str, ...]) -> float:
    """The largest difference of a log-probability when samples are replayed in another order, or alone; infinite where that raises. `pipe` has
    its adapters already."""
    arguments = call_arguments(pipe)
    own = {name: value for name, value in arguments.items() if isinstance(value, list) and len(value) == len(prompts)}
    shared = {name: value for name, value in arguments.items() if name not in own}
    policy = Policy(pipe, call_kwargs=shared)
    trajectory = policy.rollout(prompts, seeds=list(range(len(prompts))), arguments=own)
    differences = []
    for samples in (list(reversed(range(len(prompts)))), [len(prompts) - 1]):
        try:
            with torch.no_grad():
                replayed = torch.stack([step.log_prob for step in policy(trajectory, samples=samples)], dim=1)
        except Exception:  # whatever the pipeline says of a batch that does not fit to what it was given
            return float("inf")
        differences.append((replayed - trajectory.log_probs[samples]).abs().max().item())
    return max(differences)


def denoisers_without_gradient(policy: Policy, prompts: tuple[str, ...]) -> list[str]:
    trajectory = policy.rollout(prompts, seeds=list(range(len(prompts))))
    for step in trajectory.steps:
        (replayed,) = policy(trajectory, steps=[step])
        replayed.log_prob.sum().backward()
    missing = []
    for name, denoiser in policy.networks.items():
        gradients = [parameter.grad for parameter in denoiser.parameters() if parameter.grad is not None]
        if not any(bool(gradient.any()) for gradient in gradients):
            missing.append(f"`{name}` gets no gradient")
    return missing


# ---------------------------------------------------------------- what happened in a call


@contextmanager
def recorded_calls(denoisers: torch.nn.ModuleDict) -> Iterator[list[tuple[str, Any]]]:
    """The name and a copy of the inputs of every call of a denoiser."""
    calls: list[tuple[str, Any]] = []

    def record(name: str) -> Callable:
        return lambda module, args, kwargs: calls.append((name, (_copied(args), _copied(kwargs))))

    handles = [module.register_forward_pre_hook(record(name), with_kwargs=True) for name, module in denoisers.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def recorded_steps(pipe: DiffusionPipeline, generators: list[torch.Generator]) -> Iterator[list[float]]:
    """The timesteps of every `scheduler.step`, which is given `generators` where it takes them and the pipeline does not pass any."""
    timesteps: list[float] = []
    scheduler = pipe.scheduler
    original = scheduler.step
    takes_generator = "generator" in inspect.signature(original).parameters

    @wraps(original)
    def step(model_output: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        timesteps.append(float(torch.as_tensor(timestep).flatten()[0]))
        if takes_generator and kwargs.get("generator") is None and kwargs.get("variance_noise") is None:
            kwargs["generator"] = generators
        return original(model_output, timestep, *args, **kwargs)

    scheduler.step = step
    try:
        yield timesteps
    finally:
        del scheduler.step


def largest_difference(one: Any, two: Any) -> float:
    """The largest difference of the numbers in two nested values, relative to the largest number in each tensor (if above 1); infinite where
    they are built differently. Objects other than tensors, numbers and text are compared by type."""
    if type(one) is not type(two):
        return float("inf")
    if isinstance(one, torch.Tensor):
        if one.shape != two.shape or one.dtype != two.dtype:
            return float("inf")
        if one.numel() == 0 or torch.equal(one, two):
            return 0.0
        one, two = one.double(), two.double()
        return ((one - two).abs().max() / two.abs().max().clamp(min=1.0)).item()
    if isinstance(one, dict):
        if one.keys() != two.keys():
            return float("inf")
        return max((largest_difference(one[key], two[key]) for key in one), default=0.0)
    if isinstance(one, (list, tuple)):
        if len(one) != len(two):
            return float("inf")
        return max((largest_difference(a, b) for a, b in zip(one, two, strict=True)), default=0.0)
    return 0.0 if not isinstance(one, (str, int, float, bool)) or one == two else float("inf")


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return type(value)(map(_copied, value)) if type(value) in (list, tuple) else value


def as_images(output: Any) -> torch.Tensor:
    """What an untouched pipeline returned, as the policy gives images: float32, channels before height and width."""
    images = output[0]
    if isinstance(images, (list, tuple)):
        images = torch.stack([torch.as_tensor(image) for image in images])
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(images).movedim(-1, -3)
    return images.float()
