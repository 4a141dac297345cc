"""5. Four prompts in one adapter, or an adapter for each, from as many images."""

from __future__ import annotations

from arms import TASKS, Arm, final, of_curve, rl
from intervals import difference, interval, table, verdict
from matplotlib.figure import Figure
from plots import curve, figure
from runner import Results, Run


SEEDS = 3


def seeds(quick: bool) -> range:
    return range(1 if quick else SEEDS)


def apart(quick: bool) -> Arm:
    return Arm("an adapter for each", lambda task, seed: rl(task, seed, quick))


def jointly(quick: bool) -> Arm:
    """Four times the rounds, of 16 images of each prompt."""
    rounds = {"sample_num_images_per_prompt": 2} if quick else {"num_epochs": 96, "sample_num_images_per_prompt": 16}
    own = {**rounds, "train_adv_type": "group", "log_gradient_cosine_freq": 1 if quick else 8}
    return Arm("one adapter", lambda task, seed: rl(TASKS, seed, quick, **own))


def runs(quick: bool = False) -> list[Run]:
    found = []
    for seed in seeds(quick):
        found += [apart(quick).run(task, seed) for task in TASKS]
        found.append(jointly(quick).run(TASKS[0], seed))
    return found


# --------------------------------------------------------------------------------------------------------------------------------------


def tables(results: Results, quick: bool = False) -> dict[str, str]:
    return {"budget": _budget(results, quick), "cosines": _cosines(results, quick)}


def _budget(results: Results, quick: bool) -> str:
    rows = []
    for name, digits in (("exact", 2), ("fidelity", 3), ("kl", 1)):
        for those in [*([task] for task in TASKS), list(TASKS)]:
            one, four = (
                arm.values(results, those, seeds(quick), final(name)) for arm in (jointly(quick), apart(quick))
            )
            title = those[0] if len(those) == 1 else "mean of the four"
            if name == "exact" or len(those) > 1:
                label = f"{'KL, nats' if name == 'kl' else name}, {title}"
                cells = [
                    interval(one).text(digits),
                    interval(four).text(digits),
                    verdict(difference(one, four), digits),
                ]
                rows.append([label, *cells])
    return table(["", "one adapter", "an adapter for each", "difference"], rows)


def _cosines(results: Results, quick: bool) -> str:
    """Between the policy gradients of two prompts, early and late in the run."""
    rows = []
    for name in ("gradient/cosine_mean", "gradient/cosine_min"):
        found = [
            [entry[name] for entry in results[run]["curve"] if name in entry]
            for run in jointly(quick).done(results, TASKS[0], seeds(quick))
        ]
        cells = []
        for late in (False, True):
            half = [values[len(values) // 2 :] if late else values[: len(values) // 2 or 1] for values in found]
            means = {("", seed): sum(values) / len(values) for seed, values in enumerate(half)}
            cells.append(interval(means).text())
        rows.append([f"`{name}`", *cells])
    return table(["", "first half of the run", "second half"], rows)


def plot(results: Results, quick: bool = False) -> Figure:
    whole, axes = figure(2, width=3.4)
    joint = jointly(quick).done(results, TASKS[0], seeds(quick))
    axes[0].set_title("exact, of the round's samples")
    curve(axes[0], [of_curve(results[run], "images", "exact") for run in joint], 0, "one adapter for all")
    per_task = [
        [of_curve(results[run], "images", "exact") for run in apart(quick).done(results, task, seeds(quick))]
        for task in TASKS
    ]
    complete = min(len(runs) for runs in per_task)
    means = [
        [
            (sum(task[seed][at][0] for task in per_task), sum(task[seed][at][1] for task in per_task) / len(TASKS))
            for at in range(len(per_task[0][seed]))
        ]
        for seed in range(complete)
    ]
    curve(axes[0], means, 1, "one for each (mean, images of all)")
    axes[0].set(xlabel="images", ylabel="exact")
    axes[0].legend(fontsize=7)
    axes[1].set_title("cosine of the prompts' gradients")
    for index, name in enumerate(("gradient/cosine_mean", "gradient/cosine_min")):
        found = [[(entry["images"], entry[name]) for entry in results[run]["curve"] if name in entry] for run in joint]
        curve(axes[1], found, index, name.removeprefix("gradient/cosine_"))
    axes[1].axhline(0, color="#62676e", linewidth=0.8)
    axes[1].set(xlabel="images", ylabel="cosine")
    axes[1].legend(fontsize=7)
    return whole
