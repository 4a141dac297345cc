"""Settings that the experiments have in common, spelled out: runs are recognised by them, and must not change with a preset."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

from intervals import Values, difference, geometric, interval, ratio, verdict
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

# As many images, drawn beforehand, and one pass over them at half of their steps. Twenty times as many updates did no better (a reward-weighted run of one seed:
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


def _run(
    kind: str,
    base: dict[str, Any],
    tasks: str | tuple[str, ...],
    seed: int,
    quick: bool,
    reward: str = "soft",
    **config: Any,
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


rl = partial(_run, "rl", RL)
sft = partial(_run, "sft", SFT)


@dataclass(frozen=True)
class Arm:
    """What is compared: a name, and the run of each task and seed."""

    name: str
    run: Callable[[str, int], Run]

    def values(self, results: Results, tasks: Sequence[str], seeds: Iterable[int], measure: Measure) -> Values:
        """(task, seed) -> number."""
        return {(task, seed): measure(results[self.run(task, seed)], task) for seed in seeds for task in tasks}

    def curves(
        self, results: Results, task: str, seeds: Iterable[int], x: str, y: str
    ) -> list[list[tuple[float, float]]]:
        """Of each seed, (x, y) of every epoch that has them."""
        runs = (results[self.run(task, seed)] for seed in seeds)
        return [[(entry[x], entry[y]) for entry in result["curve"] if y in entry] for result in runs]


# --------------------------------------------------------------------------------------------------------------------------------------


def final(name: str) -> Measure:
    """Of the trained model, at the evaluation: `exact`, `soft`, `fidelity`, `diversity`, `kl`, or the trained reward."""
    return lambda result, task: result["final"][task][name][1][0]


def pretrained(name: str) -> Measure:
    """Of the model that it started from, on the same images."""
    return lambda result, task: result["final"][task][name][0][0]


def mean_while_training(result: Result, task: str) -> float:
    """The mean exact over the epochs of the run: how early it rises."""
    return fmean(entry["exact"] for entry in result["curve"])


def cpu_seconds(result: Result, task: str) -> float:
    """Of the training."""
    return result["curve"][-1]["cpu_s"]


SHARES = ("exact", "soft", "fidelity")  # in [0, 1]
DIGITS = {"exact": 2, "soft": 2, "fidelity": 3, "diversity": 3, "greenness": 3, "kl": 1}
TITLES = {"kl": "KL, nats"}  # of a column, if not the name


def title(name: str) -> str:
    return TITLES.get(name, name)


def shown(name: str, values: Values) -> str:
    """A cell: the mean with its interval, of a KL the geometric one."""
    found = geometric(values) if name == "kl" else interval(values)
    return (found.within(0, 1) if name in SHARES else found).text(DIGITS[name])


def compared(name: str, first: Values, second: Values) -> str:
    """A cell: the difference of two arms, of a KL their ratio."""
    return verdict(ratio(first, second)) if name == "kl" else verdict(difference(first, second), DIGITS[name])
