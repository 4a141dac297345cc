"""1. The paper's figure: the pretrained model, supervised fine-tuning and RL on the four tasks, and a reward that can be hacked."""

from __future__ import annotations

import math
from collections.abc import Sequence

from arms import (
    DIGITS,
    TASKS,
    Arm,
    Measure,
    compared,
    cpu_seconds,
    final,
    pretrained,
    rl,
    sft,
    shown,
    title,
)
from intervals import Values, interval, table
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from plots import FAINT, figure, legend_below, point
from runner import Results, Run


SEEDS = 5
KL_WEIGHTS = (0.0, 0.02, 0.1)
HACKED_KL_WEIGHTS = (0.0, 0.02, 0.1, 0.5)
SUPERVISED = {
    "reward-weighted": {},
    "KL-D, γ = 0.3": {"sft_kl": "kl_d", "sft_gamma": 0.3},
    "KL-D, γ = 2": {"sft_kl": "kl_d", "sft_gamma": 2.0},
    "KL-O, γ = 0.3": {"sft_kl": "kl_o", "sft_gamma": 0.3},
    "KL-O, γ = 2": {"sft_kl": "kl_o", "sft_gamma": 2.0},
    "best half, KL-O, γ = 0.3": {"sft_loss": "filtered", "sft_kl": "kl_o", "sft_gamma": 0.3},
}
BEST_OF = (1, 2, 4, 8, 16, 32, 64)
QUANTITIES = ("exact", "fidelity", "diversity", "kl")


def tasks(quick: bool) -> Sequence[str]:
    return TASKS[:1] if quick else TASKS


def seeds(quick: bool) -> range:
    return range(1 if quick else SEEDS)


def base(task: str, quick: bool) -> Run:
    return Run("base", {"task": task, "images": 8 if quick else 1024, "best_of": [1, 2] if quick else list(BEST_OF)})


def supervised(quick: bool) -> list[Arm]:
    return [
        Arm(f"SFT, {name}", lambda task, seed, own=own: sft(task, seed, quick, **own))
        for name, own in SUPERVISED.items()
    ]


def reinforced(quick: bool) -> list[Arm]:
    return [
        Arm(f"RL, kl_weight {weight:g}", lambda task, seed, weight=weight: rl(task, seed, quick, kl_weight=weight))
        for weight in KL_WEIGHTS
    ]


def hacked(quick: bool) -> list[Arm]:
    return [
        Arm(
            f"kl_weight {weight:g}",
            lambda task, seed, weight=weight: rl(task, seed, quick, reward="greenness", kl_weight=weight),
        )
        for weight in HACKED_KL_WEIGHTS
    ]


def runs(quick: bool = False) -> list[Run]:
    found = [base(task, quick) for task in tasks(quick)]
    for seed in seeds(quick):
        found += [arm.run(task, seed) for arm in reinforced(quick) for task in tasks(quick)]
        found += [arm.run("color", seed) for arm in hacked(quick)]
        found += [arm.run(task, seed) for arm in supervised(quick) for task in tasks(quick)]
    return found


# --------------------------------------------------------------------------------------------------------------------------------------


def tables(results: Results, quick: bool = False) -> dict[str, str]:
    return {
        "arms": _arms(results, quick),
        "tasks": _tasks(results, quick),
        "effects": _effects(results, quick),
        "best-of-n": _best_of(results, quick),
        "hacking": _hacking(results, quick),
    }


def _values(results: Results, quick: bool, arm: Arm, measure: Measure) -> Values:
    return arm.values(results, tasks(quick), seeds(quick), measure)


def _arms(results: Results, quick: bool) -> str:
    rows = []
    for arm in [*supervised(quick), *reinforced(quick)]:
        cells = [shown(name, _values(results, quick, arm, final(name))) for name in QUANTITIES]
        rows.append([arm.name, *cells, interval(_values(results, quick, arm, cpu_seconds)).plain(0)])
    start = [_start(results, quick, tasks(quick), name) for name in QUANTITIES]
    return table(["mean over the tasks", *map(title, QUANTITIES), "CPU s"], [["pretrained", *start, "0"], *rows])


def _start(results: Results, quick: bool, those: Sequence[str], name: str) -> str:
    """Of the pretrained model on the images of the evaluation, which are the same for all arms and seeds."""
    found = reinforced(quick)[0].values(results, those, [0], pretrained(name))
    return interval(found).plain(DIGITS[name])


def _tasks(results: Results, quick: bool) -> str:
    rows = [["pretrained", *(_start(results, quick, [task], "exact") for task in tasks(quick))]]
    for arm in [*supervised(quick), *reinforced(quick)]:
        cells = [shown("exact", arm.values(results, [task], seeds(quick), final("exact"))) for task in tasks(quick)]
        rows.append([arm.name, *cells])
    return table(["exact", *tasks(quick)], rows)


def _effects(results: Results, quick: bool) -> str:
    without, weak, strong = reinforced(quick)
    plain, best = supervised(quick)[0], supervised(quick)[-1]
    rows = [
        [f"{weak.name} − pretrained", *(_gain(results, quick, weak, name) for name in QUANTITIES if name != "kl"), ""]
    ]
    for first, second in [(weak, without), (strong, without), (weak, plain), (weak, best)]:
        found = [
            compared(name, *(_values(results, quick, arm, final(name)) for arm in (first, second)))
            for name in QUANTITIES
        ]
        rows.append([f"{first.name} − {second.name}", *found])
    return table(["difference", *(name for name in QUANTITIES if name != "kl"), "KL, ratio"], rows)


def _gain(results: Results, quick: bool, arm: Arm, name: str) -> str:
    return compared(name, *(_values(results, quick, arm, measure(name)) for measure in (final, pretrained)))


def _best_of(results: Results, quick: bool) -> str:
    counts = base(tasks(quick)[0], quick).settings["best_of"]
    rows = [
        [task, *(f"{mean:.2f}" for mean, _ in results[base(task, quick)]["best_of"]["exact"])] for task in tasks(quick)
    ]
    return table(["exact, the best of", *(str(count) for count in counts)], rows)


def _hacking(results: Results, quick: bool) -> str:
    names = ("greenness", "exact", "soft", "fidelity", "diversity", "kl")
    start = hacked(quick)[0].values(results, ["color"], [0], pretrained("greenness"))
    others = (_start(results, quick, ["color"], name) for name in names[1:])
    rows = [["pretrained", interval(start).plain(DIGITS["greenness"]), *others]]
    for arm in hacked(quick):
        cells = [shown(name, arm.values(results, ["color"], seeds(quick), final(name))) for name in names]
        rows.append([arm.name, *cells])
    return table(["trained on greenness", *map(title, names)], rows)


# --------------------------------------------------------------------------------------------------------------------------------------


def plot(results: Results, quick: bool = False) -> Figure:
    """Exact against the KL, for each task; and for the reward that can be hacked."""
    whole, axes = figure(3, 2)
    for axis, task in zip(axes, tasks(quick), strict=False):
        counts = base(task, quick).settings["best_of"]
        best = results[base(task, quick)]["best_of"]["exact"]
        free = [(best_of_kl(n), mean) for n, (mean, _) in zip(counts, best, strict=True)]
        axis.plot(*zip(*free, strict=True), color=FAINT, linewidth=1, linestyle=":", label="best of n, no training")
        _against_kl(axis, results, quick, [*reinforced(quick), *supervised(quick)], task, "exact")
        axis.set(title=task, ylim=(0.25, 1.03))
    for axis, name in zip(axes[4:], ("exact", "greenness"), strict=True):
        start = hacked(quick)[0].values(results, ["color"], [0], pretrained(name))
        axis.axhline(interval(start).mean, color=FAINT, linewidth=1, linestyle="--", label="pretrained")
        _against_kl(axis, results, quick, hacked(quick), "color", name)
        axis.set(title="color, trained on greenness")
    axes[5].legend(fontsize=7)
    legend_below(whole, axes[0], columns=4)
    return whole


def _against_kl(axis: Axes, results: Results, quick: bool, arms: Sequence[Arm], task: str, name: str) -> None:
    axis.set_xscale("symlog", linthresh=1)
    for index, arm in enumerate(arms):
        found = [arm.values(results, [task], seeds(quick), final(one)) for one in ("kl", name)]
        point(axis, *found, index, arm.name)
    axis.set(xlabel="KL from the pretrained model, nats", ylabel=name, xlim=(0, None))


def best_of_kl(n: int) -> float:
    """KL of the best of n samples from a sample, in nats: log n - (n - 1) / n where scores have no ties, and no more than that otherwise
    (https://arxiv.org/abs/2401.01879)."""
    return math.log(n) - (n - 1) / n
