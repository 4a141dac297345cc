"""Which of diffusers' pipelines can be a policy? Builds a tiny one of every class, checks it, and writes docs/pipelines.md.

    PYTHONPATH=tools python tools/scan_pipelines.py --jobs 2
    PYTHONPATH=tools python tools/scan_pipelines.py --only "StableDiffusion*" --output -

A class passes if (1) `check_pipeline` replays every stochastic step with exactly the log-probability of the rollout, (2) every denoiser gets a
gradient, and (3) the rollout is the pipeline's own: against a call of the untouched pipeline with its own scheduler, every input of every call
of every denoiser agrees, and so do the images. For (3) schedulers that can draw noise are compared at the noise that they draw; for those that
cannot, the policy's noise is taken to its limit 0, and if they have a noisy form, that one is compared too.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import inspect
import logging
import multiprocessing
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL.Image import Image
from zoo import NotBuildable, build, call_arguments

from dpok_trl import check_pipeline
from dpok_trl.policy.hooks import PipelineHooks
from dpok_trl.policy.policy import Policy
from dpok_trl.policy.schedulers import policy_scheduler
from dpok_trl.policy.tuning import tune


TIME_LIMIT = 120  # seconds for a class
PROMPTS = ("a photo of a cat", "a red circle")
VANISHING = 1e-6  # eta at which the policy is the deterministic sampler, to the tolerance below
SAME_PATH = 2e-4  # fp32, relative to the largest value: eta = 1e-6 and four steps through random networks

# Schedulers that draw noise in every step, and the transition of the policy that draws the same with eta = 1; all others are deterministic.
DRAWS_NOISE = {
    "DDPMScheduler": "ancestral",
    "EulerAncestralDiscreteScheduler": "ancestral",
    "LTXEulerAncestralRFScheduler": "ancestral",
    "FlowMatchLCMScheduler": "cps",
    "LCMScheduler": "cps",
    "SCMScheduler": "cps",
}

PASSES, REFUSED, NOT_RUN, FAILS, NO_PROMPT = "passes", "refused", "not run here", "fails", "no prompt"
MEANING = {
    PASSES: "replays with ratio exactly 1, every denoiser gets a gradient, the rollout is the pipeline's own",
    REFUSED: "`check_pipeline` says that it cannot be a policy as it is, and why",
    FAILS: "accepted, but something goes wrong",
    NOT_RUN: "no tiny pipeline was made, or it does not run untouched with a list of prompts and a list of generators",
    NO_PROMPT: "the call takes no prompt, so it is out of the package's scope",
}
GROUPS = {
    "Text to image": "Nothing but a prompt is needed.",
    "With an image": "The call takes images too: image-to-image, inpainting, control, editing, super-resolution.",
    "Video": "The call makes frames, or takes them.",
    "Audio": "No images come out.",
    "Without a prompt": "Priors, decoders, unconditional and class-conditional pipelines.",
}


@dataclass(frozen=True)
class Row:
    """One class in the table; `ratio_deviation` is the largest |ratio - 1|, `path_deviation` the largest relative difference from the
    untouched pipeline."""

    name: str
    group: str
    verdict: str
    scheduler: str = ""
    detail: str = ""
    ratio_deviation: float | None = None
    path_deviation: float | None = None


def exported_pipelines() -> dict[str, type[DiffusionPipeline]]:
    """Every subclass of `DiffusionPipeline` that `import diffusers` exports, by name."""
    found = {}
    for name in sorted(dir(diffusers)):
        value = getattr(diffusers, name)
        if inspect.isclass(value) and issubclass(value, DiffusionPipeline) and value is not DiffusionPipeline:
            found[name] = value
    return found


def group_of(pipeline_class: type[DiffusionPipeline]) -> str:
    """From the names of the call's arguments."""
    taken = set(inspect.signature(pipeline_class.__call__).parameters)
    if "prompt" not in taken:
        return "Without a prompt"
    if any("video" in name or "frames" in name for name in taken):
        return "Video"
    if any("audio" in name or "waveform" in name for name in taken):
        return "Audio"
    pictures = (name for name in taken if name.endswith(("image", "images")) and "ip_adapter" not in name)
    return "With an image" if any(pictures) else "Text to image"


def examine(pipeline_class: type[DiffusionPipeline]) -> Row:
    """Builds, runs, checks and compares one class."""
    name, group = pipeline_class.__name__, group_of(pipeline_class)
    if "prompt" not in inspect.signature(pipeline_class.__call__).parameters:
        return Row(name, group, NO_PROMPT)
    try:
        pipe = build(pipeline_class)
    except NotBuildable as error:
        return Row(name, group, NOT_RUN, detail=str(error))
    except Exception as error:  # a constructor may raise anything; it becomes the row, in its own words
        return Row(name, group, NOT_RUN, detail=f"the constructor raises {_in_words(error)}")
    if getattr(pipe, "scheduler", None) is None:
        return _without_scheduler(pipe, name, group)
    scheduler = type(pipe.scheduler).__name__
    try:
        prompts = batch_that_runs(pipe)
    except Exception as error:  # likewise
        return _row_if_untouched_raises(pipe, Row(name, group, NOT_RUN, scheduler), error)
    try:
        report = check_pipeline(pipe, prompts=prompts, **call_arguments(pipe))
        deviation = max((abs(step.ratio - 1.0) for step in report.steps), default=None)
        if not report.ok:
            return Row(name, group, FAILS if report.steps else REFUSED, scheduler, report.reason, deviation)
        problem, path_deviation = compare_with_untouched(pipe, prompts)
    except Exception as error:  # likewise
        return Row(name, group, FAILS, scheduler, _in_words(error))
    if problem:
        return Row(name, group, FAILS, scheduler, problem, deviation, path_deviation)
    note = "" if len(prompts) > 1 else "its call takes one prompt at a time"
    return Row(name, group, PASSES, scheduler, note, deviation, path_deviation)


def _row_if_untouched_raises(pipe: DiffusionPipeline, row: Row, error: Exception) -> Row:
    """What `check_pipeline` refuses before it calls the pipeline is refused; of anything else nothing can be said."""
    try:
        report = check_pipeline(pipe, prompts=PROMPTS, **call_arguments(pipe))
    except Exception:
        return replace(row, detail=f"the untouched pipeline raises {_in_words(error)}")
    return replace(row, verdict=FAILS if report.ok or report.steps else REFUSED, detail=report.reason)


def _without_scheduler(pipe: DiffusionPipeline, name: str, group: str) -> Row:
    """Combined pipelines, and those with several schedulers under other names: `check_pipeline` has the sentence."""
    return Row(name, group, REFUSED, detail=check_pipeline(pipe).reason)


def batch_that_runs(pipe: DiffusionPipeline) -> tuple[str, ...]:
    """Two prompts, or one if the untouched pipeline takes no more."""
    try:
        call_untouched(pipe, PROMPTS)
    except Exception as error:  # what two prompts in a pipeline for one run into is different everywhere
        try:
            call_untouched(pipe, PROMPTS[:1])
        except Exception:
            raise error from None
        return PROMPTS[:1]
    return PROMPTS


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
    if name == "FlowMatchEulerDiscreteScheduler":
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


def _in_words(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


# ---------------------------------------------------------------- all of them, and the table


def scan(names: list[str], jobs: int = 1) -> list[Row]:
    """The rows of the classes of these names, each under a time limit."""
    if jobs == 1:
        return [_examine_in_time(name) for name in names]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_examine_in_time, names))


def _examine_in_time(name: str) -> Row:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    diffusers.utils.logging.set_verbosity(diffusers.utils.logging.CRITICAL)
    logging.getLogger("dpok_trl").setLevel(logging.ERROR)

    def out_of_time(*_: Any) -> None:
        raise TimeoutError(f"longer than {TIME_LIMIT} s")

    signal.signal(signal.SIGALRM, out_of_time)
    signal.alarm(TIME_LIMIT)
    try:
        row = examine(getattr(diffusers, name))
    finally:
        signal.alarm(0)
    print(f"{row.name}: {row.verdict}{': ' if row.detail else ''}{row.detail}", file=sys.stderr, flush=True)
    return row


def table(rows: list[Row], command: str) -> str:
    """The page: what was run, counts, and one row for each class."""
    counts = Counter(row.verdict for row in rows)
    prompted = [row for row in rows if row.verdict != NO_PROMPT]
    current = [row for row in prompted if ".deprecated." not in getattr(diffusers, row.name).__module__]
    text = [
        "# Pipelines",
        "",
        "Every pipeline class of diffusers, tried at a tiny size with random weights. Written by a tool; do not edit.",
        "",
        f"* Run: `{command}` on {datetime.date.today().isoformat()}, diffusers {diffusers.__version__}, torch {torch.__version__}, CPU, fp32",
        f"* {len(rows)} classes, {len(prompted)} take a prompt; of these {counts[PASSES]} pass",
        f"* Without those that diffusers has deprecated: {len(current)} take a prompt; of these {sum(row.verdict == PASSES for row in current)} pass",
        "",
        "| verdict | classes | meaning |",
        "|---|---|---|",
        *(f"| {verdict} | {counts[verdict]} | {meaning} |" for verdict, meaning in MEANING.items()),
        "",
        "*Ratio*: the largest |ratio - 1| of a replayed step, which must be exactly 0. *Path*: the largest difference between a rollout and the",
        "untouched pipeline with its own scheduler, over the inputs of every call of every denoiser and the images, relative to the largest value",
        f"of each; at most {SAME_PATH:g} passes. *Scheduler*: the one it was tried with.",
    ]
    for group, meaning in GROUPS.items():
        members = [row for row in rows if row.group == group]
        if not members:
            continue
        passing = sum(row.verdict == PASSES for row in members)
        heading = group if group == "Without a prompt" else f"{group}: {passing} of {len(members)}"
        text += ["", f"## {heading}", "", meaning, ""]
        text += ["| Pipeline | verdict | scheduler | ratio | path |", "|---|---|---|---|---|"]
        text += [line(row) for row in sorted(members, key=lambda row: row.name)]
    return "\n".join(text) + "\n"


def line(row: Row) -> str:
    verdict = f"**{row.verdict}**" if row.verdict == PASSES else row.verdict
    if row.detail:
        verdict += ": " + " ".join(row.detail.split()).replace("|", "\\|")
    numbers = ["" if value is None else f"{value:.2g}" for value in (row.ratio_deviation, row.path_deviation)]
    return f"| {row.name} | {verdict} | {row.scheduler} | {' | '.join(numbers)} |"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="*", help="pattern of class names, as in a shell")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--output", default="docs/pipelines.md", help="file to write, or - for the screen")
    options = parser.parse_args(arguments)
    names = fnmatch.filter(exported_pipelines(), options.only)
    if not names:
        parser.error(f"--only {options.only!r} matches no pipeline of diffusers")
    command = "python tools/scan_pipelines.py" + ("" if options.only == "*" else f" --only {options.only!r}")
    page = table(scan(names, options.jobs), command)
    if options.output == "-":
        print(page)
    else:
        Path(options.output).write_text(page)


if __name__ == "__main__":
    main()
