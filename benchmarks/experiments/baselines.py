"""2. What is taken from a reward before it becomes an advantage: the mean of the round, of the prompt, of the others, or what V expects."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from arms import TASKS, Arm, Measure, compared, final, mean_while_training, rl, shown, title
from intervals import Values, interval, over_tasks, table
from matplotlib.figure import Figure
from plots import curve, figure
from runner import Result, Results, Run


SEEDS = 3
V = {
    "train_adv_type": "value",
    "value_learning_rate": 1e-3,
    "value_batch_size": None,  # 256, or all there are
    "value_num_updates": 20,
    "value_gradient_accumulation_steps": 1,
    "value_scale_targets": True,
    "value_warmup_epochs": 0,
}
BASELINES = {
    "batch": {"train_adv_type": "batch"},
    "group": {"train_adv_type": "group"},
    "leave-one-out": {"train_adv_type": "leave_one_out"},
    "V of latents": {**V, "value_input": "latents"},
    "V of features": {**V, "value_input": "features"},
}
ALONE = ("batch", "V of latents", "V of features")  # of one prompt, the others are `batch` but for a factor of 63 / 64
TASK = "count"


def seeds(quick: bool) -> range:
    return range(1 if quick else SEEDS)


def jointly(quick: bool) -> list[Arm]:
    """Four prompts in a round, 16 images of each."""
    rounds = {"sample_num_images_per_prompt": 2} if quick else {"num_epochs": 48, "sample_num_images_per_prompt": 16}
    return [
        Arm(name, lambda task, seed, own=own: rl(TASKS, seed, quick, **rounds, **own))
        for name, own in BASELINES.items()
    ]


def alone(quick: bool) -> list[Arm]:
    return [Arm(name, lambda task, seed, own=BASELINES[name]: rl(task, seed, quick, **own)) for name in ALONE]


def runs(quick: bool = False) -> list[Run]:
    found = []
    for seed in seeds(quick):
        found += [arm.run(TASKS[0], seed) for arm in jointly(quick)]
        found += [arm.run(TASK, seed) for arm in alone(quick)]
    return found


# --------------------------------------------------------------------------------------------------------------------------------------


def tables(results: Results, quick: bool = False) -> dict[str, str]:
    return {
        "jointly": _compared(jointly(quick), results, TASKS, quick),
        "alone": _compared(alone(quick), results, [TASK], quick),
    }


def _compared(arms: Sequence[Arm], results: Results, tasks: Sequence[str], quick: bool) -> str:
    """Against the first arm."""

    def values(arm: Arm, those: Sequence[str], measure: Measure) -> Values:
        return over_tasks(arm.values(results, those, seeds(quick), measure))

    rows = []
    for arm in arms:
        cells = []
        # the second is one number of a run, whatever its prompts
        for those, measure in ((tasks, final("exact")), (tasks[:1], mean_while_training)):
            found = values(arm, those, measure)
            first = values(arms[0], those, measure)
            cells += [shown("exact", found), "" if arm is arms[0] else compared("exact", found, first)]
        explained = (
            interval(values(arm, tasks[:1], explained_variance)).text() if "value_input" in BASELINES[arm.name] else ""
        )
        rows.append([arm.name, *cells, shown("kl", values(arm, tasks, final("kl"))), explained])
    first = arms[0].name
    head = ["baseline", "exact", f"− {first}", "exact while training", f"− {first}", title("kl"), "V explains"]
    return table(head, rows)


def explained_variance(result: Result, task: str) -> float:
    """Of V, before it saw the round, over the second half of the run."""
    name = "value/explained_variance"
    return fmean(entry[name] for entry in result["curve"][len(result["curve"]) // 2 :])


def plot(results: Results, quick: bool = False) -> Figure:
    whole, axes = figure(2, width=3.4)
    for axis, words, arms, task in (
        (axes[0], "four prompts in one adapter", jointly(quick), TASKS[0]),
        (axes[1], TASK, alone(quick), TASK),
    ):
        axis.set_title(words)
        for arm in arms:
            found = arm.curves(results, task, seeds(quick), "images", "exact")
            curve(axis, found, list(BASELINES).index(arm.name), arm.name)
        axis.set(xlabel="images", ylabel="exact, of the round's samples")
        axis.legend(fontsize=7)
    return whole
