"""Which of diffusers' pipelines can be a policy? Builds a tiny one of every class, checks it, and writes docs/pipelines.md.

    PYTHONPATH=tools python tools/scan_pipelines.py --jobs 2
    PYTHONPATH=tools python tools/scan_pipelines.py --only "StableDiffusion*" --output -

A class passes if (1) `check_pipeline` replays every stochastic step with exactly the log-probability of the rollout, (2) every denoiser gets a
gradient, and (3) the rollout is the pipeline's own: against a call of the untouched pipeline with its own scheduler, every input of every call
of every denoiser agrees, and so do the images (`untouched.py`).
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
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from untouched import (
    SAME_PATH,
    SAME_ROWS,
    call_untouched,
    compare_with_untouched,
    difference_in_other_batches,
)
from zoo import NotBuildable, build, call_arguments
from zoo.inputs import STEPS

from dpok_trl import check_pipeline


TIME_LIMIT = 120  # seconds for a class
PROMPTS = ("a photo of a cat", "a red circle")
LONG = 12  # steps of the check of ratios
# for a pipeline whose prompts are JSON
EDITS = ('{"edit_instruction": "add a cat"}', '{"edit_instruction": "make it red"}')
# What a class passes with, where that is not what its checkpoints come with.
REMARKS = {"IF*": 'with `variance_type="fixed_small"` and without thresholding in the scheduler\'s config'}

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
        report = check_pipeline(pipe, prompts=prompts, **long_call(pipe))
        deviation = max((abs(step.ratio - 1.0) for step in report.steps), default=None)
        if not report.ok:
            return Row(name, group, REFUSED, scheduler, report.reason, deviation)
        problem, path_deviation = compare_with_untouched(pipe, prompts)
        other_batches = difference_in_other_batches(pipe, prompts) if len(prompts) > 1 else 0.0
    except Exception as error:  # likewise
        return Row(name, group, FAILS, scheduler, _in_words(error))
    if problem:
        return Row(name, group, FAILS, scheduler, problem, deviation, path_deviation)
    notes = [remark for pattern, remark in REMARKS.items() if fnmatch.fnmatchcase(name, pattern)]
    if len(prompts) == 1:
        notes.append("its call takes one prompt at a time")
    if not other_batches <= SAME_ROWS:
        notes.append("replay only in the batches of the rollout")
    return Row(name, group, PASSES, scheduler, "; ".join(notes), deviation, path_deviation)


def _row_if_untouched_raises(pipe: DiffusionPipeline, row: Row, error: Exception) -> Row:
    """What `check_pipeline` refuses before it calls the pipeline is refused; of anything else nothing can be said."""
    try:
        report = check_pipeline(pipe, prompts=PROMPTS, **call_arguments(pipe))
    except Exception:
        return replace(row, detail=f"the untouched pipeline raises {_in_words(error)}")
    return replace(
        row,
        verdict=FAILS if report.ok else REFUSED,
        detail=report.reason or f"the untouched pipeline raises {_in_words(error)}",
    )


def _without_scheduler(pipe: DiffusionPipeline, name: str, group: str) -> Row:
    """Combined pipelines, and those with several schedulers under other names: `check_pipeline` has the sentence."""
    return Row(name, group, REFUSED, detail=check_pipeline(pipe).reason)


def long_call(pipe: DiffusionPipeline) -> dict[str, Any]:
    """With steps enough for what begins late, guidance with a running average after ten steps, say; other calls need few steps to be quick."""
    arguments = call_arguments(pipe)
    one_for_each_step = any(name in arguments for name in ("image_latents", "guidance_schedule"))
    if arguments.get("num_inference_steps") == STEPS and not one_for_each_step:
        arguments["num_inference_steps"] = LONG
    return arguments


def batch_that_runs(pipe: DiffusionPipeline) -> tuple[str, ...]:
    """Two prompts, or one if the untouched pipeline takes no more."""
    prompts = EDITS if type(pipe).__name__ == "BriaFiboEditPipeline" else PROMPTS
    try:
        call_untouched(pipe, prompts)
    except Exception as error:  # what two prompts in a pipeline for one run into is different everywhere
        try:
            call_untouched(pipe, prompts[:1])
        except Exception:
            raise error from None
        return prompts[:1]
    return prompts


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
        f"of each; at most {SAME_PATH:g} passes. *Scheduler*: the one it was tried with. *Replay only in the batches of the rollout*: samples replayed in",
        f"another order or alone have other log-probabilities (by more than {SAME_ROWS:g}), or the call refuses them, because something belongs to the batch as",
        "a whole: a picture that is encoded once, noise of torch's global generator, padding up to the longest prompt.",
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
