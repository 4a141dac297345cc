"""Settings that the experiments have in common, spelled out: runs are recognised by them, and must not change with a preset."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from intervals import Values
from runner import Result, Results, Run


TASKS = ("color", "count", "composition", "location")

# Of the shipped pipeline: 1536 images in 24 rounds of 64. Five updates a round, each of 2 of the 10 steps of all 64 images.
RL = {
    "num_epochs": 24,
    "sample_num_steps": 10,
    "sample_eta": 1.0,
    "sample_guidance_scale": 1.0,
    "sample_batch_size": 64,
    "sample_num_batches_per_epoch": 1,
    "sample_grid_freq": 0,
    "train_batch_size": 64,
    "train_timesteps_per_update": 2,
    "train_learning_rate": 2e-3,
    "train_lr_scheduler": "cosine",
    "train_adam_beta1": 0.9,
    "train_adam_beta2": 0.99,
    "train_adam_weight_decay": 1e-4,
    "train_max_grad_norm": 1.0,
    "train_log_prob_reduction": "sum",
    "train_objective": "dpok",
    "train_clip_range": 0.2,
    "train_adv_type": "batch",
    "train_adv_scale": True,
    "train_adv_clip_max": 5.0,
    "train_num_inner_epochs": 1,
    "train_buffer_rounds": 1,
    "kl_weight": 0.02,
    "kl_type": "gaussian",
    "kl_gradient": "paper",
}

# As many images, drawn once, and one pass over them at half of their steps. Twenty times as many updates did no better (a reward-weighted run of one seed:
# 0.61 exact), and learning rates of 5e-4, 1e-3 and 2e-3 were alike.
SFT = {
    "num_epochs": 1,
    "sample_num_steps": 10,
    "sample_eta": 1.0,
    "sample_guidance_scale": 1.0,
    "sample_batch_size": 64,
    "sample_num_batches_per_epoch": 24,
    "train_batch_size": 64,
    "train_timestep_fraction": 0.5,
    "train_timesteps_per_update": 2,
    "train_learning_rate": 1e-3,
    "train_lr_scheduler": "cosine",
    "train_adam_beta1": 0.9,
    "train_adam_beta2": 0.99,
    "train_adam_weight_decay": 1e-4,
    "train_max_grad_norm": 1.0,
    "sft_loss": "reward_weighted",
    "sft_kl": "none",
}

Measure = Callable[[Result, str], float]  # of a result, for a task

QUICK = {"num_epochs": 3, "sample_batch_size": 4, "train_batch_size": 4, "sample_num_steps": 3}
UNSET = object()  # of a setting that an arm does not have
IMAGES = 128  # of an evaluation
QUICK_IMAGES = 4


def rl(tasks: str | tuple[str, ...], seed: int, quick: bool = False, reward: str = "soft", **config: Any) -> Run:
    return _run("rl", RL, tasks, seed, quick, reward, config)


def sft(tasks: str | tuple[str, ...], seed: int, quick: bool = False, reward: str = "soft", **config: Any) -> Run:
    return _run("sft", SFT, tasks, seed, quick, reward, config)


def _run(
    kind: str,
    base: dict[str, Any],
    tasks: str | tuple[str, ...],
    seed: int,
    quick: bool,
    reward: str,
    config: dict[str, Any],
) -> Run:
    changed = {**base, **config, **(QUICK if quick else {})}
    settings = {
        "tasks": [tasks] if isinstance(tasks, str) else list(tasks),
        "reward": reward,
        "seed": seed,
        "images": QUICK_IMAGES if quick else IMAGES,
        "config": {name: value for name, value in changed.items() if value is not UNSET},
    }
    return Run(kind, settings)


@dataclass(frozen=True)
class Arm:
    """What is compared: a name, and the run of each task and seed."""

    name: str
    run: Callable[[str, int], Run]

    def values(self, results: Results, tasks: Sequence[str], seeds: Iterable[int], measure: Measure) -> Values:
        """(task, seed) -> number, of the runs that are done."""
        runs = {(task, seed): self.run(task, seed) for task in tasks for seed in seeds}
        return {key: measure(results[run], key[0]) for key, run in runs.items() if run in results}

    def done(self, results: Results, task: str, seeds: Iterable[int]) -> list[Run]:
        return [run for run in (self.run(task, seed) for seed in seeds) if run in results]


def final(name: str) -> Measure:
    """Of the trained model, at the evaluation: `exact`, `soft`, `fidelity`, `diversity`, `kl`, or the trained reward."""
    return lambda result, task: result["final"][task][name][1][0]


def mean_while_training(name: str) -> Measure:
    """The mean over the epochs of the run: how early it rises."""
    return lambda result, task: fmean(entry[name] for entry in result["curve"])


def of_curve(result: Result, x: str, y: str) -> list[tuple[float, float]]:
    return [(entry[x], entry[y]) for entry in result["curve"]]


def cpu_seconds(result: Result, task: str) -> float:
    """Of the training."""
    return result["curve"][-1]["cpu_s"]
