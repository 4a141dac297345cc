"""What a trainer shows of itself: trackers, samples and the report."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator

from dpok_trl.results.evaluation import Evaluation
from dpok_trl.results.pictures import to_pil
from dpok_trl.results.provenance import command_line, public_model
from dpok_trl.results.report import describe_run, render_report
from dpok_trl.results.runlog import without_secrets
from dpok_trl.results.samples import SAMPLES_PER_EPOCH, Samples
from dpok_trl.training.batches import SampledBatch
from dpok_trl.training.config import DPOKConfig
from dpok_trl.training.processes import together
from dpok_trl.training.scoring import categories_of


if TYPE_CHECKING:
    from dpok_trl.training.trainer import DPOKTrainer


WITHOUT_LOGIN = {
    "wandb": "Log in with `wandb login` or WANDB_API_KEY; or set WANDB_MODE=offline, and send the run later with `wandb sync`.",
    "swanlab": "Log in with `swanlab login` or SWANLAB_API_KEY; or set tracker_kwargs={'swanlab': {'mode': 'offline'}}, and send the run later with "
    "`swanlab sync`.",
}


class TrackerError(RuntimeError):
    """A tracker cannot be started; the message says what to do."""


def start_trackers(accelerator: Accelerator, config: DPOKConfig) -> None:
    """Called on all processes when training begins, and again when it is called again: trackers are closed at its end.

    Raises:
        [`TrackerError`]: If a tracker cannot be started; on the other processes `RuntimeError`. It says what to do.
    """
    settings = without_secrets(config.to_dict())
    accelerator.trackers.clear()  # those of an earlier `train` are closed, and would be logged to again
    with together(accelerator):
        try:
            accelerator.init_trackers(
                config.tracker_project_name,
                config={k: v for k, v in settings.items() if isinstance(v, (int, float, str, bool))},
                init_kwargs=config.tracker_kwargs,
            )
        except Exception as raised:  # whatever a tracker raises: said with what to do
            names = [str(name) for name in accelerator.log_with]
            todo = [WITHOUT_LOGIN[name] for name in names if name in WITHOUT_LOGIN]
            if config.log_with == "all":
                todo.append(
                    f"log_with = 'all' takes every tracker that is installed ({', '.join(names)}): name the one that you want."
                )
            raise TrackerError(
                " ".join([f"a tracker could not be started (log_with = '{config.log_with}'): {type(raised).__name__}: {raised}.", *todo,
                          "Without log_with everything is in output_dir: metrics.jsonl, samples and report.html."])
            ) from raised  # fmt: skip


def logged_samples(trainer: DPOKTrainer, batches: Sequence[SampledBatch], epoch: int, step: int) -> Samples:
    """The first images of the main process's round, with what belongs to each."""
    pictures, prompts, seeds, categories = [], [], [], []
    column = trainer.config.sample_category_column
    for batch in batches:
        room = SAMPLES_PER_EPOCH - len(pictures)
        if room <= 0:
            break
        pictures += to_pil(batch.trajectory.images[:room])
        prompts += batch.trajectory.prompts[:room]
        seeds += batch.trajectory.seeds[:room]
        metadata = batch.metadata[:room]
        categories += [None] * len(metadata) if column is None else categories_of(metadata, column)
    count = len(pictures)
    values, applies = (
        torch.cat([getattr(one.scores, name) for one in batches])[:count] for name in ("values", "applies")
    )
    each = {
        name: [value if asked else None for value, asked in zip(values[:, index].tolist(), applies[:, index].tolist(), strict=True)]
        for index, name in enumerate(trainer.rewards.names)
    }  # fmt: skip
    rewards = torch.cat([batch.rewards for batch in batches])[:count].tolist()
    return Samples(pictures, list(prompts), rewards, each, [int(seed) for seed in seeds], categories, epoch, step)


def begin_report(trainer: DPOKTrainer) -> None:
    """Writes `config.yaml`, and into `report.json` what is known before the first image, so that a report can be made of a run that is killed."""
    if not trainer.accelerator.is_main_process:
        return
    config = trainer.config
    settings = dataclasses.asdict(config)
    settings.pop("resume_from")  # how this part of the run began, and no setting of the run
    trainer.run_log.write_config(settings)
    pipeline = type(trainer.pipeline).__name__
    base = trainer.pipeline.config.get("_name_or_path")
    count = sum(parameter.numel() for parameter in trainer.trainable_layers)
    describe_run(
        trainer.output_dir,
        title=f"{trainer.output_dir.resolve().name}: {', '.join(trainer.rewards.names)}",
        summary=f"{pipeline}{f' ({public_model(base)})' if base else ''}, tuned on the reward {', '.join(trainer.rewards.names)} by {type(trainer).__name__}.",
        command=command_line(),
        config=without_secrets(config.to_dict()),
        facts={
            "Trained weights": f"{count:,} parameters, {'all of the network' if trainer.tuned.full else 'an adapter'}",
            "Processes": str(trainer.accelerator.num_processes),
        },
        reduction=config.train_log_prob_reduction,
        device=trainer.accelerator.device,
    )


def report(trainer: DPOKTrainer, evaluation: Evaluation | None = None) -> None:
    """Writes `report.html`: after an evaluation and at the end of training. On the main process."""
    if trainer.accelerator.is_main_process:
        if evaluation is not None:
            describe_run(trainer.output_dir, evaluation=evaluation)
        render_report(trainer.output_dir)
