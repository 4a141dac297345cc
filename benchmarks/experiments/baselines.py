"""2. What is taken from a reward before it becomes an advantage: the mean of the round, of the prompt, of the others, or what V expects."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from arms import TASKS, Arm, final, mean_while_training, of_curve, rl
from intervals import difference, interval, table, verdict
from matplotlib.figure import Figure
from plots import curve, figure
from runner import Result, Results, Run


SEEDS = 3
BASELINES = {
    "batch": {"train_adv_type": "batch"},
    "group": {"train_adv_type": "group"},
    "leave-one-out": {"train_adv_type": "leave_one_out"},
    "V of latents": {"train_adv_type": "value", "value_input": "latents"},
    "V of features": {"train_adv_type": "value", "value_input": "features"},
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
    measures = {
        "exact": (final("exact"), tasks),
        "exact while training": (mean_while_training("exact"), tasks[:1]),  # one number of a run, whatever its prompts
        "KL, nats": (final("kl"), tasks),
    }
    rows = []
    for arm in arms:
        cells = []
        for name, (measure, those) in measures.items():
            digits = 1 if name.startswith("KL") else 2
            values = arm.values(results, those, seeds(quick), measure)
            cells.append(interval(values).text(digits))
            if arm is not arms[0] and not name.startswith("KL"):
                cells.append(
                    verdict(difference(values, arms[0].values(results, those, seeds(quick), measure)), digits)
                )
            elif not name.startswith("KL"):
                cells.append("")
        explained = (
            interval(arm.values(results, tasks[:1], seeds(quick), explained_variance)) if "V" in arm.name else None
        )
        rows.append([arm.name, *cells, "" if explained is None else explained.text()])
    first = arms[0].name
    head = ["baseline", "exact", f"− {first}", "exact while training", f"− {first}", "KL, nats", "V explains"]
    return table(head, rows)


def explained_variance(result: Result, task: str) -> float:
    """Of V, before it saw the round, over the second half of the run."""
    name = "value/explained_variance"
    return fmean(entry[name] for entry in result["curve"][len(result["curve"]) // 2 :])


def plot(results: Results, quick: bool = False) -> Figure:
    whole, axes = figure(2, width=3.4)
    for axis, title, arms, task in (
        (axes[0], "four prompts in one adapter", jointly(quick), TASKS[0]),
        (axes[1], TASK, alone(quick), TASK),
    ):
        axis.set_title(title)
        for arm in arms:
            found = [of_curve(results[run], "images", "exact") for run in arm.done(results, task, seeds(quick))]
            curve(axis, found, list(BASELINES).index(arm.name), arm.name)
        axis.set(xlabel="images", ylabel="exact, of the round's samples")
        axis.legend(fontsize=7)
    return whole
