"""5. Four prompts in one adapter, or an adapter for each, from as many images."""

from __future__ import annotations

from statistics import fmean

from arms import TASKS, Arm, compared, final, rl, shown, title
from intervals import interval, over_tasks, table
from matplotlib.figure import Figure
from plots import FAINT, curve, figure
from runner import Results, Run


SEEDS = 3
COSINES = ("gradient/cosine_mean", "gradient/cosine_min")


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
    for name in ("exact", "fidelity", "kl"):
        for those in [*([task] for task in TASKS), TASKS] if name == "exact" else [TASKS]:
            one, each = (
                over_tasks(arm.values(results, those, seeds(quick), final(name)))
                for arm in (jointly(quick), apart(quick))
            )
            label = f"{title(name)}, {those[0] if len(those) == 1 else 'mean of the four'}"
            rows.append([label, shown(name, one), shown(name, each), compared(name, one, each)])
    return table(["", "one adapter", "an adapter for each", "difference; of the KL ratio"], rows)


def _cosines(results: Results, quick: bool) -> str:
    """Between the policy gradients of two prompts, early and late in the run."""
    rows = []
    for name in COSINES:
        found = jointly(quick).curves(results, TASKS[0], seeds(quick), "images", name)
        cells = []
        for late in (False, True):
            half = [run[len(run) // 2 :] if late else run[: len(run) // 2 or 1] for run in found]
            means = {("", seed): fmean(cosine for _, cosine in run) for seed, run in enumerate(half)}
            cells.append(interval(means).text())
        rows.append([f"`{name}`", *cells])
    return table(["", "first half of the run", "second half"], rows)


def plot(results: Results, quick: bool = False) -> Figure:
    whole, axes = figure(2, width=3.4)
    axes[0].set_title("exact, of the round's samples")
    joint = jointly(quick).curves(results, TASKS[0], seeds(quick), "images", "exact")
    curve(axes[0], joint, 0, "one adapter for all")
    per_task = [apart(quick).curves(results, task, seeds(quick), "images", "exact") for task in TASKS]
    means = [
        [
            (sum(images for images, _ in of_tasks), fmean(exact for _, exact in of_tasks))
            for of_tasks in zip(*of_seed, strict=True)
        ]
        for of_seed in zip(*per_task, strict=True)
    ]
    curve(axes[0], means, 1, "one for each (mean, images of all)")
    axes[0].set(xlabel="images", ylabel="exact")
    axes[0].legend(fontsize=7)
    axes[1].set_title("cosine of the prompts' gradients")
    for index, name in enumerate(COSINES):
        found = jointly(quick).curves(results, TASKS[0], seeds(quick), "images", name)
        curve(axes[1], found, index, name.removeprefix("gradient/cosine_"))
    axes[1].axhline(0, color=FAINT, linewidth=0.8)
    axes[1].set(xlabel="images", ylabel="cosine")
    axes[1].legend(fontsize=7)
    return whole
