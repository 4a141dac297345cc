"""`dpok-trl check`: can a pipeline be tuned? `check_pipeline` from the command line, with the next thing to do."""

from __future__ import annotations

import argparse
import difflib
import inspect
import json
import statistics
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpok_trl.policy.shipped import DEMO


if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

    from dpok_trl.policy.check import PipelineReport


HELP = "roll a pipeline out, replay each step of it, and say whether it can be tuned"

PROMPTS = ["a photo of a cat", "a red circle"]
STEPS = 10
NOT_USABLE = 1  # exit code

# arguments of the call that have a setting of their own in a run
OWN_SETTINGS = {
    "num_inference_steps": "sample_num_steps",
    "guidance_scale": "sample_guidance_scale",
    "negative_prompt": "negative_prompts",
}

# Steps with gradients over so many times the median would decide an update among themselves.
DOMINANT = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help=f"Hub id or folder of a pipeline, or '{DEMO}' for the one that is shipped")
    parser.add_argument(
        "--scheduler", help="scheduler to check in place of the pipeline's, such as DDIM or EulerAncestralDiscrete"
    )
    parser.add_argument("--prompt", action="append", help=f"once for each image of the batch (default: {PROMPTS})")
    parser.add_argument("--steps", type=int, help=f"num_inference_steps of the call (default: {STEPS})")
    parser.add_argument("--guidance-scale", type=float, help="of the call (default: the pipeline's own)")
    parser.add_argument("--height", type=int, help="of the call (default: the pipeline's own)")
    parser.add_argument("--width", type=int, help="of the call (default: the pipeline's own)")
    parser.add_argument(
        "--set",
        action="append",
        type=_setting,
        metavar="NAME=VALUE",
        help="a further argument of the call, its value as JSON",
    )
    parser.add_argument(
        "--picture",
        action="append",
        type=_assignment,
        metavar="NAME=FILE",
        help="an argument of the call that is a picture, one for each image, such as image=photo.png",
    )
    parser.add_argument(
        "--same-picture",
        action="append",
        type=_assignment,
        metavar="NAME=FILE",
        help="likewise, for a call that takes a single picture for all images and no list of them",
    )
    parser.add_argument(
        "--transition", choices=["auto", "ancestral", "cps", "flow_sde"], default="auto", help="Gaussian of a step"
    )
    parser.add_argument("--eta", type=float, default=1.0, help="noise of the ancestral and cps transitions")
    parser.add_argument("--noise-level", type=float, default=0.7, help="noise of the flow_sde transition")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="to load in (default: diffusers' own)")
    parser.add_argument("--fp32-latents", action="store_true", help="keep the latents in fp32 between the steps")
    parser.add_argument("--device", help="such as cuda:1 (default: cuda where there is one, else cpu)")


def run(args: argparse.Namespace) -> int:
    from dpok_trl.demo.command import only_errors

    with only_errors():
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    started = time.monotonic()
    import torch

    # what needs no pipeline first: to load one may take minutes
    if args.steps is not None and args.steps < 1:
        raise ValueError(f"--steps {args.steps}: a call takes at least one step.")
    device = find_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.scheduler:
        find_scheduler(args.scheduler)
    each, same = pictures(args.picture), pictures(args.same_picture)
    print(f"Loading {args.model} ...", flush=True)
    pipe = load(args.model, args.dtype)
    scheduler_line = change_scheduler(pipe, args.scheduler) if args.scheduler else None
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    prompts = args.prompt or PROMPTS
    call = {**call_arguments(args, pipe), **same}
    print(
        f"Sampling {len(prompts)} {'image' if len(prompts) == 1 else 'images'} on {device}, then replaying each step ...",
        flush=True,
    )
    report = _check(args, pipe, prompts, each, call, device)
    print(f"\n{report}\n\n{verdict(report, args, call, scheduler_line)}")
    if report.ok and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        _check(args, pipe, prompts[:1], each, call, device)
        peak = torch.cuda.max_memory_allocated(device) / 2**30
        print(f"Peak memory with one image, weights and backward pass included: {peak:.1f} GiB.")
    print(f"Done in {time.monotonic() - started:.0f} s.", flush=True)
    return 0 if report.ok else NOT_USABLE


def _check(
    args: argparse.Namespace,
    pipe: DiffusionPipeline,
    prompts: list[str],
    each: dict[str, Image],
    call: dict[str, Any],
    device: torch.device,
) -> PipelineReport:
    """`check_pipeline` as the options say. Errors from inside the pipeline say so.

    Raises:
        `ValueError`: For those, and for too little memory.
    """
    import torch

    from dpok_trl.policy.check import check_pipeline

    try:
        return check_pipeline(
            pipe,
            prompts=prompts,
            arguments={name: [picture] * len(prompts) for name, picture in each.items()},
            kind=args.transition,
            eta=args.eta,
            noise_level=args.noise_level,
            fp32_latents=args.fp32_latents,
            call_kwargs=call,
        )
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{device} has too little memory. Try --dtype bf16, one --prompt instead of {len(prompts)}, or a smaller --height and --width."
        ) from error
    except (
        TypeError,
        ValueError,
        IndexError,
        RuntimeError,
    ) as error:  # of pipelines, for arguments that they miss or cannot take
        *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
        if not isinstance(error, TypeError) and innermost.f_globals["__name__"].startswith("dpok_trl."):
            raise  # our own
        raise ValueError(
            f"{type(pipe).__name__} raised {type(error).__name__}: {error}. Arguments of its call are given with --set NAME=VALUE and "
            "--picture NAME=FILE, or --same-picture NAME=FILE where it takes no list of pictures."
        ) from error


def find_device(name: str) -> torch.device:
    """A device that is there.

    Raises:
        `ValueError`: If it is not.
    """
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter for CUDA in a build without it
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device {name} cannot be used here: {reason}") from error
    return device


def pictures(given: list[tuple[str, str]] | None) -> dict[str, Image]:
    """The pictures of `NAME=FILE` options, as RGB."""
    from PIL import Image

    opened = {}
    for name, file in given or []:
        with Image.open(file) as picture:
            opened[name] = picture.convert("RGB")
    return opened


def load(model: str, dtype: str | None) -> DiffusionPipeline:
    """The pipeline of a folder, of the Hub or of this package.

    Raises:
        `FileNotFoundError`: For what can only be a folder, and is none.
        `ValueError`: For a single file.
    """
    from dpok_trl.policy.loading import load_pipeline

    path = Path(model).expanduser()
    if model == DEMO:
        return load_pipeline(DEMO, dtype)
    if path.is_file():
        raise ValueError(
            f"{model} is a single file. Load it with the `from_single_file` of its pipeline's class, write it with `save_pretrained`, and give that folder."
        )
    if path.is_dir() and not (path / "model_index.json").exists():
        raise FileNotFoundError(f"{model} holds no model_index.json: it is no folder of a whole diffusers pipeline.")
    if not path.is_dir() and (model.startswith((".", "~", "/")) or model.count("/") != 1):
        raise FileNotFoundError(
            f"there is no folder {model}, and a Hub id has the form owner/name. Give one of them, or '{DEMO}'."
        )
    return load_pipeline(path if path.is_dir() else model, dtype)


def find_scheduler(name: str) -> str:
    """The class in diffusers that a name stands for, whatever its case, with or without "Discrete" and "Scheduler".

    Raises:
        `ValueError`: For a name that diffusers does not have.
    """
    import diffusers

    names = {n.removesuffix("Scheduler").lower(): n for n in dir(diffusers) if n.endswith("Scheduler")}
    for key, found in list(names.items()):
        names.setdefault(key.replace("discrete", ""), found)
    wanted = name.lower().removesuffix("scheduler")
    if wanted not in names:
        close = [n for n in names if n.startswith(wanted)] + difflib.get_close_matches(wanted, names, n=5)
        near = ", ".join(dict.fromkeys(names[n].removesuffix("Scheduler") for n in close))
        raise ValueError(f"diffusers has no scheduler '{name}'." + (f" Did you mean one of: {near}?" if near else ""))
    return names[wanted]


def change_scheduler(pipe: DiffusionPipeline, name: str) -> str:
    """Puts another scheduler on the settings of the pipeline's own, and returns the line of code that does.

    Raises:
        `ValueError`: For a name that diffusers does not have.
    """
    import diffusers

    scheduler_class = getattr(diffusers, find_scheduler(name))
    accepted, config = inspect.signature(scheduler_class.__init__).parameters, pipe.scheduler.config
    # Where the other scheduler has no such setting, DDIM's default would clamp the predicted latents as if they were pixels.
    changes = {key: False for key in ("clip_sample", "set_alpha_to_one") if key in accepted and key not in config}
    if "shift" in accepted and "shift" not in config and "flow_shift" in config:
        changes["shift"] = config["flow_shift"]  # one setting under two names
    pipe.scheduler = scheduler_class.from_config(config, **changes)
    settings = "".join(f", {key}={value}" for key, value in changes.items())
    return f"pipe.scheduler = {scheduler_class.__name__}.from_config(pipe.scheduler.config{settings})"


def call_arguments(args: argparse.Namespace, pipe: DiffusionPipeline) -> dict[str, Any]:
    """The arguments of the pipeline's call that were given, and what a run always gives: steps and guidance, where it takes them."""
    from dpok_trl.training.config import DPOKConfig

    given = {
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "height": args.height,
        "width": args.width,
    }
    arguments = {name: value for name, value in given.items() if value is not None}
    arguments.update((name, _value(text)) for name, text in args.set or [])
    accepted = inspect.signature(type(pipe).__call__).parameters
    if "num_inference_steps" in accepted:
        arguments.setdefault("num_inference_steps", STEPS)
    if "guidance_scale" in accepted:
        own = accepted["guidance_scale"].default
        # a run has no setting for "none", so a pipeline with that default is checked with the number that the run would give it
        arguments.setdefault(
            "guidance_scale", own if isinstance(own, (int, float)) else DPOKConfig.sample_guidance_scale
        )
    return arguments


def verdict(report: PipelineReport, args: argparse.Namespace, call: dict[str, Any], scheduler_line: str | None) -> str:
    """What the table means, and what to do next."""
    if not report.ok:
        return (
            "It cannot be tuned as it is. The reason above says what to change; a step whose ratio is not exactly 1 would train on wrong gradients. "
            "More in the documentation under 'Bring your own pipeline'."
        )
    lines = [
        f"It can be tuned: each of the {len(report.steps)} stochastic steps replays exactly (ratio 1) and has a gradient."
    ]
    dominant = dominant_steps(report)
    if dominant:
        which = ", ".join(str(step.step_index) for step in report.steps if step.std <= dominant)
        lines.append(
            f"Small steps have large gradients: with step {which} left out (sample_min_std={dominant:g}) an update is shared by the others."
        )
    model, reward, prompts = f'"{args.model}"', "reward", "prompts"
    if args.model == DEMO:  # everything is there: the line can be run as it stands
        reward, prompts = '"demo-soft"', '["a green triangle"]'
        lines.append("From the command line: dpok-trl train. In Python: from dpok_trl import DPOKConfig, DPOKTrainer")
    if scheduler_line is not None:
        lines.append(f"With this scheduler: {scheduler_line}")
        model = "pipe"
    if args.picture or args.same_picture:
        lines.append("Pictures are opened with: from PIL import Image")
    if args.picture:
        columns = ", ".join(f"{name!r}: {_opened(file)}" for name, file in args.picture)
        lines.append(
            f"Prompts come with their pictures: prompts = [(prompt, {{{columns}}}) for prompt in {args.prompt or PROMPTS}]"
        )
    lines.append(f"Next: DPOKTrainer(DPOKConfig({_settings(args, call)}), {reward}, {prompts}, {model}).train()")
    return "\n".join(lines)


def dominant_steps(report: PipelineReport) -> float | None:
    """The `sample_min_std` that leaves out just the steps whose gradients are far above the median, if one does."""
    median = statistics.median(step.gradient_norm for step in report.steps)
    large = [step.std for step in report.steps if step.gradient_norm > DOMINANT * median]
    others = [step.std for step in report.steps if step.gradient_norm <= DOMINANT * median]
    if not large:
        return None
    floor = float(f"{1.01 * max(large):.2g}")
    return floor if max(large) <= floor < min(others) else None


def _settings(args: argparse.Namespace, call: dict[str, Any]) -> str:
    """The settings of a run that samples as the check did."""
    settings: dict[str, Any] = {setting: call[name] for name, setting in OWN_SETTINGS.items() if name in call}
    if args.transition != "auto":
        settings["sample_transition"] = args.transition
    if args.eta != 1.0:
        settings["sample_eta"] = args.eta
    if args.noise_level != 0.7:
        settings["sample_noise_level"] = args.noise_level
    if args.fp32_latents:
        settings["sample_fp32_latents"] = True
    if args.dtype is not None and args.scheduler is None:
        settings["model_dtype"] = args.dtype
    if args.picture:
        settings["sample_call_columns"] = [name for name, _ in args.picture]
    written = [f"{name}={value!r}" for name, value in settings.items()]
    files = dict(args.same_picture or [])
    others = {
        name: _opened(files[name]) if name in files else repr(value)
        for name, value in call.items()
        if name not in OWN_SETTINGS
    }
    if others:
        written.append(f"sample_call_kwargs={{{', '.join(f'{name!r}: {value}' for name, value in others.items())}}}")
    return ", ".join(written)


def _opened(file: str) -> str:
    return f"Image.open({file!r}).convert('RGB')"


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form name=value")
    return name, value


def _setting(text: str) -> tuple[str, str]:
    name, value = _assignment(text)
    json_spelling = {"True": "true", "False": "false", "None": "null"}.get(value)
    if json_spelling is not None:
        raise argparse.ArgumentTypeError(f"{text!r}: values are JSON, so write {name}={json_spelling}")
    return name, value


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:  # a word
        return text
