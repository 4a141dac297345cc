"""6. The race: TRL v0.23's DDPOTrainer and ours to 0.9 exact, each with the best of an equal search. Needs TRL's environment, see race/README.md."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from arms import RL
from intervals import Interval, interval, table
from matplotlib.figure import Figure
from plots import FAINT, curve, figure
from runner import Result, Results, Run


SEEDS = range(10, 15)
SEARCH_SEEDS = range(100, 104)
IMAGES = 2048  # after these a run has not arrived
RATES = (3e-3, 6e-3, 1.2e-2)
# images in a round -> what each side makes of them: TRL takes a step for each training batch with all of its timesteps, ours for some timesteps of all.
TRL_PLANS = {
    "64 in a round, 1 update": {"sample_batch_size": 64, "train_batch_size": 64},
    "64 in a round, 4 updates": {"sample_batch_size": 64, "train_batch_size": 16},
    "32 in a round, 1 update": {"sample_batch_size": 32, "train_batch_size": 32},
}
OUR_PLANS = {
    "64 in a round, 1 update": {"sample_batch_size": 64, "train_batch_size": 64, "train_timesteps_per_update": None},
    "64 in a round, 5 updates": {"sample_batch_size": 64, "train_batch_size": 64, "train_timesteps_per_update": 2},
    "32 in a round, 2 updates": {"sample_batch_size": 32, "train_batch_size": 32, "train_timesteps_per_update": 5},
}
# of each run itself: the number of epochs and what it writes
OURS = {name: value for name, value in RL.items() if name not in ("num_epochs", "sample_grid_freq")}
WITHOUT_KL = {"kl_weight": 0.0}
WITH_KL = {"kl_weight": 0.02}
WINDOW = {"sample_sde_window_size": 4}


@dataclass(frozen=True)
class Setting:
    """A plan with a learning rate."""

    side: str
    plan: str
    rate: float

    def run(self, seed: int, quick: bool, **config: Any) -> Run:
        if self.side == "trl":
            settings = {**TRL_PLANS[self.plan], "learning_rate": self.rate}
            images = settings["sample_batch_size"]
        else:
            config = {
                **OURS,
                **OUR_PLANS[self.plan],
                "train_learning_rate": self.rate,
                "train_lr_scheduler": "constant",
                **config,
            }
            settings = {"config": config}
            images = config["sample_batch_size"]
        epochs = 2 if quick else IMAGES // images
        return Run(
            self.side, {**settings, "seed": seed, "epochs": epochs, "stop_at": 0.9, "eval_images": 8 if quick else 256}
        )


def settings(side: str) -> list[Setting]:
    return [Setting(side, plan, rate) for plan in (TRL_PLANS if side == "trl" else OUR_PLANS) for rate in RATES]


# What is searched: TRL; ours without the KL term, which is TRL's algorithm; and ours with it.
SEARCHES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "TRL": ("trl", {}),
    "ours, no KL": ("ours", WITHOUT_KL),
    "ours, KL": ("ours", WITH_KL),
}
# What races: a search whose best it takes, and what it changes.
RACERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "TRL": ("TRL", {}),
    "ours, no KL": ("ours, no KL", {}),
    "ours, KL": ("ours, KL", {}),
    "ours, KL, 4 of 10 steps stochastic": ("ours, KL", WINDOW),
    "ours, KL, 6 steps": ("ours, KL", {"sample_num_steps": 6}),
}


def searched(name: str, quick: bool) -> dict[Setting, list[Run]]:
    side, config = SEARCHES[name]
    seeds, those = (SEARCH_SEEDS[:1], settings(side)[:1]) if quick else (SEARCH_SEEDS, settings(side))
    return {setting: [setting.run(seed, quick, **config) for seed in seeds] for setting in those}


def best(results: Results, name: str, quick: bool) -> Setting:
    """The setting with the least CPU time to the finish, on average over the seeds of the search; a run that does not arrive has taken all of its own."""
    found = searched(name, quick)
    return min(found, key=lambda setting: fmean(spent(results[run]) for run in found[setting]))


def racing(results: Results, name: str, quick: bool) -> list[Run]:
    search, changes = RACERS[name]
    setting, config = best(results, search, quick), {**SEARCHES[search][1], **changes}
    return [setting.run(seed, quick, **config) for seed in (SEEDS[:1] if quick else SEEDS)]


def runs(quick: bool = False) -> list[Run]:
    """Of the search; the race follows from its results."""
    return [run for name in SEARCHES for those in searched(name, quick).values() for run in those]


def runs_after(results: Results, quick: bool = False) -> list[Run]:
    per_racer = [racing(results, name, quick) for name in RACERS]
    return [run for of_a_seed in zip(*per_racer, strict=True) for run in of_a_seed]  # sides in turn


# --------------------------------------------------------------------------------------------------------------------------------------


def spent(result: Result) -> float:
    return result["curve"][-1]["cpu_s"] if result["seconds_to_090"] is None else result["seconds_to_090"]


def tables(results: Results, quick: bool = False) -> dict[str, str]:
    return {"race": _race(results, quick), "search": _search(results, quick)}


def _race(results: Results, quick: bool) -> str:
    rows = []
    for name in RACERS:
        found = [results[run] for run in racing(results, name, quick)]
        setting = best(results, RACERS[name][0], quick)
        arrived = [one for one in found if one["seconds_to_090"] is not None]
        seconds, images = (
            _of_all([math.inf if one[key] is None else one[key] for one in found])
            for key in ("seconds_to_090", "images_to_090")
        )
        ratio = _ratio(found, [results[run] for run in racing(results, "TRL", quick)])
        exact, fidelity = (
            _of_all([one["final"][key] for one in found], digits) for key, digits in (("exact", 2), ("fidelity", 3))
        )
        rows.append(
            [
                name,
                f"{setting.plan}, {setting.rate:g}",
                f"{len(arrived)} of {len(found)}",
                seconds,
                images,
                "" if name == "TRL" else ratio,
                exact,
                fidelity,
            ]
        )
    head = [
        "",
        "plan and learning rate",
        "arrived",
        "CPU s to 0.9",
        "images to 0.9",
        "CPU s, ratio to TRL",
        "exact",
        "fidelity",
    ]
    return table(head, rows)


def _of_all(values: Sequence[float], digits: int = 0) -> str:
    """Median, least and largest."""
    middle, least, largest = (
        f"{value:.{digits}f}" if math.isfinite(value) else "never"
        for value in (median(values), min(values), max(values))
    )
    return f"{middle} ({least} to {largest})"


def _ratio(found: Sequence[Result], of: Sequence[Result]) -> str:
    if any(one["seconds_to_090"] is None for one in (*found, *of)):
        return "not all arrived"
    return welch_ratio(found, of).text()


def welch_ratio(found: Sequence[Result], of: Sequence[Result]) -> Interval:
    """The geometric mean of the ratio of CPU times, with its interval (Welch's, of their logarithms): seeds of two trainers are no pairs."""
    # the mean of two groups, one of them negated, is half the difference; its interval has Satterthwaite's degrees of freedom
    logs = {("found", at): math.log(r["seconds_to_090"]) for at, r in enumerate(found)}
    logs |= {("of", at): -math.log(r["seconds_to_090"]) for at, r in enumerate(of)}
    half = interval(logs)
    return Interval(*(math.exp(2 * value) for value in (half.mean, half.low, half.high)), half.runs, ratio=True)


def _search(results: Results, quick: bool) -> str:
    rows = []
    for name in SEARCHES:
        chosen = best(results, name, quick)
        for setting, those in searched(name, quick).items():
            cells = [
                "never"
                if results[run]["seconds_to_090"] is None
                else f"{results[run]['seconds_to_090']:.0f} s, {results[run]['images_to_090']}"
                for run in those
            ]
            rows.append([name, setting.plan, f"{setting.rate:g}" + (" (taken)" if setting == chosen else ""), *cells])
    seeds = [f"seed {seed}: CPU s, images" for seed in (SEARCH_SEEDS[:1] if quick else SEARCH_SEEDS)]
    return table(["", "plan", "learning rate", *seeds], rows)


def plot(results: Results, quick: bool = False) -> Figure:
    whole, axes = figure(2, width=3.6, height=2.8)
    for index, name in enumerate(RACERS):
        found = [results[run] for run in racing(results, name, quick)]
        for axis, x in ((axes[0], "images"), (axes[1], "cpu_s")):
            for at, one in enumerate(found):
                points = [(point[x], point["exact_mean"]) for point in one["curve"]]
                curve(axis, [points], index, name if at == 0 else None)
    for axis, x in ((axes[0], "images"), (axes[1], "CPU seconds")):
        axis.axhline(0.9, color=FAINT, linewidth=0.8, linestyle=":")
        axis.set(xlabel=x, ylabel="exact, of the round's samples", ylim=(0, 1))
    axes[0].legend(fontsize=6)
    return whole
